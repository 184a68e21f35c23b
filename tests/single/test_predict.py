"""Prediction: answers lie on the input's own grid, in every form of output, and nothing is overwritten."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from datasets import make_dataset
from runs import PATCH, make_run

from hvd_imaging.config import ModelConfig, PreprocessConfig
from hvd_imaging.errors import ConfigError, RunError, SourceError
from hvd_imaging.inference.predict import answer_volume, back_to_grid, input_kind, predict, window_bytes
from hvd_imaging.models.spec import ModelSpec
from hvd_imaging.sources.dicom import read_series, scan_dicom
from hvd_imaging.sources.labels import read_seg_mask
from hvd_imaging.sources.nifti import read_nifti, write_nifti
from hvd_imaging.sources.phantom import make_archive
from hvd_imaging.volume import Volume


class Fake:
    """Finds what is brighter than a threshold after preprocessing."""

    kind = "fake"

    def __init__(self, level=0.5, task="segmentation", channels=1, classes=("background", "lesion"), **preprocess):
        self.level = level
        self.spec = ModelSpec(
            task=task,
            classes=classes,
            patch=PATCH,
            channels=channels,
            preprocess=PreprocessConfig(**({"intensity": "none"} | preprocess)),
            model=ModelConfig(name="fake"),
            dataset_hash="0",
            run="run",
        )

    def __call__(self, batch):
        found = (batch[..., :1] > self.level).astype(np.float32)
        if self.spec.task == "segmentation":
            return np.concatenate([1 - found, found], -1)
        share = found.mean(axis=(1, 2, 3, 4))
        return np.stack([1 - share, share], -1)


def oblique(spacing=(3.0, 0.8, 1.1)):
    """An affine that is turned about all axes, flipped along one, and far from the origin."""
    a, b, c = 0.3, -0.4, 0.2
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rx @ ry @ rz @ np.diag([1, -1, 1]) * spacing
    affine[:3, 3] = (-120, 85, -900)
    return affine


def ball_volume(shape=(14, 40, 33), spacing=(3.0, 0.8, 1.1), radius=9.0):
    """A smooth ball in air, 0.5 at ``radius`` mm; (volume, truth)."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    distance = np.linalg.norm((grid - np.array(shape) / 2.1) * spacing, axis=-1)
    image = 1 / (1 + np.exp(distance - radius))
    return Volume(image.astype(np.float32), oblique(spacing)), image > 0.5


def overlap(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_without_preprocessing_the_mask_is_exact_to_the_voxel():
    volume, truth = ball_volume()
    answer = answer_volume(Fake(), volume)
    np.testing.assert_array_equal(answer.labels, truth)


@pytest.mark.parametrize(
    "preprocess",
    [{"crop": "foreground", "crop_margin_mm": 2}, {"spacing": (2.0, 1.0, 1.0)}, {"spacing": (1.5, 1.5, 1.5), "crop": "foreground"}],
)
def test_after_crop_and_resampling_the_mask_is_back_on_its_own_grid(preprocess):
    volume, truth = ball_volume()
    volume = volume.with_array(np.where(volume.array > 0.02, volume.array, 0))
    labels = answer_volume(Fake(**preprocess), volume).labels
    assert labels is not None and labels.shape == truth.shape
    assert overlap(labels > 0, truth) > 0.9
    if "spacing" not in preprocess:
        np.testing.assert_array_equal(labels, truth)


def test_back_to_grid_moves_flips_and_fills():
    labels = np.arange(1, 25, dtype=np.uint8).reshape(2, 3, 4)
    np.testing.assert_array_equal(back_to_grid(labels, oblique(), (2, 3, 4), oblique()), labels)
    # the same voxels seen from a larger grid that begins one voxel earlier along H
    larger = oblique() @ np.array([[1, 0, 0, 0], [0, 1, 0, -1], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    found = back_to_grid(labels, oblique(), (3, 5, 4), larger)
    np.testing.assert_array_equal(found[:2, 1:4], labels)
    assert found.sum() == labels.sum()
    # axes swapped and one flipped
    turned = oblique() @ np.array([[0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, 3], [0, 0, 0, 1.0]])
    np.testing.assert_array_equal(
        back_to_grid(labels, oblique(), (4, 3, 2), turned), labels[:, :, ::-1].transpose(2, 1, 0)
    )
    # each voxel doubled
    fine = oblique() @ np.diag([0.5, 0.5, 0.5, 1]) @ np.array(
        [[1, 0, 0, -0.5], [0, 1, 0, -0.5], [0, 0, 1, -0.5], [0, 0, 0, 1.0]]
    )
    np.testing.assert_array_equal(
        back_to_grid(labels, oblique(), (4, 6, 8), fine), labels.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    )


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_nifti_file_gets_a_label_map_on_its_grid(tmp_path, suffix):
    volume, truth = ball_volume()
    write_nifti(tmp_path / "case.nii.gz", volume)
    rows = predict(Fake(), tmp_path / "case.nii.gz", tmp_path / f"mask{suffix}")
    mask = read_nifti(tmp_path / f"mask{suffix}")
    assert (mask.shape == volume.shape and np.allclose(mask.affine, volume.affine, atol=1e-3))
    np.testing.assert_array_equal(mask.array, truth)
    assert rows == [{"id": "input", "lesion_ml": pytest.approx(truth.sum() * 3.0 * 0.8 * 1.1 / 1000)}]


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Two synthetic CT series: (folder of the first, archive)."""
    archive = tmp_path_factory.mktemp("phantom") / "archive"
    make_archive(archive, 2, 1)
    found = scan_dicom(archive).series
    assert len(found) == 2
    return found[0].files[0].parent, archive


def test_a_dicom_series_gets_a_seg_that_refers_to_it(series, tmp_path):
    import pydicom

    folder, _ = series
    fake = Fake(classes=("background", "lung nodule"), intensity="window", window=(-1000, 400))
    predict(fake, folder, tmp_path / "mask.dcm")
    volume = read_series(scan_dicom(folder).series[0])
    expected = answer_volume(fake, volume).labels
    assert expected is not None and 0 < expected.mean() < 1
    mask = read_seg_mask(tmp_path / "mask.dcm", volume, fake.spec.classes)
    np.testing.assert_array_equal(mask, expected)

    seg = pydicom.dcmread(tmp_path / "mask.dcm")
    image = pydicom.dcmread(volume.source[0], stop_before_pixels=True)
    assert seg.Modality == "SEG" and seg.SegmentationType == "BINARY"
    for keyword in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert seg[keyword].value == image[keyword].value
    assert seg.SeriesInstanceUID != image.SeriesInstanceUID
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == image.SeriesInstanceUID
    known = {pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID for f in volume.source}
    referenced = {
        frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        for frame in seg.PerFrameFunctionalGroupsSequence
    }
    assert referenced and referenced <= known
    (segment,) = seg.SegmentSequence
    assert segment.SegmentLabel == "lung nodule" and segment.SegmentAlgorithmType == "AUTOMATIC"
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Nodule"
    assert scan_dicom(tmp_path).segmentations[0].labels == ("lung nodule",)


def test_highdicom_reads_the_seg_back(series, tmp_path):
    import highdicom

    folder, _ = series
    fake = Fake(level=0.9, intensity="window", window=(-1000, 400))
    predict(fake, folder, tmp_path / "mask.dcm")
    volume = read_series(scan_dicom(folder).series[0])
    seg = highdicom.seg.segread(tmp_path / "mask.dcm")
    found = seg.get_volume(combine_segments=True)
    expected = answer_volume(fake, volume).labels
    assert expected is not None and int(np.sum(found.array)) == int(expected.sum()) > 0
    # highdicom's own geometry (its frames may begin at the first slice with a finding) says the same place in mm
    ours = volume.affine @ np.append(np.argwhere(expected).mean(0), 1)
    theirs = found.affine @ np.append(np.argwhere(found.array).mean(0), 1)
    np.testing.assert_allclose(theirs, ours, atol=1e-3)


def test_nothing_found_is_an_empty_mask_not_an_error(series, tmp_path):
    folder, _ = series
    fake = Fake(level=1e6)
    rows = predict(fake, folder, tmp_path / "mask.dcm")
    volume = read_series(scan_dicom(folder).series[0])
    assert not read_seg_mask(tmp_path / "mask.dcm", volume, fake.spec.classes).any()
    assert rows[0]["lesion_ml"] == 0


def test_a_csv_holds_volumes_or_probabilities_and_no_identifier(series, tmp_path):
    import pydicom

    folder, _ = series
    predict(Fake(intensity="window"), folder, tmp_path / "volumes.csv")
    predict(Fake(task="classification", intensity="window"), folder, tmp_path / "classes.csv")
    (volumes,) = csv.DictReader((tmp_path / "volumes.csv").read_text().splitlines())
    assert volumes["id"] == "input" and float(volumes["lesion_ml"]) > 0
    (classes,) = csv.DictReader((tmp_path / "classes.csv").read_text().splitlines())
    assert list(classes) == ["id", "predicted", "p_background", "p_lesion"]
    assert float(classes["p_background"]) + float(classes["p_lesion"]) == pytest.approx(1)
    image = pydicom.dcmread(next(path for path in sorted(folder.iterdir())), stop_before_pixels=True)
    text = (tmp_path / "volumes.csv").read_text() + (tmp_path / "classes.csv").read_text()
    for keyword in ("PatientID", "PatientName", "SeriesInstanceUID", "StudyDate"):
        assert not image.get(keyword) or str(image[keyword].value) not in text


def test_a_dataset_gets_one_label_map_a_sample(tmp_path):
    manifest = make_dataset(tmp_path / "data", samples=3)
    rows = predict(Fake(level=0.45), tmp_path / "data", tmp_path / "masks")
    assert [row["id"] for row in rows] == [sample.id for sample in manifest.samples]
    assert {path.name for path in (tmp_path / "masks").iterdir()} == {f"{s.id}.nii.gz" for s in manifest.samples}
    mask = read_nifti(tmp_path / "masks" / f"{manifest.samples[0].id}.nii.gz")
    np.testing.assert_allclose(mask.affine, manifest.samples[0].affine)
    assert manifest.samples[0].class_voxels is not None
    assert mask.array.sum() == pytest.approx(manifest.samples[0].class_voxels[1], rel=0.05)
    predict(Fake(level=0.45), tmp_path / "data", tmp_path / "all.csv")
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 4
    with pytest.raises(RunError, match="preprocessed in another way"):
        predict(Fake(spacing=(1, 1, 1)), tmp_path / "data", tmp_path / "other.csv")
    assert not (tmp_path / "other.csv").exists()


def test_existing_outputs_are_kept_unless_forced(tmp_path):
    volume, truth = ball_volume()
    write_nifti(tmp_path / "case.nii", volume)
    out = tmp_path / "mask.nii.gz"
    out.write_text("mine")
    with pytest.raises(RunError, match="--force"):
        predict(Fake(), tmp_path / "case.nii", out)
    assert out.read_text() == "mine"
    predict(Fake(), tmp_path / "case.nii", out, force=True)
    np.testing.assert_array_equal(read_nifti(out).array, truth)
    make_dataset(tmp_path / "data", samples=2)
    folder = tmp_path / "masks"
    predict(Fake(), tmp_path / "data", folder)
    with pytest.raises(RunError, match="--force"):
        predict(Fake(), tmp_path / "data", folder)
    predict(Fake(), tmp_path / "data", folder, force=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="more than label maps"):
        predict(Fake(), tmp_path / "data", folder, force=True)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_failure_leaves_nothing_behind(tmp_path):
    class Broken(Fake):
        def __call__(self, batch):
            raise RunError("broken")

    make_dataset(tmp_path / "data", samples=2)
    for name in ("masks", "all.csv"):
        with pytest.raises(RunError, match="broken"):
            predict(Broken(), tmp_path / "data", tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_outputs_that_do_not_fit_are_refused(series, tmp_path):
    folder, _ = series
    volume, _ = ball_volume()
    write_nifti(tmp_path / "case.nii", volume)
    make_dataset(tmp_path / "data", samples=2)
    nifti, data = tmp_path / "case.nii", tmp_path / "data"
    for model, source, out, message in [
        (Fake(), nifti, "mask.dcm", "refers to a DICOM series"),
        (Fake(), nifti, "mask.png", "expected a name ending in .dcm"),
        (Fake(), nifti, "mask", "expected a name ending in .dcm"),
        (Fake(task="classification"), folder, "mask.dcm", "ending in .csv"),
        (Fake(), data, "mask.nii.gz", "expected a folder"),
    ]:
        with pytest.raises(ConfigError, match=message):
            predict(model, source, tmp_path / out)


def test_inputs_that_can_not_be_used_are_refused(series, tmp_path):
    folder, archive = series
    with pytest.raises(SourceError, match=r"expected one DICOM series, found 2: .*patient"):
        predict(Fake(), archive, tmp_path / "mask.dcm")
    with pytest.raises(SourceError, match="no such file or folder"):
        predict(Fake(), tmp_path / "nowhere", tmp_path / "mask.dcm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no DICOM image series"):
        predict(Fake(), tmp_path / "empty", tmp_path / "mask.dcm")
    with pytest.raises(SourceError, match="give the folder of the series"):
        input_kind(next(iter(sorted(folder.iterdir()))))
    with pytest.raises(RunError, match="1 channels, the model expects 2"):
        predict(Fake(channels=2), folder, tmp_path / "mask.dcm")
    assert {path.name for path in tmp_path.iterdir()} == {"empty"}


@pytest.mark.parametrize("suffix", [".nii.gz", ".NII"])
def test_a_folder_of_volumes_says_what_to_do_and_that_works(tmp_path, suffix):
    volume, truth = ball_volume()
    folder = tmp_path / "new cases"
    for name in ("a", "b"):
        (folder / "imagesTs").mkdir(parents=True, exist_ok=True)
        written = folder / "imagesTs" / f"{name}{suffix.lower()}"
        write_nifti(written, volume)
        written.rename(written.with_name(f"{name}{suffix}"))
    (folder / "dataset.json").write_text("{}")
    for out in ("masks", "mask.nii.gz", "answer.csv"):
        with pytest.raises(SourceError, match="2 NIfTI or NRRD files, expected one file") as refused:
            predict(Fake(), folder, tmp_path / out)
    with pytest.raises(SourceError, match=r'"\$\(basename "\$f" .*\)"\.csv; done'):
        predict(Fake(task="classification"), folder, tmp_path / "answer.csv")
    # The loop is for a shell: what it calls is written down instead.
    message = str(refused.value)
    loop = message[message.index("for f in") :].replace("hvd-imaging predict", "printf '%s|%s|%s\\n'").replace("OUT/", "out/")
    told = subprocess.run(["bash", "-c", loop], capture_output=True, text=True, check=True, cwd=tmp_path).stdout.splitlines()
    assert [line.split("|")[0] for line in told] == ["MODEL", "MODEL"]
    for line, name in zip(told, ("a", "b"), strict=True):
        _, source, out = line.split("|")
        assert out == f"out/{name}.nii.gz"
        (tmp_path / "out").mkdir(exist_ok=True)
        predict(Fake(), source, tmp_path / out)
        assert overlap(read_nifti(tmp_path / out).array > 0, truth) > 0.99


def test_a_series_with_a_damaged_file_is_not_answered_in_part(series, tmp_path):
    import shutil

    folder, _ = series
    copy = tmp_path / "series"
    shutil.copytree(folder, copy)
    victim = sorted(copy.iterdir())[3]
    victim.write_bytes(victim.read_bytes()[:600])
    with pytest.raises(SourceError, match=victim.name):
        predict(Fake(), copy, tmp_path / "mask.dcm")
    assert not (tmp_path / "mask.dcm").exists()


def test_the_real_mr_series_gets_a_seg_on_its_own_slices(shared_data, tmp_path):
    folder = shared_data / "brain_series" / "volume"
    fake = Fake(intensity="percentile", classes=("background", "bright"))
    predict(fake, folder, tmp_path / "mask.dcm")
    volume = read_series(scan_dicom(folder).series[0])
    expected = answer_volume(fake, volume).labels
    assert expected is not None and expected.any()
    np.testing.assert_array_equal(read_seg_mask(tmp_path / "mask.dcm", volume, fake.spec.classes), expected)


def test_the_command_with_a_run(tmp_path):
    from hvd_imaging.cli.predict import command

    make_dataset(tmp_path / "data", samples=3)
    run = make_run(tmp_path / "run", tmp_path / "data")
    volume, _ = ball_volume((10, 20, 20))
    write_nifti(tmp_path / "case.nii", volume)
    arguments = [str(run), str(tmp_path / "case.nii"), str(tmp_path / "mask.nii.gz")]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "written:" in result.stdout and " ml" in result.stdout
    mask = read_nifti(tmp_path / "mask.nii.gz")
    assert (mask.shape == volume.shape and np.allclose(mask.affine, volume.affine, atol=1e-3)) and set(np.unique(mask.array)) <= {0, 1}
    result = CliRunner().invoke(command, [*arguments, "--force", "--json", "--threads", "1"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found["answers"][0]["id"] == "input" and found["format"] == "run" and found["peak_bytes"] > 10 << 20
    again = read_nifti(Path(arguments[2]))
    np.testing.assert_array_equal(again.array, mask.array)
    with pytest.raises(RunError, match=r"memory budget of 1 MiB is too small: the process holds \d+ MiB.*expected --memory-mb"):
        CliRunner().invoke(command, [*arguments, "--force", "--memory-mb", "1"], catch_exceptions=False)
    with pytest.raises(RunError, match="a run folder needs TensorFlow, which --edge leaves out; expected an export of format tflite"):
        CliRunner().invoke(command, [*arguments, "--force", "--edge"], catch_exceptions=False)


def test_the_budget_counts_what_the_process_holds_already():
    mega = 1 << 20
    volume, patch = (256, 256, 256), (48, 48, 48)
    whole = 48 * 256 * 256 * 2 * 4
    labels = 256**3
    assert window_bytes(2048 * mega, 500 * mega, volume, patch, 2) == (2048 - 500 - 256) * mega - labels
    # Short with the reserve: to be looked at more closely; then what is left, enough for some rows at least.
    tight = 500 * mega + labels + whole
    assert window_bytes(tight, 500 * mega, volume, patch, 2) is None
    assert window_bytes(tight, 500 * mega, volume, patch, 2, reserve=0) == whole
    assert window_bytes(tight, 510 * mega, volume, patch, 2, reserve=0) == whole - 10 * mega
    with pytest.raises(RunError, match=r"budget of 544 MiB is too small: the process holds 544 MiB.*at least 20 MiB more"):
        window_bytes(544 * mega, 544 * mega, volume, patch, 2, reserve=0)
    assert window_bytes(600 * mega, 300 * mega, (4, 20, 10), patch, 2) == 44 * mega - 800  # smaller than the patch


def test_a_tight_budget_changes_the_work_and_not_the_answer(monkeypatch):
    """The runtime's own memory shows when it computes first; then the volume goes through in strips."""
    volume, truth = ball_volume()
    row = PATCH[0] * volume.array.shape[2] * 2 * 4
    held, windows = [100 << 20], []
    monkeypatch.setattr("hvd_imaging.inference.predict._held", lambda: held[0])

    class Growing(Fake):
        def __call__(self, batch):
            held[0] = 110 << 20
            windows.append(len(batch))
            return super().__call__(batch)

    held[0] = 64 << 30  # a caller's own data: without a budget it is nobody's business
    plenty = answer_volume(Growing(orientation="source"), volume)
    many = sum(windows)
    held[0], windows[:] = 100 << 20, []
    tight = (110 << 20) + truth.size + PATCH[1] * row
    answer = answer_volume(Growing(orientation="source"), volume, memory_bytes=tight)
    assert sum(windows) > many + 1  # the look ahead, and windows on borders of strips twice
    np.testing.assert_array_equal(answer.labels, plenty.labels)
    with pytest.raises(RunError, match="the process holds 110 MiB"):
        answer_volume(Growing(orientation="source"), volume, memory_bytes=tight - 1)
