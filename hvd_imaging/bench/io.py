"""`bench io`: reading patches and volumes from shards, against raw reads and the formats that others train from.

The same made volumes (CT-like: smooth, with noise) lie in every format. All systems read the same boxes, in processes of their
own, in turn; each counts with its best thread count and its best settings. Rates are bytes of the voxels that were asked for,
in the stored type, however many bytes a format had to touch for them.

Warm: the files were read before. Cold: the system was asked to drop them from its page cache (POSIX_FADV_DONTNEED after
fsync), which is advice: a filesystem may keep them.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import HvdImagingError
from .io_peers import FORMATS, Request, Triple, missing
from .processes import clean_environment, run_at_once
from .report import Figure, Row

PATCH = (64, 64, 64)
MODES = ("aligned", "random", "whole")
STEP_MS, BATCH = 323.0, 7
"""Time of a training step and its batch: U-Net 3D on an H100 in MLPerf Storage (configs/dlio/workload/unet3d_h100.yaml)."""
SAMPLE_BYTES = 146_600_628
"""Mean of a sample there; it asks for a utilisation of 0.9."""
SEED = 20


@dataclass(frozen=True)
class System:
    """One line of the comparison.

    Attributes:
        name: for people.
        variants: settings of which the best counts: keys of `FORMATS` to what people read.
        quick: the variants with ``--quick``; empty: all.
    """

    name: str
    variants: Mapping[str, str]
    quick: tuple[str, ...] = ()

    def keys(self, quick: bool) -> tuple[str, ...]:
        """The formats that are measured."""
        return self.quick if quick and self.quick else tuple(self.variants)


def _grid(compression: str) -> dict[str, str]:
    return {
        f"h5py-{compression}-{chunk}-{cache}": f"chunks {chunk}^3, cache {cache} MiB"
        for chunk in (16, 32, 64)
        for cache in (1, 8)
    }


OURS = {"blosc": "hvd_imaging, Blosc", "none": "hvd_imaging, uncompressed"}
SYSTEMS = {
    "blosc": System(OURS["blosc"], {"ours-lz4": ""}),
    "none": System(OURS["none"], {"ours-none": ""}),
    "raw": System("raw preadv, as many bytes", {"raw": ""}),
    "h5py-ours": System("plain h5py, our Blosc file", {"h5py-ours": ""}),
    "h5py-blosc": System("h5py, Blosc", _grid("blosc"), ("h5py-blosc-32-1", "h5py-blosc-64-8")),
    "h5py-none": System("h5py, uncompressed", _grid("none"), ("h5py-none-32-1",)),
    "gzip": System("h5py, gzip by slice", {"h5py-gzip": ""}),
    "npy": System(".npy memmap", {"npy": ""}),
    "tfrecord": System("TFRecord, tf.data", {"tfrecord": ""}),
    "zarr-blosc": System(
        "Zarr, Blosc", {"zarr-blosc-32": "chunks 32^3", "zarr-blosc-64": "chunks 64^3"}, ("zarr-blosc-64",)
    ),
    "zarr-none": System(
        "Zarr, uncompressed", {"zarr-none-32": "chunks 32^3", "zarr-none-64": "chunks 64^3"}, ("zarr-none-64",)
    ),
    "blosc2": System(
        "blosc2, nnU-Net's layout",
        {"blosc2-zstd": "Zstd 8", "blosc2-lz4": "LZ4", "blosc2-lz4-inside": "LZ4, Blosc's threads"},
        ("blosc2-lz4", "blosc2-lz4-inside"),
    ),
}
PEERS = {"Blosc": ("h5py-blosc", "zarr-blosc", "blosc2"), "uncompressed": ("h5py-none", "npy", "tfrecord", "zarr-none")}
"""Formats that our Blosc and our uncompressed shards are compared with at random places."""


@dataclass(frozen=True)
class Measured:
    """Runs of one variant in one case.

    Attributes:
        runs: MB/s of needed bytes.
        samples_per_mb: patches or volumes in a megabyte of needed bytes.
    """

    system: str
    variant: str
    mode: str
    warmth: str
    threads: int
    runs: list[float]
    samples_per_mb: float

    @property
    def value(self) -> float:
        """MB/s, the median."""
        return statistics.median(self.runs)


def fastest(found: Sequence[Measured]) -> Measured | None:
    """By the median; None of none."""
    return max(found, key=lambda m: m.value) if found else None


@dataclass
class Results:
    """Everything that was measured.

    Attributes:
        absent: system to the reason why it was not measured.
        at_once: (system, processes) to MB/s of all together, a run each.
        counted: system to bytes of read calls over bytes needed, random places, a run each.
        amplification: expected bytes read over bytes needed, or None.
    """

    measured: list[Measured] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    at_once: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    counted: dict[str, list[float]] = field(default_factory=dict)
    amplification: float | None = None

    def best(self, system: str, mode: str, warmth: str = "warm", threads: int | None = None) -> Measured | None:
        """The fastest variant and thread count (or that one)."""
        found = [
            m
            for m in self.measured
            if (m.system, m.mode, m.warmth) == (system, mode, warmth) and threads in (None, m.threads)
        ]
        return fastest(found)

    def add(self, system: str, variant: str, found: Mapping[str, Any], need: Mapping[str, tuple[int, int]]) -> None:
        """Take in what a worker printed; ``need``: mode to bytes and number of a pass's requests."""
        for warmth in ("warm", "cold"):
            for mode, times in found[warmth].items():
                size, count = need[mode]
                for threads, seconds in times.items():
                    key = (system, variant, mode, warmth, int(threads))
                    for known in self.measured:
                        if (known.system, known.variant, known.mode, known.warmth, known.threads) == key:
                            break
                    else:
                        known = Measured(*key, runs=[], samples_per_mb=1e6 * count / size)
                        self.measured.append(known)
                    known.runs.append(size / 1e6 / seconds)


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4, ... up to the cores; 2 in any case, for the figures are about it."""
    return [1 << power for power in range(max(cores, 2).bit_length())]


def requests(shapes: Sequence[Sequence[int]], count: int, patch: Triple = PATCH, seed: int = SEED) -> dict[str, list[Request]]:
    """What every system reads: ``count`` patches at multiples of the patch and at random places, and every volume whole.

    Args:
        shapes: (D, H, W, ...) of the volumes; a patch is at most as large as its volume.
    """
    draw = random.Random(seed)
    found: dict[str, list[Request]] = {mode: [] for mode in MODES}
    for mode in ("aligned", "random"):
        for _ in range(count):
            volume = draw.randrange(len(shapes))
            sides = _triple([min(p, n) for p, n in zip(patch, shapes[volume], strict=False)])
            step = sides if mode == "aligned" else (1, 1, 1)
            start = [s * draw.randrange((n - p) // s + 1) for s, n, p in zip(step, shapes[volume], sides, strict=False)]
            found[mode].append((volume, _triple(start), sides))
    found["whole"] = [(volume, (0, 0, 0), _triple(shape)) for volume, shape in enumerate(shapes)]
    return found


def needed(asked: Mapping[str, Sequence[Request]], voxel_bytes: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Bytes and number of the requests of each mode; ``voxel_bytes`` of each volume, all channels."""
    return {
        mode: (sum(math.prod(shape) * voxel_bytes[volume] for volume, _, shape in found), len(found))
        for mode, found in asked.items()
    }


def utilisation(step_s: float, batch: int, samples_per_s_per_reader: float, readers: int) -> float:
    """Share of the time in which an accelerator computes if it waits for nothing but reading, read ahead.

    Args:
        step_s: seconds of a step without any wait.
        batch: samples of a step.
    """
    return min(1.0, readers * samples_per_s_per_reader * step_s / batch)


def made_volume(number: int, side: int) -> np.ndarray:
    """int16 ``(side, side, side)``, CT-like: smooth, and noise of 20 units."""
    z, y, x = np.meshgrid(*[np.arange(side, dtype=np.float32) / side] * 3, indexing="ij", sparse=True)
    smooth = 1000 * np.sin(6 * x) * np.cos(5 * y) * np.sin(4 * z) * (1 + 0.1 * number)
    noise = np.random.default_rng(number).standard_normal(smooth.shape, np.float32)
    return (smooth + 20 * noise).astype(np.int16)


def figures(results: Results) -> list[Figure]:
    """The figures of the benchmark; pure."""
    best = results.best
    bare = best("none", "aligned")
    raw = best("raw", "aligned", threads=bare.threads) if bare else None
    two = best("blosc", "aligned", threads=2)
    random_blosc, random_bare = best("blosc", "random"), best("none", "random")
    found = [
        Figure("uncompressed aligned / raw pread, same threads", _ratio(bare, raw), 0.85, "higher"),
        Figure("Blosc, 2 threads / plain h5py on the same file", _ratio(two, best("h5py-ours", "aligned")), 1.8, "higher"),
        Figure("Blosc / gzip by slice", _ratio(two, best("gzip", "aligned")), 60, "higher"),
        Figure("random patches / best h5py settings", _ratio(random_blosc, best("h5py-blosc", "random")), 2, "higher"),
    ]
    for name, mine in (("Blosc", random_blosc), ("uncompressed", random_bare)):
        rivals = [rival for system in PEERS[name] if (rival := best(system, "random"))]
        found.append(Figure(f"random patches / fastest peer format, {name}", _ratio(mine, fastest(rivals)), 1, "higher"))
    if results.amplification is not None:
        found.append(Figure("bytes read / bytes needed, random patch", results.amplification, 1.6, "lower"))
    return found


def rows(results: Results, step_ms: float = STEP_MS) -> list[Row]:
    """Every case by threads, samples a second at the best, processes at once, and what an accelerator gets; pure."""
    found: list[Row] = []
    systems = {key: system.name for key, system in SYSTEMS.items()}
    systems["dataset"] = "hvd_imaging, DATASET"
    for warmth in ("warm", "cold"):
        for mode in MODES:
            present = [m for m in results.measured if (m.mode, m.warmth) == (mode, warmth)]
            for threads in sorted({m.threads for m in present}):
                case = _case(mode, warmth, threads)
                for key in systems:
                    if best := results.best(key, mode, warmth, threads):
                        name = _named(systems[key], key, best.variant)
                        found.append(Row(case, name, "needed bytes", "MB/s", _round(best.runs)))
                        per_s = _round([run * best.samples_per_mb for run in best.runs])
                        found.append(Row(case, name, "samples", "/s", per_s))
    found += [Row(_case("random", "warm", 1), systems[key], "needed bytes", "MB/s", (), why) for key, why in results.absent.items()]
    for (key, count), runs in results.at_once.items():
        found.append(Row(f"random, warm, {count} processes, 1 thread each", systems[key], "needed bytes", "MB/s", _round(runs)))
    for key, shares in results.counted.items():
        if any(shares):
            found.append(Row(_case("random", "warm", 1), systems[key], "bytes of read calls / bytes needed", "", _round(shares)))
    return found + _accelerator(results, systems, step_ms)


def _accelerator(results: Results, systems: Mapping[str, str], step_ms: float) -> list[Row]:
    found = []
    for warmth in ("warm", "cold"):
        for key in ("blosc", "none", "dataset"):
            for mode, size in (("random", None), ("whole", SAMPLE_BYTES)):
                if best := results.best(key, mode, warmth):
                    per_mb = best.samples_per_mb if size is None else 1e6 / size
                    shares = [utilisation(step_ms / 1e3, BATCH, run * per_mb, 1) for run in best.runs]
                    what = "random patches" if size is None else f"samples of {size / 1e6:.0f} MB"
                    case = f"step {step_ms:g} ms, batch {BATCH}, {what}, {warmth}, 1 process, {best.threads} threads"
                    found.append(Row(case, systems[key], "accelerator utilisation", "", _round(shares)))
    return found


def _case(mode: str, warmth: str, threads: int) -> str:
    return f"{mode}, {warmth}, {threads} thread{'s' if threads > 1 else ''}"


def _named(system: str, key: str, variant: str) -> str:
    settings = SYSTEMS[key].variants[variant] if key in SYSTEMS else ""
    return f"{system} ({settings})" if settings else system


def _ratio(above: Measured | None, below: Measured | None) -> float | None:
    return above.value / below.value if above and below else None


def _round(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.5g}") for value in values)


def _triple(values: Sequence[int]) -> Triple:
    d, h, w = values[:3]
    return d, h, w


def measure(
    dataset: str | Path | None = None,
    quick: bool = False,
    step_ms: float = STEP_MS,
    on_run: Callable[[str], None] | None = None,
) -> tuple[list[Row], list[Figure]]:
    """Write the volumes in all formats to a temporary folder (TMPDIR names the disk) and read them.

    Args:
        dataset: measured beside them: its train samples, patches of at most 64^3.
        quick: one run of three volumes, fewer settings.
        step_ms: of the accelerator that reading must feed.
        on_run: told before each process.

    Raises:
        HvdImagingError: reading our own shards failed, or the dataset cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="hvd-bench-io-") as folder:
        bench = Bench(Path(folder), quick, on_run or (lambda _: None))
        if dataset is not None:
            bench.take(Path(dataset))
        bench.make()
        for turn in range(1 if quick else 3):
            bench.round(turn)
        return rows(bench.results, step_ms), figures(bench.results)


class Bench:
    """The runs of one measurement, in a folder of its own.

    Args:
        side: voxels of the made volumes along each axis.
        systems: keys of `SYSTEMS`.
    """

    def __init__(
        self,
        folder: Path,
        quick: bool,
        note: Callable[[str], None],
        side: int = 192,
        systems: Sequence[str] = tuple(SYSTEMS),
    ) -> None:
        self.folder, self.quick, self.note, self.side = folder, quick, note, side
        self.systems = list(systems)
        self.results = Results()
        self.threads = thread_counts(len(os.sched_getaffinity(0)))
        self.patch = _triple([min(p, side) for p in PATCH])
        count = 3 if quick else 6
        self.asked = requests([(side,) * 3] * count, 32 if quick else 96, self.patch)
        self.need = needed(self.asked, [2] * count)
        self.volumes = [folder / f"volume{i}.npy" for i in range(count)]
        self.dataset: Path | None = None

    def take(self, dataset: Path) -> None:
        """Measure this dataset too; at most 16 of its train samples."""
        from ..shards.manifest import load

        samples = load(dataset).of_split("train")[:16]
        if not samples:
            raise HvdImagingError(f"bench io: {dataset} has no train samples; ingest with a smaller split.val, split.test")
        self.dataset = dataset
        self.dataset_asked = requests([sample.shape for sample in samples], 32 if self.quick else 96)
        voxel = [sample.shape[3] * np.dtype(sample.dtype).itemsize for sample in samples]
        self.dataset_need = needed(self.dataset_asked, voxel)

    def make(self) -> None:
        """Write the volumes in every format and compare what it reads; peers that fail are left out, with the reason."""
        for number, path in enumerate(self.volumes):
            np.save(path, made_volume(number, self.side))
        for system in list(self.systems):
            for key in SYSTEMS[system].keys(self.quick):
                if why := missing(FORMATS[key]) or self._make(key, system):
                    self.results.absent[system] = why
                    self.systems.remove(system)
                    break
        # Either cut, as planned for the made volumes: the larger counts.
        expected = [_amplification(self._store(f"ours-{kind}") / "data") for kind in ("lz4", "none") if self._made(kind)]
        self.results.amplification = max(expected, default=None)

    def _made(self, kind: str) -> bool:
        return (self._store(f"ours-{kind}") / "data").is_dir()

    def _make(self, key: str, system: str) -> str:
        self.note(f"write: {SYSTEMS[system].name} {SYSTEMS[system].variants[key]}".rstrip())
        job: dict[str, Any] = {"format": key, "folder": str(self._store(key)), "patch": self.patch}
        job["volumes"] = [str(path) for path in self.volumes]
        try:
            if not self._store(key).exists():
                self._run([job | {"action": "write", "requests": {}}])
            self._run([job | {"action": "check", "requests": self.asked}])
        except HvdImagingError as error:
            if system in OURS:
                raise
            return str(error)
        return ""

    def round(self, turn: int) -> None:
        """Each system once; the order turns round, so that none always runs in another's wake."""
        order = [(system, key) for system in self.systems for key in SYSTEMS[system].keys(self.quick)]
        for system, key in order if turn % 2 == 0 else reversed(order):
            self.note(f"round {turn + 1}: {SYSTEMS[system].name} {SYSTEMS[system].variants[key]}".rstrip())
            self._read(system, key, self._store(key), self.asked, self.need)
        if self.dataset:
            self.note(f"round {turn + 1}: {self.dataset}")
            self._read("dataset", "dataset", self.dataset, self.dataset_asked, self.dataset_need)
        for system in [key for key in OURS if key in self.systems]:
            for count in self.threads[1:2] if self.quick else self.threads[1:]:
                self.note(f"round {turn + 1}: {SYSTEMS[system].name}, {count} processes")
                self._at_once(system, count, turn)

    def _read(
        self, system: str, key: str, store: Path, asked: Mapping[str, Sequence[Request]], need: Mapping[str, tuple[int, int]]
    ) -> None:
        seconds = 0.1 if self.quick else 0.4
        job: dict[str, Any] = {"action": "read", "format": key, "folder": str(store), "requests": asked}
        (found,) = self._run([job | {"threads": self.threads, "seconds": seconds, "cold": True}])
        self.results.add(system, key, found, need)
        if system in (*OURS, "dataset"):
            self.results.counted.setdefault(system, []).append(found["read"]["random"] / need["random"][0])

    def _at_once(self, system: str, count: int, turn: int) -> None:
        (key,) = SYSTEMS[system].variants
        place = self.folder / f"at-once-{system}-{count}-{turn}"
        place.mkdir()
        job: dict[str, Any] = {"action": "at_once", "format": key, "folder": str(self._store(key)), "place": str(place)}
        job |= {"ranks": count, "requests": {"random": self.asked["random"]}, "seconds": 0.2 if self.quick else 0.6}
        found = self._run([job | {"rank": rank} for rank in range(count)])
        rate = sum(self.need["random"][0] / 1e6 / each["seconds"] for each in found)
        self.results.at_once.setdefault((system, count), []).append(rate)

    def _store(self, key: str) -> Path:
        return self.folder / FORMATS[key].store

    def _run(self, jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        commands = []
        for number, job in enumerate(jobs):
            path = self.folder / f"job{number}.json"
            path.write_text(json.dumps(job), encoding="utf-8")
            commands.append([sys.executable, "-m", "hvd_imaging.bench.io_worker", str(path)])
        printed = run_at_once(commands, clean_environment(os.environ), 600)
        return [json.loads(text.splitlines()[-1]) for text in printed]


def _amplification(dataset: Path) -> float:
    """Largest of the dataset's samples."""
    from ..shards.chunks import expected_amplification
    from ..shards.manifest import load

    return max(expected_amplification(sample.block, PATCH, sample.shape) for sample in load(dataset).samples)
