"""The small inputs of `bench ingest`: what is made, and what the times become."""

import nibabel
import numpy as np
import pytest

from hvd_imaging.bench import ingest_small, ingest_worker
from hvd_imaging.config import IngestConfig
from hvd_imaging.ingest import ingest
from hvd_imaging.sources.phantom import make_single_images


def test_small_volumes_have_the_sizes_of_a_hippocampus(tmp_path):
    ingest_small.make_volumes(tmp_path / "a", 12)
    made = ingest(tmp_path / "a", tmp_path / "d", IngestConfig()).manifest
    assert made.task == "segmentation" and len(made.samples) == 12 and made.classes == ("background", "front", "back")
    sides = np.array([sample.shape[:3] for sample in made.samples])
    low, high = np.array(ingest_small.SIDES).T
    assert (sides >= low).all() and (sides <= high).all() and len(np.unique(sides, axis=0)) > 6
    assert all(min(sample.class_voxels) > 0 for sample in made.samples)
    assert ingest_worker._nibabel(tmp_path / "a", tmp_path) > 0


@pytest.mark.parametrize("kind", ["DICOM", "NIfTI"])
def test_single_images_are_samples_of_their_own(tmp_path, kind):
    if kind == "DICOM":
        assert make_single_images(tmp_path / "a", 5, 32) == 2 * 5 * 32 * 32
    else:
        ingest_small.make_slices(tmp_path / "a", 5, (32, 40))
    made = ingest(tmp_path / "a", tmp_path / "d", IngestConfig(), task="unlabelled")
    assert not made.quarantined and len({sample.patient for sample in made.manifest.samples}) == 5
    assert {sample.shape for sample in made.manifest.samples} == {(1, 32, 32 if kind == "DICOM" else 40, 1)}
    if kind == "NIfTI":
        values = np.asarray(nibabel.load(tmp_path / "a" / "image_0000.nii.gz").dataobj)
        assert np.ptp(values.astype(float)) > 100


def test_times_of_small_inputs_are_rows_and_goals():
    cases = [case.name for case in ingest_small.CASES]
    runs = {(case, "ours"): [(8.0, 6.0), (9.0, 7.0), (7.0, 5.0)] for case in cases} | {(cases[0], "nibabel"): [(1.0, 0.5)]}
    runs[cases[-1], "ours"] = [(4.0, 4.0)]
    rows = {(row.case, row.system, row.metric): row for row in ingest_small.rows(runs)}
    assert rows[cases[0], "hvd_imaging, 1 process", "time"].value == 8 and rows[cases[0], "hvd_imaging, 1 process", "processor time"].value == 6
    assert rows[cases[0], "nibabel, reading alone", "time"].value == 1
    missing = rows[cases[1], "pydicom, reading alone", "time"]
    assert missing.value is None and missing.reason == "not installed: pydicom"
    figures = {figure.name: figure for figure in ingest_small.figures(runs)}
    assert [(f.value, f.goal, f.reached) for f in figures.values()] == [(8, 10, True), (8, 8, True), (0.5, 1, True)]
    assert all(figure.value is None and figure.reached is None for figure in ingest_small.figures({}))
