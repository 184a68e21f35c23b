"""Each input of ``../shared/cases`` that once went wrong gives the right answer. Sorted by the number of the case."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from test_cli_dataset import run
from test_predict import Fake

from hvd_imaging.cli.ingest import command as ingest
from hvd_imaging.config import IngestConfig, LabelsConfig
from hvd_imaging.errors import PARTIAL, SourceError
from hvd_imaging.inference.predict import predict
from hvd_imaging.ingest import ingest as from_archive
from hvd_imaging.shards import manifest as manifests
from hvd_imaging.shards.reader import ShardReader
from hvd_imaging.sources import catalog
from hvd_imaging.sources.dicom import quiet, read_series, scan_dicom
from hvd_imaging.sources.labels import read_seg_mask
from hvd_imaging.sources.nifti import read_nifti

pytestmark = pytest.mark.shared


def ingested(case: Path, out: Path, *options: str, code: int = 0) -> dict:
    """What `hvd-imaging ingest --json` says of a case."""
    result = run(ingest, case / "in", out, "--json", *options)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def stored_masks(out: Path) -> list[np.ndarray]:
    manifest = manifests.load(out)
    with ShardReader(out, manifest) as reader:
        return [reader.read_stored(sample)[1] for sample in manifest.samples]


def refused(case: Path, out: Path, *options: str) -> str:
    """The line that `hvd-imaging ingest` ends with."""
    result = run(ingest, case / "in", out, *options)
    assert isinstance(result.exception, SourceError) and not out.exists(), result.output
    return str(result.exception)


def loaded(case: Path) -> dict[str, tuple]:
    """Folder of the image -> (volume, mask) of each case."""
    found = catalog.choose(catalog.scan(case / "in"), LabelsConfig())
    return {item.image.files[0].parent.name: catalog.load_case(item, found) for item in found.cases}


def test_01_each_view_of_a_series_is_a_sample_with_its_label(shared_cases, tmp_path):
    config = IngestConfig.model_validate({"privacy": {"burned_in": "keep"}})  # white noise: one image looks like writing
    result = from_archive(shared_cases / "01-parts-lost" / "in", tmp_path / "data", config)
    samples = result.manifest.samples
    assert result.quarantined == [] and len(samples) == 6
    labels: dict[str, list[int]] = {}
    for sample in samples:
        labels.setdefault(sample.patient, []).append(sample.label)
    assert sorted(labels.values()) == [[0, 0], [1, 1], [1, 1]]
    assert sorted(sample.part for sample in samples) == ["image 1"] * 3 + ["image 2"] * 3


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


def test_10_names_of_any_spelling(shared_cases, tmp_path):
    said = ingested(shared_cases / "10-upper-case-label", tmp_path / "d")
    assert (said["task"], said["patients"], said["quarantined"]) == ("segmentation", 5, [])
    assert all(mask.any() for mask in stored_masks(tmp_path / "d"))


def test_10c_channels_under_modality(shared_cases, tmp_path):
    said = ingested(shared_cases / "10c-v1-modality", tmp_path / "d")
    assert (said["task"], said["classes"], said["quarantined"]) == ("segmentation", ["background", "a", "b"], [])
    (mask,) = stored_masks(tmp_path / "d")
    assert mask.sum() == 300


def test_11d_numbers_of_one_class(shared_cases, tmp_path):
    said = ingested(shared_cases / "11d-csv-float-labels", tmp_path / "d")
    labels = sorted(sample.label for sample in manifests.load(tmp_path / "d").samples)
    assert (said["classes"], labels) == (["0", "1"], [0, 1, 1])


def test_11f_one_class(shared_cases, tmp_path):
    assert "all 3 labels are '1': classification needs at least two classes" in refused(shared_cases / "11f-one-class", tmp_path / "d")


def test_12b_slope_zero(shared_cases, tmp_path):
    case = shared_cases / "12b-slope-zero"
    said = ingested(case, tmp_path / "d")
    assert [note["note"][:35] for note in said["notes"]] == ["RescaleSlope is 0 in 12 of 12 image"]
    found = loaded(case)
    assert found["a"][0].array.std() == pytest.approx(found["ok"][0].array.std(), rel=1e-3) and found["a"][0].array.std() > 100


def test_13_padding_is_air(shared_cases, tmp_path):
    case = shared_cases / "13-padding"
    assert ingested(case, tmp_path / "d")["notes"] == []
    array = loaded(case)["a"][0].array
    assert array.min() == -1000 and array.max() < 1000 and array[0, 0, 0] == -1000


def test_16e_contours_by_frame_of_reference(shared_cases, tmp_path):
    said = ingested(shared_cases / "16e-rt-frame-only", tmp_path / "d")
    assert (said["task"], said["classes"], said["quarantined"]) == ("segmentation", ["background", "organ"], [])
    assert "found by frame of reference" in said["notes"][-1]["note"]
    (mask,) = stored_masks(tmp_path / "d")
    assert mask.any(axis=(1, 2)).sum() == 4 and mask.sum() == 900


def test_17f_seg_by_its_source_images(shared_cases, tmp_path):
    said = ingested(shared_cases / "17f-seg-no-refseries", tmp_path / "d", code=PARTIAL)
    assert (said["task"], said["patients"]) == ("segmentation", 1)
    assert [item["reason"] for item in said["quarantined"]] == [
        "no mask: no DICOM SEG or RTSTRUCT refers to this series (--task unlabelled keeps such series)"
    ]
    assert [mask.any() for mask in stored_masks(tmp_path / "d")] == [True]


def test_17j_seg_of_one_of_two_series(shared_cases, tmp_path):
    case = shared_cases / "17j-seg-two-series"
    said = ingested(case, tmp_path / "d", code=PARTIAL)
    assert [item["reason"].split(" (--")[0] for item in said["quarantined"]] == [
        "no mask: the DICOM SEG that names this series was drawn on slices of another distance or place"
    ]
    assert "used for those on whose slices it was drawn" in said["notes"][-1]["note"]
    found = loaded(case)
    assert list(found) == ["ct"]
    np.testing.assert_array_equal(found["ct"][1] > 0, np.load(case / "truth.npy") > 0)


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


def test_26_stray_nifti(shared_cases, tmp_path):
    said = ingested(shared_cases / "26-stray-nifti", tmp_path / "d", code=PARTIAL)
    assert (said["task"], said["patients"], len(said["quarantined"])) == ("unlabelled", 1, 1)
    assert said["quarantined"][0]["reason"].startswith("NIfTI or NRRD beside DICOM; ingest it apart")


def test_28_names_that_are_words(shared_cases, tmp_path):
    """A file called mask, values or image does not take these words out of the sentences about it."""
    reasons = [item["reason"] for item in ingested(shared_cases / "28-names-that-are-words", tmp_path / "d", code=PARTIAL)["quarantined"]]
    assert len(reasons) == 3
    for reason in reasons:
        assert re.fullmatch(r"file-[0-9a-f]{10}: mask with values from 7 to 7, expected whole numbers from 0 to 1 \(background, lung\)", reason)


def test_31_visits_of_a_patient_stay_together_when_asked_and_are_proposed_when_not(shared_cases, tmp_path):
    source = shared_cases / "31-nifti-several-visits" / "in"
    alone = from_archive(source, tmp_path / "alone", IngestConfig())
    (note,) = [note.note for note in alone.notes if "stems" in note.note]
    rule = re.search("--patient '(.*?)'", note)[1]
    assert rule == r"(genius_\d\d)" and "24 cases, but their names group into 8 stems of 3" in note
    manifest = from_archive(source, tmp_path / "data", IngestConfig.model_validate({"split": {"patient": rule}})).manifest
    assert len({sample.patient for sample in manifest.samples}) == 8
    assert len({(sample.patient, sample.split) for sample in manifest.samples}) == 8
    # A table says the same.
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    names = sorted(path.name.removesuffix(".nii.gz") for path in (copy / "labelsTr").iterdir())
    (copy / "cases.csv").write_text("case,patient\n" + "".join(f"{name},{name[7:9]}\n" for name in names))
    manifest = from_archive(copy, tmp_path / "table", IngestConfig()).manifest
    assert len({(sample.patient, sample.split) for sample in manifest.samples}) == 8
