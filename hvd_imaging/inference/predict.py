"""A model applied to new images: read, preprocess as ingest did, slide over the volume, bring the answer back.

What OUT becomes follows from its suffix:

=================  ==============================================  ===========================
OUT                segmentation                                    classification
=================  ==============================================  ===========================
``.dcm``           DICOM SEG of the input series                   refused
``.nii .nii.gz``   label map in the input's geometry               refused
``.csv``           volume of each class in ml                      probability of each class
no suffix          folder, a NIfTI for each sample of a dataset    refused
=================  ==============================================  ===========================

A DICOM SEG or label map is also written when nothing was found: an empty one says that the model has looked. No
identifier is written but into a DICOM SEG, which takes them from its source series.
"""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import __version__
from ..errors import ConfigError, RunError, SourceError
from ..files import atomic_folder, check_writable, write_text
from ..models.spec import ModelSpec
from ..preprocess.pipeline import preprocess
from ..shards import manifest as manifests
from ..shards.reader import ShardReader
from ..sources.dicom import SeriesFiles, read_series, scan_dicom
from ..sources.elements import walk
from ..sources.nifti import is_nifti_name, read_nifti, stem, write_nifti
from ..texts import plain_cell
from ..volume import Volume
from .predictors import Predictor
from .sliding import MEMORY_BYTES, Shape3, center_patch, sliding_window

InputKind = Literal["dicom", "nifti", "dataset"]
OutputKind = Literal["dcm", "nifti", "csv", "folder"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Answer:
    """The model's answer for one image.

    Attributes:
        id: pseudonym of a dataset's sample, else "input".
        volume: the input image, without its voxels' meaning for outputs: geometry and source files.
        labels: ``(D, H, W)`` uint8 on the grid of ``volume`` (segmentation), else None.
        probabilities: ``(K,)`` (classification), else None.
    """

    id: str
    volume: Volume
    labels: np.ndarray | None = None
    probabilities: np.ndarray | None = None

    def summary(self, classes: Sequence[str]) -> dict[str, Any]:
        """One row of a table: volumes in ml, or the predicted class and all probabilities."""
        if self.labels is None:
            assert self.probabilities is not None
            p = {f"p_{name}": float(value) for name, value in zip(classes, self.probabilities, strict=True)}
            return {"id": self.id, "predicted": classes[int(self.probabilities.argmax())], **p}
        voxels = np.bincount(self.labels.ravel(), minlength=len(classes))
        voxel_ml = abs(float(np.linalg.det(self.volume.affine[:3, :3]))) / 1000
        return {"id": self.id, **{f"{name}_ml": float(voxels[k]) * voxel_ml for k, name in enumerate(classes) if k}}


def predict(
    predictor: Predictor,
    source: str | Path,
    out: str | Path,
    force: bool = False,
    overlap: float | None = None,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Apply a model to a DICOM series folder, a NIfTI file or a dataset folder, and write ``out`` atomically.

    Args:
        predictor: the opened model.
        source: INPUT.
        out: OUT; its suffix says what is written, see the module's table.
        force: replace an existing ``out`` (a folder only if it holds nothing but NIfTI files).
        overlap: of the windows; None: the model's own.
        memory_bytes: budget of the whole process, the caller's own data in it. It changes the work done, never the result: where
            the sliding window does not fit beside what the process holds already, the volume is worked through in strips. None:
            only the sliding window is bounded.
        progress: called with (windows done, windows in all) for a volume, (samples done, in all) for a dataset.

    Returns:
        one row for each image, see `Answer.summary`.

    Raises:
        ConfigError: ``out`` cannot hold this model's answer for this input.
        RunError: ``out`` exists, the input's channels are not the model's, or the budget is too small.
        SourceError, DatasetError: the input cannot be used.
    """
    source, target, spec = Path(source), Path(out), predictor.spec
    kind = input_kind(source)
    if kind == "dicom":
        refuse_volumes(source, spec)
    form = output_kind(target, spec, kind)
    check_target(target, form, force)
    overlap = spec.overlap if overlap is None else overlap
    answers = _answers(predictor, source, kind, overlap, memory_bytes, progress, form)
    if form == "folder":
        rows = []
        with atomic_folder(target, replace=force) as folder:
            for answer in answers:
                assert answer.labels is not None
                write_nifti(folder / f"{answer.id}.nii.gz", answer.volume.with_array(answer.labels))
                rows.append(answer.summary(spec.classes))
        return rows
    if form == "csv":
        # Rows only: the volumes of a large dataset do not fit in memory together.
        rows = [answer.summary(spec.classes) for answer in answers]
        write_text(target, to_csv(rows))
        return rows
    (answer,) = answers
    assert answer.labels is not None
    if form == "dcm":
        from .dicom_seg import write_seg

        frames = answer.volume.frames
        assert frames is not None  # `check_source` has looked
        labels = back_to_grid(answer.labels, answer.volume.affine, frames.shape, frames.affine)
        write_seg(target, labels, answer.volume, spec.classes, f"{spec.model.name} {spec.run}", __version__)
    else:
        write_nifti(target, answer.volume.with_array(answer.labels))
    return [answer.summary(spec.classes)]


def input_kind(source: Path) -> InputKind:
    """What INPUT is.

    Raises:
        SourceError: nothing there, or a file that is not NIfTI by name.
    """
    source, part = folder_and_part(source)
    if part:
        return "dicom"
    if not source.exists():
        raise SourceError(f"{source}: no such file or folder; expected {_INPUTS}")
    if source.is_dir():
        return "dataset" if (source / manifests.NAME).is_file() else "dicom"
    if is_nifti_name(source):
        return "nifti"
    raise SourceError(f"{source}: expected {_INPUTS}; found another file (for DICOM give the folder of the series)")


def folder_and_part(source: Path) -> tuple[Path, str]:
    """INPUT as the folder of a series and the volume of it that is meant: ``FOLDER#echo 2``; else (INPUT, "")."""
    folder, separator, part = str(source).rpartition("#")
    if not separator or source.exists() or not Path(folder).is_dir():
        return source, ""
    return Path(folder), part.strip()


def refuse_volumes(folder: Path, spec: ModelSpec) -> None:
    """Say how a folder of NIfTI files is predicted, before anything else about it is said.

    Raises:
        SourceError: the folder holds NIfTI files, and no DICOM series.
    """
    volumes = [path for path in walk(folder) if is_nifti_name(path)]
    if not volumes or scan_dicom(folder).series:
        return
    first = volumes[0]
    suffix = first.name[len(stem(first)) :]
    answer = f'"$(basename "$f" {suffix})".' + ("csv" if spec.task == "classification" else "nii.gz")
    loop = f"for f in {shlex.quote(str(first.parent))}/*{suffix}; do hvd-imaging predict MODEL \"$f\" OUT/{answer}; done"
    raise SourceError(
        f"{folder}: {len(volumes)} NIfTI or NRRD files, expected one file, or the folder of one DICOM series; for all of them: "
        f"mkdir OUT; {loop}"
        + (f" (each file with the model's {spec.channels} channels as its last axis)" if spec.channels > 1 else "")
    )


_INPUTS = "a folder with one DICOM series, a NIfTI file (.nii, .nii.gz), or a dataset folder (manifest.json)"


def output_kind(out: Path, spec: ModelSpec, kind: InputKind) -> OutputKind:
    """What OUT becomes. Pure.

    Raises:
        ConfigError: this model's answer for this input cannot be written so.
    """
    name = out.name.lower()
    if name.endswith(".csv"):
        return "csv"
    if spec.task == "classification":
        raise ConfigError(f"OUT {out}: a classification model answers with a table, expected a name ending in .csv")
    if kind == "dataset":
        if out.suffix:
            raise ConfigError(
                f"OUT {out}: of a dataset there is one label map a sample, expected a folder (no suffix) or .csv"
            )
        return "folder"
    if name.endswith(".dcm"):
        if kind != "dicom":
            raise ConfigError(f"OUT {out}: a DICOM SEG refers to a DICOM series, but INPUT is NIfTI; expected .nii.gz or .csv")
        return "dcm"
    if name.endswith((".nii", ".nii.gz")):
        return "nifti"
    raise ConfigError(f"OUT {out}: expected a name ending in .dcm (DICOM SEG), .nii, .nii.gz or .csv")


def check_target(target: Path, form: OutputKind, force: bool) -> None:
    """Refuse to overwrite, before the long work begins.

    Raises:
        RunError: something is there that may not be replaced.
        SetupError: nothing can be written there.
    """
    _check_free(target, form, force)
    check_writable(target)


def _check_free(target: Path, form: OutputKind, force: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if form == "folder":
        if target.is_dir() and not target.is_symlink():
            held = list(target.iterdir())
            if not held or (force and all(is_nifti_name(path) and path.is_file() for path in held)):
                return
            if force:
                raise RunError(f"{target}: holds more than label maps, so --force does not replace it; choose another name")
    elif target.is_dir():
        raise RunError(f"{target}: is a folder, expected a file name; choose another")
    elif force:
        return
    raise RunError(f"{target}: exists already; replace it with --force, or choose another name")


def _answers(
    predictor: Predictor,
    source: Path,
    kind: InputKind,
    overlap: float,
    memory_bytes: int | None,
    progress: Progress | None,
    form: OutputKind,
) -> Iterator[Answer]:
    if kind == "dataset":
        yield from _dataset_answers(predictor, source, overlap, memory_bytes, progress)
        return
    spec = predictor.spec
    volume = (
        read_nifti(source, source.parent) if kind == "nifti" else read_only_series(*folder_and_part(source), spec.preprocess.units)
    )
    if form == "dcm":
        from .dicom_seg import check_source

        check_source(volume, spec.classes)
    yield answer_volume(predictor, volume, overlap, memory_bytes, progress)


def _dataset_answers(
    predictor: Predictor, source: Path, overlap: float, memory_bytes: int | None, progress: Progress | None
) -> Iterator[Answer]:
    manifest, spec = manifests.load(source), predictor.spec
    if manifest.preprocess != spec.preprocess:
        raise RunError(
            f"{source}: was preprocessed in another way than the model's training data, so its answers would mean "
            f"nothing: expected {spec.preprocess.model_dump(mode='json')}, found "
            f"{manifest.preprocess.model_dump(mode='json')}; ingest it with the same settings"
        )
    with ShardReader(source, manifest) as reader:
        for done, sample in enumerate(manifest.samples):
            image, _ = reader.read_whole(sample)
            ready = Volume(image, np.array(sample.affine, np.float64), modality=sample.modality, id=sample.id)
            labels, probabilities = apply(predictor, ready, overlap, memory_bytes)
            yield Answer(sample.id, ready, labels, probabilities)
            if progress is not None:
                progress(done + 1, len(manifest.samples))


def read_only_series(folder: Path, part: str = "", units: Literal["hu", "stored"] = "hu") -> Volume:
    """The one DICOM image series below ``folder``, in the units that the model was trained on.

    Args:
        part: which volume is meant, if the series holds several.

    Raises:
        SourceError: none, several, or one that cannot be read.
    """
    scan = scan_dicom(folder)
    if part or len({series.uid for series in scan.series}) < len(scan.series):
        scan = replace(scan, series=_only_part(folder, part, scan.series))
    if len(scan.series) == 1:
        if scan.rejected:
            # A file of the series itself may be among them: a mask of half a patient must not pass for a whole one.
            first = scan.rejected[0]
            raise SourceError(
                f"{folder}: {len(scan.rejected)} DICOM files cannot be read ({first.path}: {first.reason}); "
                "get them again, or move them out of the folder if they do not belong to the series"
            )
        return read_series(scan.series[0], units)
    if not scan.series:
        why = f"; {scan.rejected[0].path}: {scan.rejected[0].reason}" if scan.rejected else ""
        raise SourceError(f"{folder}: no DICOM image series in this folder or below ({scan.skipped} other files){why}")
    shown = ", ".join(
        f"{Path(series.files[0]).parent.relative_to(folder).as_posix()} ({', '.join(filter(None, _about(series)))})"
        for series in scan.series[:4]
    )
    more = ", ..." if len(scan.series) > 4 else ""
    raise SourceError(
        f"{folder}: expected one DICOM series, found {len(scan.series)}: {shown}{more}; give the folder of one series"
    )


def _about(series: SeriesFiles) -> tuple[str, ...]:
    return series.part, series.modality or "unknown", f"{len(series.files)} file{'s' * (len(series.files) != 1)}"


def _only_part(folder: Path, part: str, series: tuple[SeriesFiles, ...]) -> tuple[SeriesFiles, ...]:
    """The volumes that are called so; all of several series, if none is asked for, for the caller to refuse.

    Raises:
        SourceError: a series of several volumes, and it is not told which, or there is none of this name.
    """
    found = tuple(each for each in series if each.part == part) if part else series
    if found and (part or len({each.uid for each in series}) > 1):
        return found
    names = [each.part for each in series if each.part]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    if part:
        raise SourceError(f"{folder}: no volume '{part}' in this series, expected one of: {shown or 'it holds one only, so give the folder alone'}")
    raise SourceError(
        f"{folder}: expected one volume, found a series of {len(series)}: {shown}; say which one as '{folder}#{names[0]}', or ingest the folder "
        "with --task unlabelled and give the dataset, which answers for all"
    )


def answer_volume(
    predictor: Predictor,
    volume: Volume,
    overlap: float | None = None,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> Answer:
    """The answer for one source image, a label map on the image's own grid.

    Raises:
        RunError: another number of channels than the model's.
        SourceError: the image cannot be preprocessed.
    """
    ready, _ = preprocess(volume, None, predictor.spec.preprocess)
    overlap = predictor.spec.overlap if overlap is None else overlap
    labels, probabilities = apply(predictor, ready, overlap, memory_bytes, progress)
    if labels is not None:
        labels = back_to_grid(labels, ready.affine, volume.shape, volume.affine)
    return Answer("input", volume, labels, probabilities)


def apply(
    predictor: Predictor,
    ready: Volume,
    overlap: float,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(labels ``(D, H, W)`` uint8, None) or (None, probabilities ``(K,)``) for a preprocessed volume (D, H, W, C).

    Raises:
        RunError: another number of channels than the model's, or the budget is too small.
    """
    spec = predictor.spec
    if ready.array.shape[3] != spec.channels:
        raise RunError(f"the input has {ready.array.shape[3]} channels, the model expects {spec.channels}")
    if spec.task == "classification":
        return None, predictor(center_patch(ready.array, spec.patch)[None])[0]
    labels = sliding_window(
        predictor,
        ready.array,
        spec.patch,
        len(spec.classes),
        overlap=overlap,
        memory_bytes=_window_bytes(predictor, ready.array, memory_bytes),
        mode="labels",
        progress=progress,
    )
    return labels, None


def _window_bytes(predictor: Predictor, image: np.ndarray, memory_bytes: int | None) -> int:
    """What is left for the sliding window's accumulator."""
    if memory_bytes is None:
        return MEMORY_BYTES
    spec, shape = predictor.spec, (image.shape[0], image.shape[1], image.shape[2])
    left = window_bytes(memory_bytes, _held(), shape, spec.patch, len(spec.classes))
    if left is None:
        # It may be short, so it is looked at with what the runtime needs to compute.
        predictor(np.zeros((1, *spec.patch, spec.channels), np.float32))
        left = window_bytes(memory_bytes, _held(), shape, spec.patch, len(spec.classes), reserve=0)
        assert left is not None
    return left


def _held() -> int:
    import psutil

    return psutil.Process().memory_info().rss


RESERVE = 256 << 20
"""Bytes that a runtime may still take when it computes first."""


def window_bytes(
    memory_bytes: int, held: int, shape: Shape3, patch: Shape3, classes: int, reserve: int = RESERVE
) -> int | None:
    """Bytes that the accumulator of a sliding window may take. Pure.

    Args:
        memory_bytes: budget of the process.
        held: what it holds already.
        shape, patch: voxels (D, H, W).
        classes: K.
        reserve: to be left for the runtime.

    Returns:
        None if that is not enough for the whole width of the volume, so that ``held`` should be looked at more closely.

    Raises:
        RunError: without ``reserve``: not even one row of patches fits.
    """
    labels = int(np.prod(shape))
    row = min(patch[0], shape[0]) * shape[2] * classes * 4
    left = memory_bytes - held - labels - reserve
    if left >= shape[1] * row:
        return left
    if reserve:
        return None
    least = min(patch[1], shape[1]) * row
    if left < least:
        raise RunError(
            f"a memory budget of {memory_bytes / 2**20:.0f} MiB is too small: the process holds {held / 2**20:.0f} MiB (Python, runtime, "
            f"model, image), and a volume of {shape} voxels needs at least {(labels + least) / 2**20:.0f} MiB more; expected --memory-mb "
            f"{(held + labels + least >> 20) + 64} or more, or a runtime that is smaller (an export of format tflite-int8)"
        )
    return left


def back_to_grid(
    labels: np.ndarray, from_affine: np.ndarray, to_shape: tuple[int, int, int], to_affine: np.ndarray
) -> np.ndarray:
    """Labels ``(d, h, w)`` on another grid: the nearest voxel's class, 0 outside.

    Args:
        labels: integer class indices on the grid of ``from_affine``.
        from_affine, to_affine: ``(4, 4)``, voxel index to mm.
        to_shape: (D, H, W) of the result.

    Works slice by slice, so it needs little more memory than the result.
    """
    if labels.shape == tuple(to_shape) and np.allclose(from_affine, to_affine, rtol=0, atol=1e-6):
        return labels.copy()
    # Target index -> source index.
    matrix = np.linalg.inv(from_affine) @ to_affine
    h, w = np.meshgrid(np.arange(to_shape[1]), np.arange(to_shape[2]), indexing="ij")
    plane = h[..., None] * matrix[:3, 1] + w[..., None] * matrix[:3, 2] + matrix[:3, 3]
    limits = np.array(labels.shape)
    out = np.zeros(to_shape, labels.dtype)
    for d in range(to_shape[0]):
        # Rounding before the floor: at exact halves noise of the affine must not choose the side voxel by voxel.
        index = np.floor(np.round(plane + d * matrix[:3, 0], 6) + 0.5).astype(np.intp)
        inside = ((index >= 0) & (index < limits)).all(-1)
        a, b, c = index[inside].T
        out[d][inside] = labels[a, b, c]
    return out


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV text; numbers with 6 digits."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(plain_cell, rows[0]))
    for row in rows:
        writer.writerow(f"{value:.6g}" if isinstance(value, float) else plain_cell(value) for value in row.values())
    return file.getvalue()
