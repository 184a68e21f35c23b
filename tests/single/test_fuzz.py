"""Mutated files of every format that is read: each is read or refused by an error of ours, soon, and in bounded memory.

One process reads the files of one format, so that a crash of a library is seen, and one format's memory is not another's.
The suite tests some of each; ``-m long`` tests 500 of each; ``python tests/single/test_fuzz.py FORMAT COUNT SEED`` shows one.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

MOST_S = 10
MOST_MEMORY = 1 << 30

Read = Callable[[Path], object]


# --- mutations --------------------------------------------------------------------------------------------------------------


def flip(data: bytearray, random: np.random.Generator) -> bytes:
    for place in random.integers(0, len(data), random.integers(1, 12)):
        data[place] ^= 1 << int(random.integers(8))
    return bytes(data)


def near_the_start(data: bytearray, random: np.random.Generator) -> bytes:
    for place in random.integers(0, min(len(data), 1200), random.integers(1, 8)):
        data[place] = int(random.choice([0, 1, 0x7F, 0x80, 0xFF, random.integers(256)]))
    return bytes(data)


def number(data: bytearray, random: np.random.Generator) -> bytes:
    """Whole numbers of 2, 4 or 8 bytes that ask for much."""
    for _ in range(int(random.integers(1, 4))):
        size = int(random.choice([2, 4, 8]))
        at = int(random.integers(0, max(len(data) - size, 1)))
        if random.random() < 0.5:
            at = int(random.integers(0, max(min(len(data), 2000) - size, 1)))
        value = int(random.choice([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF])) & ((1 << 8 * size) - 1)
        data[at : at + size] = value.to_bytes(size, "little" if random.random() < 0.7 else "big")
    return bytes(data)


def cut(data: bytearray, random: np.random.Generator) -> bytes:
    return bytes(data[: random.integers(0, len(data))])


def drop(data: bytearray, random: np.random.Generator) -> bytes:
    start = int(random.integers(0, len(data)))
    del data[start : start + int(random.integers(1, 200))]
    return bytes(data)


def repeat(data: bytearray, random: np.random.Generator) -> bytes:
    start = int(random.integers(0, len(data)))
    piece = data[start : start + int(random.integers(1, 64))]
    return bytes(data[:start] + piece * int(random.choice([2, 10, 1000])) + data[start:])


def splice(data: bytearray, random: np.random.Generator) -> bytes:
    one, two = sorted(int(n) for n in random.integers(0, len(data), 2))
    size = int(random.integers(1, 64))
    data[one : one + size], data[two : two + size] = data[two : two + size], data[one : one + size]
    return bytes(data)


WORDS = [
    b"[" * 70, b"{" * 2000, b"[" * 100_000, b'{"a":' * 1000, b"9" * 400, b"1" * 6000, b"1e999", b"-1e999", b"NaN", b"-Infinity", b"-1", b"0", b"null",
    b"true", b'"', b"'", b"\x00", b"\x1b[31m", b"\r", b"\n", b"&a [*a]", b"&a ", b"*a", b"!!python/name:os.system ", b"!!binary ", b"? ", b"- ", b": ",
    b"\xff\xfe", b"\xef\xbb\xbf", "\u202e".encode(), b"../../etc/passwd", b"/dev/zero", b"%s%n", b"{0.__class__}", b"1:1:1:1", b"2026-13-45",
    b",,,,", b";", b"\t", b"=cmd|' /C calc'!A0", b"1099511627776", b"4294967296", b"-9223372036854775809", b"[[[", b"}", b"]", b"[]", b"{}",
]  # fmt: skip


def word(data: bytearray, random: np.random.Generator) -> bytes:
    """Words that a text's parser may trip over, in the place of a value or anywhere."""
    for _ in range(int(random.integers(1, 4))):
        start = int(random.integers(0, len(data)))
        marks = [at for at in (data.find(mark, start) for mark in (b": ", b", ", b"=", b",")) if at >= 0]
        at = min(marks) + 1 if marks and random.random() < 0.7 else start
        end = at if random.random() < 0.4 else at + int(random.integers(1, 12))
        data[at:end] = WORDS[int(random.integers(len(WORDS)))]
    return bytes(data)


BINARY = (flip, near_the_start, near_the_start, number, number, cut, drop, repeat, splice)
TEXT = (word, word, word, flip, cut, drop, repeat, splice)
HEADED = (*BINARY, word)  # a text before binary data


# --- formats: how valid files are made in a folder, which are mutated and how, and what reads them -----------------------------


def nifti(folder: Path, packed: bool = False) -> tuple[list[Path], Read]:
    import nibabel

    from hvd_imaging.sources.nifti import read_nifti

    paths = []
    for n, dtype in enumerate((np.int16, np.uint8, np.float32, np.float64)):
        image = nibabel.nifti1.Nifti1Image(np.random.default_rng(n).integers(0, 99, (12, 11, 10)).astype(dtype), np.diag([1.0, 2, 3, 1]))
        paths.append(folder / f"{n}.nii")
        image.to_filename(paths[-1])
    return paths, read_nifti


def nifti_gz(folder: Path) -> tuple[list[Path], Read]:
    """Mutated inside of an undamaged gzip stream, and outside."""
    from hvd_imaging.sources.nifti import read_nifti

    def read(path: Path) -> object:
        outer = path.with_name("packed.nii.gz")
        data = path.read_bytes()
        outer.write_bytes(data if data[:2] == b"\x1f\x8b" else gzip.compress(data, 1))
        return read_nifti(outer)

    paths, _ = nifti(folder)
    whole = folder / "whole.nii"
    whole.write_bytes(gzip.compress(paths[0].read_bytes()))
    return [*paths, whole], read


def nrrd(folder: Path) -> tuple[list[Path], Read]:
    from hvd_imaging.sources.nrrd import read_nrrd

    values = np.random.default_rng(0).integers(0, 9, (6, 7, 8)).astype("<i2")
    head = "NRRD0004\ntype: short\ndimension: 3\nsizes: 8 7 6\nencoding: {}\nendian: little\nspace: left-posterior-superior\n" \
        "space directions: (1,0,0) (0,1,0) (0,0,2)\nspace origin: (0,0,0)\nline skip: 0\nbyte skip: 0\n\n"  # fmt: skip
    bodies = {"raw": values.tobytes(), "gzip": gzip.compress(values.tobytes()), "bzip2": bz2.compress(values.tobytes())}
    paths = []
    for name, body in bodies.items():
        paths.append(folder / f"{name}.nrrd")
        paths[-1].write_bytes(head.format(name).encode() + body)
    return paths, read_nrrd


def dicom(folder: Path) -> tuple[list[Path], Read]:
    from test_dicom_fuzz import account, bases

    paths = []
    for n, data in enumerate(bases()):
        paths.append(folder / f"{n}.dcm")
        paths[-1].write_bytes(data)

    def read(path: Path) -> None:
        if account(path) != "read":
            raise expected()

    return paths, read


def shard(folder: Path) -> tuple[list[Path], Read]:
    from hvd_imaging.communicator import Alone
    from hvd_imaging.config import ShardConfig
    from hvd_imaging.shards.verify import verify
    from hvd_imaging.shards.writer import Record, write_dataset

    paths = []
    for n, compression in enumerate(("none", "lz4", "zstd", "gzip")):
        random = np.random.default_rng(n)
        mask = random.integers(0, 2, (6, 8, 9)).astype(np.uint8)
        record = Record(f"{n:016x}", "p", random.random((6, 8, 9, 1), np.float32), mask, np.eye(4), label=None)
        write_dataset(folder / compression, [record], "segmentation", ("background", "a"), shards=ShardConfig(compression=compression))
        paths.append(folder / compression / "shard-00000.h5")

    def read(path: Path) -> object:
        target = folder / path.parent.name / "shard-00000.h5"
        if path != target:
            target.write_bytes(path.read_bytes())
        if verify(target.parent, Alone()):
            raise expected()

    return paths, read


def weights(folder: Path) -> tuple[list[Path], Read]:
    import h5py

    from hvd_imaging.shards.plain import check_arrays

    with h5py.File(folder / "w.h5", "w") as file:
        for n in range(4):
            file.create_dataset(f"layers/conv{n}/vars/0", data=np.ones((3, 3, 2, 2), np.float32), chunks=(1, 1, 2, 2) if n % 2 else None)

    def read(path: Path) -> None:
        try:
            check_arrays(path)
        except ValueError as error:
            raise expected() from error

    return [folder / "w.h5"], read


def expected() -> Exception:
    from hvd_imaging.errors import RunError

    return RunError("refused")


def npz(folder: Path) -> tuple[list[Path], Read]:
    from hvd_imaging.training import checkpoint

    state = checkpoint.State([np.ones((2, 3), np.float32)], [np.int64(7), np.ones(4)], {"epoch": 2})
    checkpoint.save(folder / "a.npz", state)
    np.savez_compressed(folder / "b.npz", meta=np.frombuffer(b'{"sha256": ""}', np.uint8), **{"weight.0000": np.zeros((100, 100))})
    return [folder / "a.npz", folder / "b.npz"], checkpoint.load


def manifest(folder: Path) -> tuple[list[Path], Read]:
    from hvd_imaging.shards import manifest as manifests

    shard(folder)

    def read(path: Path) -> object:
        (folder / "read").mkdir(exist_ok=True)
        (folder / "read/manifest.json").write_bytes(path.read_bytes())
        found = manifests.load(folder / "read")
        return found.hash(), found.files_hash(), found.counts()

    return [folder / name / "manifest.json" for name in ("none", "zstd")], read


def contract():
    from hvd_imaging.config import ModelConfig, PreprocessConfig
    from hvd_imaging.models.spec import ModelSpec

    return ModelSpec(task="segmentation", classes=("a", "b"), patch=(8, 8, 8), channels=1, preprocess=PreprocessConfig(intensity="window"),
                     model=ModelConfig(name="unet3d"), dataset_hash="0" * 64, run="run")  # fmt: skip


def model(folder: Path) -> tuple[list[Path], Read]:
    """What a model's folder says of itself: model.json, export.json and a signature."""
    from hvd_imaging import keys
    from hvd_imaging.inference import exported
    from hvd_imaging.models.spec import ModelSpec

    spec = contract()
    place = folder / "model"
    place.mkdir()
    spec.save(place)
    (place / "model.onnx").write_bytes(b"onnx")
    exported.seal(place, spec, "onnx")
    (place / "sig.json").write_text('{"algorithm": "Ed25519", "signature": "' + "A" * 88 + '"}')

    def read(path: Path) -> object:
        target = place / path.name
        kept = target.read_bytes()
        target.write_bytes(path.read_bytes())
        try:
            try:
                return ModelSpec.load(place), exported.check(place), exported.measured_on(place), exported.listed_sums(place)
            finally:
                with contextlib.suppress(ValueError):
                    keys.read(place / "sig.json")
        finally:
            target.write_bytes(kept)

    return [place / "model.json", place / "export.json", place / "sig.json"], read


def description(folder: Path) -> tuple[list[Path], Read]:
    """dataset.json of an archive of NIfTI files, with patients."""
    import nibabel

    from hvd_imaging.sources.nifti import scan_nifti

    for n in range(3):
        for part in ("imagesTr", "labelsTr"):
            (folder / "in" / part).mkdir(parents=True, exist_ok=True)
            nibabel.nifti1.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)).to_filename(folder / "in" / part / f"c{n}.nii.gz")
    values = {
        "name": "x", "labels": {"0": "background", "1": "a"}, "modality": {"0": "MRI"}, "numTraining": 3,
        "training": [{"image": f"./imagesTr/c{n}.nii.gz", "label": f"./labelsTr/c{n}.nii.gz"} for n in range(3)], "patients": {"c0": "p0"},
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(values, indent=1))

    def read(path: Path) -> object:
        from hvd_imaging.sources.patients import of_description
        from hvd_imaging.texts import TextError, read_json

        (folder / "in/dataset.json").write_bytes(path.read_bytes())
        try:
            of_description(read_json(path))
        except TextError as error:
            raise expected() from error
        return scan_nifti(folder / "in")

    return [folder / "dataset.json"], read


def configuration(folder: Path) -> tuple[list[Path], Read]:
    from hvd_imaging.config import RunConfig, load

    (folder / "run.yaml").write_text(
        "data:\n  dataset: d\n  patch: [8, 8, 8]\nmodel: &m\n  name: unet3d\n  filters: 8\n"
        "train:\n  epochs: 3\n  learning_rate: 1.0e-3\n  seed: 7\noutput: {run_dir: runs/a}\n"
    )
    return [folder / "run.yaml"], lambda path: load(RunConfig, path)


def rows(folder: Path) -> tuple[list[Path], Read]:
    """Parameters of an array of jobs."""
    from hvd_imaging.cluster.submit import read_array

    (folder / "rows.yaml").write_text("- train.learning_rate: 0.1\n  train.epochs: 2\n- train.learning_rate: 0.01\n  train.epochs: 3\n")
    (folder / "grid.yaml").write_text("train.learning_rate: [0.1, 0.01]\ntrain.seed: [1, 2, 3]\n")
    run = folder / "run.yaml"
    run.write_text("data: {dataset: d}\nmodel: {name: unet3d}\n")
    return [folder / "rows.yaml", folder / "grid.yaml"], lambda path: read_array(path, folder / "run", run)


def table(folder: Path) -> tuple[list[Path], Read]:
    from hvd_imaging.planning.records import read_csv
    from hvd_imaging.sources.labels.table import read_labels_csv
    from hvd_imaging.sources.patients import of_csv
    from hvd_imaging.texts import read

    (folder / "labels.csv").write_text("PatientID,label\n" + "".join(f'P{n},"{n % 3}"\n' for n in range(20)))
    (folder / "cases.csv").write_text("case;patient\n" + "".join(f"c{n};p{n // 2}\n" for n in range(20)))
    (folder / "months.csv").write_text("month,gigabytes,studies\n" + "".join(f"2026-{n:02d},{n}.5,3\n" for n in range(1, 13)))
    readers = {"l": read_labels_csv, "c": lambda path: of_csv(read(path)), "m": read_csv}

    def read_one(path: Path) -> object:
        from hvd_imaging.texts import TextError

        try:
            return readers[path.name[0]](path)
        except TextError as error:
            raise expected() from error

    return [folder / "labels.csv", folder / "cases.csv", folder / "months.csv"], read_one


def logs(folder: Path) -> tuple[list[Path], Read]:
    """What a run writes while it goes: events, samples of the machines, signs of life, submissions."""
    from hvd_imaging.cluster.status import recent_events, submissions
    from hvd_imaging.monitoring.record import read as read_samples
    from hvd_imaging.training.events import epoch_records
    from hvd_imaging.training.heartbeat import read_beats

    run = folder / "run"
    for name in ("ranks", "slurm", "heartbeat"):
        (run / name).mkdir(parents=True)
    epoch = {"event": "epoch", "time": "2026-01-01T00:00:00+00:00", "epoch": 1, "step": 10, "loss": 0.5, "metrics": {}, "hosts": ["a"]}
    places = {
        "events.jsonl": "".join(json.dumps({**epoch, "epoch": n}) + "\n" for n in range(5)),
        "ranks/monitor-00000.jsonl": json.dumps({"time": "2026-01-01T00:00:00+00:00", "rank": 0, "cpu": 0.5, "gpu": [{"util": 1}]}) + "\n",
        "slurm/submit.json": json.dumps({"submissions": [{"time": "", "words": [], "jobs": [{"id": "1", "step": "train"}]}]}),
    }
    for name, text in places.items():
        (run / name).write_text(text)
    names = {Path(name).name: name for name in places}

    def read(path: Path) -> object:
        mutated = path.read_bytes()
        for name, text in places.items():  # the others are whole
            (run / name).write_text(text)
        (run / names[path.name]).write_bytes(mutated)
        return recent_events(run), epoch_records(run), read_samples(run), read_beats(run), submissions(run)

    return [run / name for name in places], read


def archive(folder: Path) -> tuple[list[Path], Read]:
    from hvd_imaging.sources import archives

    members = {f"case/{n}.dcm": bytes(range(256)) * 8 for n in range(6)}
    paths = []
    for name, method in (("stored.zip", zipfile.ZIP_STORED), ("packed.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(folder / name, "w", method) as file:
            for member, data in members.items():
                file.writestr(member, data)
        paths.append(folder / name)
    for name in ("a.tar", "a.tar.gz", "a.tar.xz", "a.tar.bz2"):
        with tarfile.open(folder / name, f"w:{name[6:]}") as file:
            for member, data in members.items():
                head = tarfile.TarInfo(member)
                head.size = len(data)
                file.addfile(head, io.BytesIO(data))
        paths.append(folder / name)
    return paths, lambda path: archives.opened(path, folder / "scratch")


def contained(folder: Path) -> tuple[list[Path], Read]:
    """The contract inside of a single model file: ONNX properties, and the ZIP behind a TFLite model."""
    from hvd_imaging.inference.exported import MEMBER, PROPERTY, metadata, read_metadata

    def field(number: int, data: bytes) -> bytes:
        size = len(data)
        length = bytearray()
        while size > 127:
            length.append(size & 127 | 128)
            size >>= 7
        return bytes([number << 3 | 2]) + bytes([*length, size]) + data

    text, other = (json.dumps(metadata(contract(), kind)).encode() for kind in ("onnx", "tflite"))
    (folder / "a.onnx").write_bytes(field(2, b"maker") + field(14, field(1, PROPERTY.encode()) + field(2, text)))
    with zipfile.ZipFile(folder / "a.tflite", "w") as file:
        file.writestr(MEMBER, other)
    return [folder / "a.onnx", folder / "a.tflite"], read_metadata


FORMATS: dict[str, tuple[Callable[[Path], tuple[list[Path], Read]], tuple]] = {
    "nifti": (nifti, BINARY), "nifti.gz": (nifti_gz, BINARY), "nrrd": (nrrd, HEADED), "dicom": (dicom, BINARY), "shard": (shard, BINARY),
    "weights": (weights, BINARY), "npz": (npz, HEADED), "archive": (archive, BINARY), "contained": (contained, HEADED),
    "manifest": (manifest, TEXT), "model": (model, TEXT), "description": (description, TEXT), "configuration": (configuration, TEXT), "rows": (rows, TEXT),
    "table": (table, TEXT), "logs": (logs, TEXT),
}  # fmt: skip


# --- one process a format -------------------------------------------------------------------------------------------------------


def peak() -> int:
    """Most bytes that this process and its children held."""
    return sum(resource.getrusage(who).ru_maxrss << 10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def run(name: str, count: int, seed: int) -> dict[str, object]:
    """Read ``count`` mutated files; what became of them."""
    from hvd_imaging.errors import HvdImagingError

    def late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    make, mutations = FORMATS[name]
    random = np.random.default_rng(seed)
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        paths, read = make(folder)
        valid = {path: path.read_bytes() for path in paths}
        for path in paths:
            try:
                read(path)
            except HvdImagingError:
                assert name in ("npz", "dicom"), f"{path.name} is not valid"
        before = peak()
        (folder / "mutated").mkdir()
        for number_ in range(count):
            path = paths[number_ % len(paths)]
            data = mutations[random.integers(len(mutations))](bytearray(valid[path]), random)
            target = folder / "mutated" / path.name if name != "shard" else folder / "mutated" / path.parent.name / path.name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(data)
            kept = Path(os.environ.get("HVD_FUZZ_KEEP", place)) / f"{name}-{number_}"
            begin = time.process_time()
            signal.alarm(3 * MOST_S)  # seconds of the wall: the machine may be busy
            try:
                read(target)
                outcomes["read"] += 1
            except HvdImagingError as error:
                outcomes["refused"] += 1
                if len(str(error)) > 2100 or "\x1b" in str(error) or "\0" in str(error):
                    faults.append(f"{number_}: message {str(error)[:100]!r}")
            except BaseException as error:
                faults.append(f"{number_} ({path.name}): {type(error).__name__}: {str(error)[:200]}")
                kept.write_bytes(data)
            finally:
                signal.alarm(0)
            spent = time.process_time() - begin
            if spent > MOST_S:
                faults.append(f"{number_}: {spent:.1f} s")
            slowest = max(slowest, spent)
    return {"outcomes": dict(outcomes), "faults": faults, "slowest_s": round(slowest, 2), "more_memory": peak() - before}


def fuzz(name: str, count: int, seed: int) -> dict:
    done = subprocess.run([sys.executable, __file__, name, str(count), str(seed)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"signal or exit code {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def judge(found: dict, count: int) -> None:
    assert found["faults"] == []
    assert sum(found["outcomes"].values()) == count and found["outcomes"].get("refused", 0) > 0
    assert found["more_memory"] < MOST_MEMORY, found


@pytest.mark.parametrize("name", FORMATS)
def test_some_mutated_files(name):
    judge(fuzz(name, 60, 1), 60)


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_many_mutated_files(name):
    judge(fuzz(name, 500, 2), 500)


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
