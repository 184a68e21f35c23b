"""Mask volumes beside DICOM series: matched by name, never by guess."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_labels_nrrd import save
from test_sources_catalog import HEIGHTS, block, write_seg
from test_sources_dicom import SECRET, make_slice, write

from hvd_imaging.config import LabelsConfig
from hvd_imaging.errors import SourceError
from hvd_imaging.ingest.prepare import files_of
from hvd_imaging.sources import catalog
from hvd_imaging.sources.nifti import write_nifti
from hvd_imaging.volume import Volume

AFFINE = np.array([[0, 0, 0.5, -10], [0, 0.8, 0, -20], [2.5, 0, 0, 0], [0, 0, 0, 1.0]])
MASK = (block(1) + 2 * block(2, 1)).astype("u1")


def nrrd(path, mask=MASK):
    return save(
        path, mask.tobytes(), type="uchar", sizes="6 4 4", space_origin="(-10,-20,0)",
        space_directions="(0.5,0,0) (0,0.8,0) (0,0,2.5)",
    )  # fmt: skip


@pytest.fixture()
def archive(tmp_path):
    slices = [make_slice(z) for z in HEIGHTS]
    write(tmp_path / "case1" / "ct", slices)
    write(tmp_path / "case2", [make_slice(z, series="1.2.3.5", PatientID="B") for z in HEIGHTS])
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "zebra": 1, "ant": 2}}))
    return tmp_path, slices


@pytest.mark.parametrize("name", ["1.2.3.4", "case1", SECRET])
@pytest.mark.parametrize("folder", ["labels", "case1/masks"])
def test_by_uid_folder_or_patient(archive, name, folder):
    root, _ = archive
    path = nrrd(root / folder / f"{name}.seg.nrrd")
    write_nifti(root / "labels" / "1.2.3.5.nii.gz", Volume(MASK, AFFINE))
    (root / "labels" / "lost.nii.gz").write_bytes((root / "labels" / "1.2.3.5.nii.gz").read_bytes())
    found = catalog.choose(catalog.scan(root), LabelsConfig())
    assert (found.task, found.classes) == ("segmentation", ("background", "ant", "zebra"))
    assert [(item.path, item.reason.split(";")[0]) for item in found.rejected] == [
        ("labels/lost.nii.gz", "mask volume, but no series fits its name")
    ]
    for case in found.cases:
        np.testing.assert_array_equal(catalog.load_case(case, found)[1], np.array([0, 2, 1])[MASK])
    assert path in files_of(found.cases[0])
    assert len(catalog.scan(root, task="unlabelled").cases) == 2


def test_volume_and_seg_are_two_opinions(archive):
    root, slices = archive
    nrrd(root / "labels" / "case1.nrrd")
    write_seg(root / "seg", slices, {"zebra": block(1, slice(0, 2))})
    found = catalog.choose(catalog.scan(root), LabelsConfig())
    assert len(found.cases) == 1 and len(found.cases[0].mask) == 2
    # Without names and with voxels in common they are opinions; both marked the upper half.
    np.testing.assert_array_equal(catalog.load_case(found.cases[0], found)[1], 2 * block(1, slice(0, 2)) + block(2, 1))


def test_what_is_refused(archive):
    root, _ = archive
    write(root / "case1" / "more", [make_slice(z, series="1.2.3.6") for z in HEIGHTS])
    nrrd(root / "labels" / "case1.nrrd")
    nrrd(root / "labels" / "1.2.3.5.nrrd", 3 * (MASK > 0).astype("u1"))
    found = catalog.scan(root)
    assert "mask volume, but 2 series fit its name" in found.rejected[-1].reason
    with pytest.raises(SourceError, match=r"labels/1\.2\.3\.5\.nrrd: mask with values from 0 to 3"):
        catalog.load_case(found.cases[0], found)
    (root / "dataset.json").unlink()
    with pytest.raises(SourceError, match="nothing says what their values mean: expected dataset.json"):
        catalog.scan(root)
    nrrd(root / "case1" / "image.nrrd")
    with pytest.raises(SourceError, match="nothing says what their values mean"):
        catalog.scan(root)  # masks without a meaning are the user's to explain, whatever else lies there
