"""The synthetic archive: what is written is what the formulas say, in any orientation, and the same for a seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from click.testing import CliRunner

from hvd_imaging.cli.phantom import command
from hvd_imaging.errors import ConfigError
from hvd_imaging.sources import catalog
from hvd_imaging.sources.phantom import NOISE_HU, draw_patient, make_archive

SEED = 5


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "archive"
    make_archive(out, 3, SEED)
    return out


def cases(archive: Path, task: str | None = None):
    found = catalog.scan(archive, task=task)
    return found, sorted(found.cases, key=lambda case: case.patient_id)


def test_archive_is_a_segmentation_of_all_patients(archive):
    found, _ = cases(archive)
    assert (found.task, found.classes) == ("segmentation", ("background", "lung", "nodule"))
    assert len(found.cases) == 3
    assert found.rejected == ()
    assert found.notes == ("labels.csv is not used: masks are there, so the task is segmentation; --task classification takes it",)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_volume_is_the_formula_sampled_on_the_grid(archive, index):
    found, ordered = cases(archive)
    volume, mask = catalog.load_case(ordered[index], found)
    patient = draw_patient(SEED, index)
    scan = patient.acquisition
    assert volume.array.dtype == np.float32 and volume.shape == scan.shape
    np.testing.assert_allclose(volume.affine, scan.affine, atol=1e-5)
    truth = patient.anatomy.hu(scan.points())
    # Values below the smallest stored one are clipped, as on a scanner.
    seen = truth > -950
    error = volume.array[seen] - truth[seen]
    assert abs(error.mean()) < 0.5
    assert NOISE_HU - 1 < error.std() < NOISE_HU + 1
    np.testing.assert_array_equal(mask, patient.anatomy.labels(scan.points()))
    assert (mask == 2).any() == bool(patient.label)


def test_stored_units_are_the_values_before_rescale(archive):
    found, ordered = cases(archive)
    for index, case in enumerate(ordered):
        scan = draw_patient(SEED, index).acquisition
        stored, _ = catalog.load_case(case, found, units="stored")
        hu, _ = catalog.load_case(case, found)
        np.testing.assert_allclose(stored.array * scan.slope + scan.intercept, hu.array)


def test_oblique_series_is_rotated_and_still_the_same_patient(archive):
    scan = draw_patient(SEED, 2).acquisition
    assert scan.oblique
    assert abs(scan.affine[2, 0]) / np.linalg.norm(scan.affine[:3, 0]) < np.cos(np.radians(3))
    found, ordered = cases(archive)
    volume, mask = catalog.load_case(ordered[2], found)
    # The lungs' centres in mm, from the voxels and from the formula.
    assert mask is not None
    lung = np.argwhere(mask == 1) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    centres = draw_patient(SEED, 2).anatomy.lungs[:, 0]
    right, left = lung[lung[:, 0] < 0], lung[lung[:, 0] > 0]
    assert abs(right[:, 0].mean() - centres[0]) < 2
    assert left[:, 0].mean() > centres[1]  # the heart takes its inner part


@pytest.mark.parametrize("index", range(8))
def test_patients_lie_as_promised(index):
    patient = draw_patient(0, index)
    nodules = patient.anatomy.nodules
    assert 36 <= patient.acquisition.shape[0] <= 48
    assert len(nodules) <= 3
    for nodule in nodules:
        assert 8 <= nodule[3] <= 14
        assert patient.anatomy.hu(nodule[:3]) == pytest.approx(40)
        assert patient.anatomy.lung_distance(nodule[:3]) < 0


def test_half_of_the_patients_have_nodules():
    assert sum(draw_patient(3, index).label for index in range(40)) == 20


def test_same_seed_same_bytes_whatever_the_number_of_patients(archive, tmp_path):
    make_archive(tmp_path / "one", 1, SEED)
    for path in sorted((tmp_path / "one" / "patient_0000").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (archive / path.relative_to(tmp_path / "one")).read_bytes()
    assert (archive / "labels.csv").read_text().startswith((tmp_path / "one" / "labels.csv").read_text())
    assert draw_patient(SEED + 1, 0).uid("series") != draw_patient(SEED, 0).uid("series")


def test_names_and_numbers_do_not_give_the_order_away(archive):
    files = sorted((archive / "patient_0000" / "series").iterdir())
    heights = [float(pydicom.dcmread(path, stop_before_pixels=True).ImagePositionPatient[2]) for path in files]
    assert heights != sorted(heights) and heights != sorted(heights, reverse=True)


def test_labels_csv_tells_who_has_nodules(archive):
    found, ordered = cases(archive, "classification")
    assert found.classes == ("0", "1")
    assert [case.label for case in ordered] == [draw_patient(SEED, index).label for index in range(3)]


def test_command_writes_and_names_the_next_step(tmp_path):
    out = tmp_path / "archive"
    result = CliRunner().invoke(command, [str(out), "--patients", "1", "--seed", "1"])
    assert result.exit_code == 0, result.output
    assert "1 patients" in result.output and f"hvd-imaging ingest {out}" in result.output
    assert (out / "labels.csv").is_file()
    again = CliRunner().invoke(command, [str(out)])
    assert isinstance(again.exception, ConfigError) and "empty folder" in str(again.exception)


def test_command_json(tmp_path):
    result = CliRunner().invoke(command, [str(tmp_path / "a"), "--patients", "1", "--json"])
    value = json.loads(result.stdout)
    assert value["patients"] == 1
    assert value["files"] == sum(path.is_file() for path in (tmp_path / "a").rglob("*"))


def test_a_stopped_command_leaves_nothing(tmp_path):
    def stop(indices):
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_archive(tmp_path / "a", 2, 0, stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("patients", "seed"), [(0, 0), (1, -1)])
def test_impossible_numbers_are_refused(tmp_path, patients, seed):
    with pytest.raises(ConfigError, match="at least 1 patient"):
        make_archive(tmp_path / "a", patients, seed)
