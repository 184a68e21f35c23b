"""Annotations on their way into a dataset: classes, notes and settings, and no name of anybody."""

from __future__ import annotations

import json

import numpy as np
import pytest
from contours import trace, write_structure_set
from test_sources_dicom import make_slice, write

from hvd_imaging.config import IngestConfig, load
from hvd_imaging.ingest import ingest
from hvd_imaging.shards.reader import ShardReader

SECRET = "Rumpelstilz"
AFFINE = np.array([[0, 0, 2.0, -30], [0, 2.0, 0, -30], [5.0, 0, 0, 0], [0, 0, 0, 1.0]])
SHAPE = (4, 12, 14)


def box(rows: slice) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[1:3, rows, 3:9] = True
    return mask


@pytest.fixture()
def archive(tmp_path):
    """Two patients; of the first two readers, of the second an empty region."""
    root = tmp_path / "archive"
    for number in range(2):
        pixels = np.random.default_rng(number).integers(900, 1100, SHAPE, dtype=np.int16)
        series = f"1.2.3.{4 + number}"
        write(
            root / f"{SECRET}{number}",
            [make_slice(5 * z, pixels[z], (-30, -30, 5 * z), spacing=(2, 2), series=series, PatientID=f"{SECRET}{number}") for z in range(4)],
        )
    for name, rows in (("One", slice(2, 7)), ("Two", slice(4, 9))):
        regions = {"liver": trace(box(rows), AFFINE), f"GTV {SECRET}": trace(box(slice(2, 3)), AFFINE)}
        write_structure_set(root / f"{SECRET}-{name}", regions, "1.2.3.4", OperatorsName=f"{SECRET}^{name}")
    write_structure_set(root / "m3", {"liver": []}, "1.2.3.5")
    return root


def run(archive, out, *assignments):
    return ingest(archive, out, load(IngestConfig, None, assignments))


def masks(folder, manifest):
    with ShardReader(folder, manifest) as reader:
        return [reader.read_stored(sample)[1] for sample in manifest.samples]


def test_contours_in_a_dataset(archive, tmp_path):
    found = run(archive, tmp_path / "d")
    manifest = found.manifest
    assert manifest.task == "segmentation" and len(manifest.samples) == 2 and not found.quarantined
    assert manifest.classes[0] == "background" and manifest.classes[1].startswith("label-") and manifest.classes[2] == "liver"
    both = box(slice(4, 7))
    expected = np.where(both, 2, box(slice(2, 3)) * 1)
    assert sorted(mask.sum() for mask in masks(tmp_path / "d", manifest)) == [0, expected.sum()]
    notes = {note.note for note in found.notes}
    assert {"'liver': 2 annotators; their consensus (majority) is used", "the mask is empty"} <= notes
    for path in (tmp_path / "d").rglob("*"):
        assert SECRET.encode() not in path.read_bytes()
    assert f"GTV {SECRET}" in json.loads((tmp_path / "d.files.json").read_text()).values()


def test_settings_of_labels_decide_and_make_other_samples(archive, tmp_path):
    first = run(archive, tmp_path / "a", "labels.names=[liver]")
    second = run(archive, tmp_path / "b", "labels.names=[liver]", "labels.consensus=union", "labels.empty=quarantine")
    assert first.manifest.classes == second.manifest.classes == ("background", "liver")
    assert not {sample.origin for sample in first.manifest.samples} & {sample.origin for sample in second.manifest.samples}
    (mask,) = masks(tmp_path / "b", second.manifest)
    np.testing.assert_array_equal(mask, box(slice(2, 9)))
    (aside,) = second.quarantined
    assert "nothing is marked in this image" in aside.reason
