"""Each input of ``../shared/cases`` that once went wrong gives the right answer. Sorted by the number of the case."""

from __future__ import annotations

import json

import numpy as np
import pydicom
import pytest
from test_predict import Fake

from hvd_imaging.inference.predict import predict
from hvd_imaging.sources import catalog
from hvd_imaging.sources.dicom import quiet, read_series, scan_dicom
from hvd_imaging.sources.labels import read_seg_mask
from hvd_imaging.sources.nifti import read_nifti

pytestmark = pytest.mark.shared


def test_05_a_seg_of_a_tilted_gantry_lies_on_the_slices_of_its_series(shared_cases, tmp_path):
    folder = shared_cases / "05-gantry-tilt/in/a"
    predict(Fake(level=0), folder, tmp_path / "mask.dcm")
    with quiet():
        seg = pydicom.dcmread(tmp_path / "mask.dcm")
        places = {tuple(map(float, g.PlanePositionSequence[0].ImagePositionPatient)) for g in seg.PerFrameFunctionalGroupsSequence}
        slices = [pydicom.dcmread(path) for path in folder.iterdir()]
        inside = sum(int((item.pixel_array * float(item.RescaleSlope) + float(item.RescaleIntercept) > 0).sum()) for item in slices)
        assert int(seg.pixel_array.sum()) == pytest.approx(inside, rel=0.05)
    assert places and places <= {tuple(map(float, item.ImagePositionPatient)) for item in slices}


@pytest.mark.parametrize("name", ["micron", "meter"])
def test_08_units_of_nifti(shared_cases, name):
    # 2 mm in the plane; the numbers of the header are 2, 2, 3 in its unit.
    assert read_nifti(shared_cases / f"08-nifti-units/in/{name}.nii.gz").spacing == pytest.approx((3, 2, 2))


def test_23_an_object_of_many_frames_takes_its_seg_and_gives_one(shared_cases, tmp_path):
    root = shared_cases / "23-multiframe-seg"
    found = catalog.scan(root / "in")
    volume, mask = catalog.load_case(found.cases[0], found)
    np.testing.assert_array_equal(mask.astype(bool), np.load(root / "truth.npy").astype(bool))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/mf.dcm").symlink_to(root / "in/mf.dcm")
    predict(Fake(level=0), tmp_path / "in", tmp_path / "mask.dcm")
    again = read_seg_mask(tmp_path / "mask.dcm", read_series(scan_dicom(tmp_path / "in").series[0]), ("background", "lesion"))
    np.testing.assert_array_equal(again.astype(bool), volume.array > 0)


def test_24b_masks_beside_in_three_orders_of_the_voxels(shared_cases):
    root = shared_cases / "24b-nifti-beside"
    found = catalog.scan(root / "in")
    assert len(found.cases) == len(json.loads((root / "which.json").read_text())) == 3 and not found.rejected
    for case in found.cases:
        np.testing.assert_array_equal(catalog.load_case(case, found)[1].astype(bool), np.load(root / "truth.npy").astype(bool))
