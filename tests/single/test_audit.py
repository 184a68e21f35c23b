"""Leaks between splits: the same patient, the same pixels, the same image stored otherwise, neighbouring frames."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from scipy import ndimage
from test_cli_dataset import run
from test_ingest import Ranks

from hvd_imaging import errors
from hvd_imaging.audit import fingerprint as prints
from hvd_imaging.audit import leaks
from hvd_imaging.audit import run as audits
from hvd_imaging.cli.dataset import command as dataset_command
from hvd_imaging.communicator import Alone
from hvd_imaging.config import PreprocessConfig, ShardConfig, SplitConfig
from hvd_imaging.shards import manifest as manifests
from hvd_imaging.shards.writer import Record, describe, write_dataset
from hvd_imaging.sources.phantom import draw_patient

AFFINE = np.diag([1.0, 1.0, 5.0, 1.0])[[2, 1, 0, 3]]  # D along z, W along x
CHANGES = {
    "resampled": lambda v: ndimage.zoom(v, (1, 0.7, 0.7), order=1, grid_mode=True, mode="nearest"),
    "finer": lambda v: ndimage.zoom(v, 1.3, order=1, grid_mode=True, mode="nearest"),
    "window": lambda v: ((v - 0.1) / 0.6).clip(0, 1),
    "narrow window": lambda v: ((v - 0.3) / 0.3).clip(0, 1),
    "gamma": lambda v: np.sqrt(v),
    "one slice": lambda v: np.roll(v, 1, 0),
    "one voxel": lambda v: np.roll(v, (1, 1, 1), (0, 1, 2)),
    "noise": lambda v: (v + np.random.default_rng(0).normal(0, 0.02, v.shape)).clip(0, 1),
    "8 bits": lambda v: np.round(v * 255) / 255,
}


def chest(index):
    """(30, 60, 60) in [0, 1], as ingest would make it: one synthetic patient, with noise."""
    anatomy = draw_patient(0, index).anatomy
    z, y, x = (np.linspace(-a, a, n) for a, n in ((110, 30), (140, 60), (170, 60)))
    points = np.stack(np.meshgrid(z, y, x, indexing="ij")[::-1], -1)
    hu = anatomy.hu(points) + np.random.default_rng(index).normal(0, 15, points.shape[:-1])
    return ((hu + 1000) / 1400).clip(0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def chests():
    return [chest(index) for index in range(6)]


def of(volume):
    return prints.fingerprint(np.asarray(volume, np.float32)[..., None])


def far(one, two):
    return prints.distance(one.spectrum, two.spectrum)


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_volume_is_known_again(chests, change):
    for volume in chests[:3]:
        one, two = of(volume), of(CHANGES[change](volume))
        assert one.digest != two.digest
        assert prints.differing_bits(one.hash[None], two.hash[None])[0, 0] <= leaks._CANDIDATE
        assert far(one, two) <= leaks.SAME


def test_patients_of_the_same_build_are_told_apart(chests):
    found = [of(volume) for volume in chests]
    assert min(far(a, b) for a, b in itertools.combinations(found, 2)) > leaks.SAME
    flat = [of(volume.max(0)[None]) for volume in chests]
    assert min(far(a, b) for a, b in itertools.combinations(flat, 2)) > leaks.SAME_FLAT
    slices = [[of(volume[i : i + 1]) for i in range(5, 25, 4)] for volume in chests[:4]]
    assert min(far(a, b) for x, y in itertools.combinations(slices, 2) for a in x for b in y) > leaks.NEIGHBOUR


def test_real_images(shared_data):
    import nibabel

    volumes = []
    for path in sorted((shared_data / "lesions" / "imagesTr").glob("*.nii.gz")):
        array = np.asarray(nibabel.load(path).dataobj, np.float32).transpose(2, 1, 0)
        low, high = np.quantile(array, (0.005, 0.995))
        step = max(1, array.shape[2] // 128)
        volumes.append(((array - low) / (high - low)).clip(0, 1)[:, ::step, ::step])
    assert len(volumes) == 3
    originals = [of(volume) for volume in volumes]
    assert min(far(a, b) for a, b in itertools.combinations(originals, 2)) > 4 * leaks.SAME
    for volume, original in zip(volumes, originals, strict=True):
        for change in CHANGES.values():
            assert far(original, of(change(volume))) <= leaks.SAME


def test_dicom_and_nifti_of_one_series_are_the_same(chests):
    volume = chests[0][..., None]
    turned = volume[::-1, :, ::-1].transpose(2, 1, 0, 3)
    affine = np.zeros((4, 4))
    affine[0, 0], affine[1, 1], affine[2, 2], affine[3, 3] = -1, 1, -5, 1
    one, two = prints.fingerprint(volume, AFFINE), prints.fingerprint(turned, affine)
    assert one.digest == two.digest and np.array_equal(one.hash, two.hash)
    oblique = AFFINE @ np.block([[np.array([[0.98, 0.1, 0], [-0.1, 0.98, 0.1], [0, -0.1, 0.98]]), np.zeros((3, 1))], [0, 0, 0, 1]])
    assert prints.upright(volume, oblique).shape == volume.shape


@pytest.mark.parametrize("shape", [(1, 5, 5, 1), (3, 1, 7, 2), (2, 300, 3, 1), (1, 1, 1, 1)])
def test_odd_shapes(shape):
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    found = prints.fingerprint(image, AFFINE)
    assert found.flat == (shape[0] == 1)
    if found.hash.size:
        assert far(found, found) == pytest.approx(0, abs=1e-5)
    assert prints.fingerprint(np.zeros(shape, np.float32)).hash.size == 0


# --- datasets -----------------------------------------------------------------------------------------------------------
def record(name, image, patient=None):
    return Record(
        id=f"{name:0>16}", patient=f"{patient if patient is not None else name:0>16}",
        image=np.asarray(image, np.float32)[..., None], mask=None, affine=AFFINE, modality="CT",
    )  # fmt: skip


def write(folder, splits, projection="none"):
    """A dataset whose patients are in the given splits: {split: [records]}."""
    split_of = {record.id: split for split, records in splits.items() for record in records}
    manifest = write_dataset(
        folder, [r for records in splits.values() for r in records], "unlabelled", (),
        PreprocessConfig(intensity="none", projection=projection), SplitConfig(val=0, test=0), ShardConfig(compression="none"),
    )  # fmt: skip
    samples = tuple(sample.model_copy(update={"split": split_of[sample.id]}) for sample in manifest.samples)
    manifests.save(folder, manifest.model_copy(update={"samples": samples}))
    return folder


def found(folder):
    return {(leak.kind, frozenset(sample.lstrip("0") for sample in leak.samples)) for leak in audits.audit(folder, Alone()).leaks}


def test_a_clean_dataset_passes(chests, tmp_path):
    folder = write(tmp_path / "data", {"train": [record("a", chests[0]), record("b", chests[1])], "val": [record("c", chests[2])], "test": [record("d", chests[3])]})
    result = run(dataset_command, "audit", folder)
    assert result.exit_code == 0 and "none found" in result.output and "identifiers" not in result.output
    report = json.loads(run(dataset_command, "audit", folder, "--json").stdout)
    assert report["passed"] and report["leaks"] == [] and report["identifiers"] is None
    assert report["rare_combinations"] == [{"modality": "CT", "site": "", "month": "", "patients": 4}]


def test_each_kind_of_leak_is_named(chests, tmp_path):
    a, b, c, d = chests[:4]
    folder = write(
        tmp_path / "data",
        {
            "train": [record("1", a), record("2", b), record("3", c), record("7", c)],
            "val": [record("4", d, patient="1")],
            "test": [record("5", b), record("6", CHANGES["one voxel"](c))],
        },
    )
    assert found(folder) == {
        ("same patient", frozenset("14")), ("same pixels", frozenset("25")),
        ("same image", frozenset("36")), ("same image", frozenset("76")),
    }  # fmt: skip
    result = run(dataset_command, "audit", folder, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 4 and not report["passed"] and report["repeated_in_a_split"] == 1
    (pixels,) = [leak for leak in report["leaks"] if leak["kind"] == "same pixels"]
    assert pixels["splits"] in (["train", "test"], ["test", "train"]) and pixels["distance"] == 0
    text = run(dataset_command, "audit", folder).output
    assert "same pixels: " in text and "(train)" in text and "4 leaks between splits" in text + run(dataset_command, "audit", folder).stderr


def test_neighbouring_frames(chests, tmp_path):
    fine = ndimage.zoom(chests[0], (3, 1, 1), order=1)  # frames as near as in a thin CT or a cine
    splits = {"train": [record("1", fine[40:41]), record("2", chests[1][10:11])], "test": [record("3", fine[41:42])]}
    assert {kind for kind, pair in found(write(tmp_path / "data", splits)) if pair == frozenset("13")} <= {"neighbouring frames", "same image"}
    assert {pair for _, pair in found(tmp_path / "data")} == {frozenset("13")}
    # Projections are no frames.
    splits = {"train": [record("1", chests[0].max(0)[None])], "test": [record("2", chests[1].max(0)[None])]}
    assert not found(write(tmp_path / "mip", splits, "mip"))


def visit(volume, seed, degrees=2.0):
    """The same anatomy on another day: the head lies otherwise, the coil is another one, and there is noise."""
    random = np.random.default_rng(seed)
    moved = ndimage.rotate(volume, degrees, (1, 2), reshape=False, order=1, mode="nearest")
    moved = ndimage.shift(moved, random.uniform(-1, 1, 3), order=1, mode="nearest")
    slope = np.linspace(0.9, 1.1, volume.shape[1])[None, :, None]
    return (moved * slope + random.normal(0, 0.03, volume.shape)).clip(0, 1)


def of_splits(volumes, visits):
    """Patients over the splits, and visits of the first ones, under other names, in test."""
    members = [record(f"{n:x}", volume) for n, volume in enumerate(volumes)]
    again = [record(f"{0xA0 + n:x}", visit(volumes[n], n)) for n in range(visits)]
    return {"train": members[: len(members) * 2 // 3], "test": [*members[len(members) * 2 // 3 :], *again]}


def patients(count, own):
    """Smooth fields (20, 30, 30) with something in common, and as much of their own."""
    random = np.random.default_rng(1)
    common = ndimage.gaussian_filter(random.normal(size=(20, 30, 30)), 3)
    fields = [own * ndimage.gaussian_filter(random.normal(size=common.shape), 3) + common for _ in range(count)]
    return [((field - field.min()) / np.ptp(field)).astype(np.float32) for field in fields]


def suspected(splits):
    """Pairs that would be suspected in a dataset of these records, without writing it."""
    members = [(split, each) for split, records in splits.items() for each in records]
    samples = [describe(each, 1, "shard", ShardConfig(chunk=(1, 1, 1)), split) for split, each in members]
    known = {each.id: prints.fingerprint(each.image, each.affine) for _, each in members}
    near: list[leaks.Nearest] = [{}, {}]  # as two ranks share the work
    for rank in (0, 1):
        for one, two, far in leaks.compared(samples, known, (rank, 2)):
            if leaks.same_image(one, two, far, flat=False) is None:
                leaks.note_near(near[rank], one.id, two.id, far)
    return {frozenset(id.lstrip("0") or "0" for id in leak.samples) for leak in leaks.like_anatomy(samples, leaks.merged(near))}


def test_visits_of_a_patient_in_two_splits_are_suspected(tmp_path):
    volumes = patients(24, own=1.0)
    splits = of_splits(volumes, 3)
    assert suspected(splits) == {frozenset({f"{n:x}", f"{0xA0 + n:x}"}) for n in range(3)}
    assert suspected(of_splits(volumes[:6], 1)) == set()  # too few to know what is usual
    folder = write(tmp_path / "data", splits)
    result = run(dataset_command, "audit", folder)
    assert result.exit_code == 0 and "perhaps one patient: " in result.output and "3 pairs of volumes" in result.output
    report = json.loads(run(dataset_command, "audit", folder, "--json").stdout)
    assert report["passed"] and all(0 < leak["distance"] < leak["usual"] for leak in report["suspicions"])


def test_patients_who_are_all_alike_are_not_suspected():
    """As synthetic chests, and images of single slices, are: nothing can be said of them."""
    volumes = patients(24, own=0.3)
    found = [far(of(one), of(two)) for one, two in itertools.combinations(volumes[:8], 2)]
    assert min(found) > leaks.SAME and np.median(found) < leaks.TELLING
    assert suspected(of_splits(volumes, 0)) == set()


@pytest.mark.shared
def test_real_patients_are_not_suspected_and_visits_are(shared_data):
    import nibabel

    volumes = []
    for path in sorted((shared_data / "hippocampus" / "imagesTr").glob("*.nii.gz"))[::4]:
        array = np.asarray(nibabel.load(path).dataobj, np.float32).transpose(2, 1, 0)
        low, high = np.quantile(array, (0.005, 0.995))
        volumes.append(((array - low) / (high - low)).clip(0, 1))
    pairs = suspected(of_splits(volumes, 12))
    expected = {frozenset({f"{n:x}", f"{0xA0 + n:x}"}) for n in range(12)}
    assert pairs <= expected and len(pairs) >= 9


def test_empty_images_are_not_alike(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 1, 9), (4, 9, 9))
    splits = {"train": [record("1", np.zeros((4, 8, 8))), record("2", ramp)], "test": [record("3", np.zeros((4, 8, 9)))]}
    assert not found(write(tmp_path / "data", splits))


def test_known_identifiers(chests, tmp_path):
    folder = write(tmp_path / "data", {"train": [record("1", chests[0])], "test": [record("2", chests[1])]})
    (tmp_path / "known").write_text("Mustermann^Erika\n\n19610708\n")
    result = run(dataset_command, "audit", folder, "--known", tmp_path / "known")
    assert result.exit_code == 0 and "identifiers: none found" in result.output
    (folder / "notes.txt").write_text("seen: ERIKA MUSTERMANN")
    result = run(dataset_command, "audit", folder, "--known", tmp_path / "known", "--json")
    assert result.exit_code == 4 and [f["identifier"] for f in json.loads(result.stdout)["identifiers"]] == [0]
    for text in (result.output, run(dataset_command, "audit", folder, "--known", tmp_path / "known").output):
        assert "uster" not in text.lower() and "1961" not in text
    result = run(dataset_command, "audit", folder, "--known", tmp_path / "nowhere")
    assert isinstance(result.exception, errors.ConfigError)


def test_any_number_of_ranks_finds_the_same(chests, tmp_path):
    folder = write(
        tmp_path / "data",
        {"train": [record(str(i), chests[i]) for i in range(4)], "test": [record("5", chests[1]), record("6", CHANGES["gamma"](chests[2]))]},
    )
    alone = audits.audit(folder, Alone())
    assert len(alone.leaks) == 2
    for report in Ranks(3).run(lambda rank: audits.audit(folder, rank)):
        assert report == alone


def test_a_damaged_shard_is_an_error(chests, tmp_path):
    folder = write(tmp_path / "data", {"train": [record("1", chests[0])], "test": [record("2", chests[1])]})
    shard = next(folder.glob("*.h5"))
    shard.write_bytes(shard.read_bytes()[:2000])
    assert isinstance(run(dataset_command, "audit", folder).exception, errors.DatasetError)
