"""What an archive holds, as cases with their labels: the one place where sources and labels meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import SourceError
from ..volume import Volume
from .dicom import DicomScan, Rejected, SeriesFiles, Units, read_series, relative, scan_dicom
from .labels import LabelTable, read_labels_csv, read_nifti_mask, read_seg_mask, seg_classes
from .nifti import NiftiCase, NiftiScan, read_case, scan_nifti

TASKS = ("segmentation", "classification", "unlabelled")
LABELS = "labels.csv"

__all__ = ["LABELS", "TASKS", "Case", "Catalog", "Rejected", "load_case", "scan"]


@dataclass(frozen=True)
class Case:
    """One image with what is known about it. ``source_id`` and ``patient_id`` are raw: for memory only, never written.

    Attributes:
        source_id: SeriesInstanceUID, or the NIfTI case's name.
        patient_id: PatientID, or the NIfTI case's name.
        modality: DICOM Modality, "" if unknown.
        label: class index for classification, else None.
        mask: DICOM SEG or NIfTI files for segmentation.
    """

    source_id: str = field(repr=False)
    patient_id: str = field(repr=False)
    modality: str
    label: int | None
    kind: Literal["dicom", "nifti"]
    image: SeriesFiles | NiftiCase
    mask: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Catalog:
    """All cases of an archive.

    Attributes:
        task: segmentation, classification or unlabelled.
        classes: names; index 0 is the background for segmentation; empty if unlabelled.
        cases: sorted by ``source_id``.
        rejected: inputs that can not be used, with the reason.
        notes: what the user should know about the archive as a whole.
    """

    task: str
    classes: tuple[str, ...]
    cases: tuple[Case, ...]
    rejected: tuple[Rejected, ...]
    notes: tuple[str, ...] = ()


def scan(
    root: Path,
    labels_csv: Path | None = None,
    task: str | None = None,
    on_file: Callable[[Path], None] | None = None,
    dicom: DicomScan | None = None,
) -> Catalog:
    """Find the images below ``root`` and what labels them; reads headers only.

    Args:
        labels_csv: labels for classification; without it, ``root/labels.csv`` is used if the task is classification, or
            not given and there are no masks.
        task: one of `TASKS`; None: segmentation if there are masks, classification if there is a CSV, else unlabelled.
        dicom: what `scan_dicom` would find, if it is known.

    Raises:
        SourceError: no DICOM or NIfTI in the folder, a label for an unknown patient, no labels for the asked task, or
            DICOM and NIfTI mixed.
    """
    root = Path(root)
    if task is not None and task not in TASKS:
        raise SourceError(f"task '{task}': expected one of {', '.join(TASKS)}")
    if not root.is_dir():
        raise SourceError(f"{root}: expected a folder with DICOM or NIfTI files, found {_what(root)}")
    nifti = scan_nifti(root)
    dicom = scan_dicom(root, on_file) if dicom is None else dicom
    if dicom.series and nifti.cases:
        raise SourceError(
            f"{root}: DICOM ({len(dicom.series)} series) and NIfTI ({len(nifti.cases)} cases) in one folder; "
            "ingest them apart"
        )
    if not dicom.series and not nifti.cases:
        reason = ""
        if dicom.rejected:
            reason = f"; {len(dicom.rejected)} DICOM files can not be read, {dicom.rejected[0].path}: {dicom.rejected[0].reason}"
        raise SourceError(
            f"{root}: no DICOM or NIfTI images in this folder or below ({dicom.skipped} other files, "
            f"{dicom.others + len(dicom.segmentations)} DICOM objects without an image){reason}"
        )
    table = _labels(root, labels_csv, task, has_masks=bool(dicom.segmentations or any(c.label for c in nifti.cases)))
    if task is None:
        task = "classification" if table else "segmentation" if _has_masks(dicom, nifti) else "unlabelled"
    if task == "segmentation" and labels_csv is not None:
        raise SourceError(f"{Path(labels_csv).name}: labels from a CSV are for classification, but the task is segmentation")
    build = _from_dicom if dicom.series else _from_nifti
    cases, classes, rejected = build(dicom, nifti, task)
    if table is not None:
        cases, missing = _apply_labels(cases, table)
        classes, rejected = table.classes, [*rejected, *missing]
    if task == "segmentation" and not cases and not _has_masks(dicom, nifti):
        raise SourceError(
            f"{root}: no masks for segmentation: expected DICOM SEG objects that refer to the series, or labelsTr with "
            "dataset.json; use --task unlabelled for images alone"
        )
    rejected = sorted([*rejected, *dicom.rejected, *nifti.rejected], key=lambda item: item.path)
    return Catalog(
        task, classes, tuple(sorted(cases, key=lambda case: case.source_id)), tuple(rejected), dicom.notes
    )


def load_case(case: Case, catalog: Catalog, units: Units = "hu") -> tuple[Volume, np.ndarray | None]:
    """Read a case: image ``(D, H, W[, C])`` float32, and for segmentation its mask, uint8 ``(D, H, W)`` class indices.

    Raises:
        SourceError: the image or the mask can not be used.
    """
    if isinstance(case.image, NiftiCase):
        volume = read_case(case.image)
        if catalog.task != "segmentation":
            return volume, None
        return volume, read_nifti_mask(case.mask[0], volume, catalog.classes, case.image.root)
    volume = read_series(case.image, units)
    if catalog.task != "segmentation":
        return volume, None
    mask = np.zeros(volume.shape, np.uint8)
    for path in case.mask:
        part = read_seg_mask(path, volume, catalog.classes, case.image.root)
        np.copyto(mask, part, where=part > 0)
    return volume, mask


def _what(root: Path) -> str:
    return "a file" if root.exists() else "nothing"


def _has_masks(dicom: DicomScan, nifti: NiftiScan) -> bool:
    known = {series.uid for series in dicom.series}
    return any(known & set(seg.series) for seg in dicom.segmentations) or any(case.label for case in nifti.cases)


def _labels(root: Path, labels_csv: Path | None, task: str | None, has_masks: bool) -> LabelTable | None:
    """The table to use; an explicit CSV speaks for classification unless the task says otherwise."""
    if task not in (None, "classification"):
        return None
    if labels_csv is not None:
        if not Path(labels_csv).is_file():
            raise SourceError(f"{labels_csv}: expected a CSV of labels, found {_what(Path(labels_csv))}")
        return read_labels_csv(Path(labels_csv))
    if (root / LABELS).is_file() and (task == "classification" or not has_masks):
        return read_labels_csv(root / LABELS)
    if task == "classification":
        raise SourceError(
            f"{root}: no labels for classification: expected {LABELS} in this folder, or --labels FILE with the columns "
            "PatientID or SeriesInstanceUID, and label"
        )
    return None


def _from_dicom(dicom: DicomScan, nifti: NiftiScan, task: str) -> tuple[list[Case], tuple[str, ...], list[Rejected]]:
    masks: dict[str, list[Path]] = {}
    rejected: list[Rejected] = []
    labels: list[str] = []
    known = {series.uid for series in dicom.series}
    for seg in dicom.segmentations if task == "segmentation" else ():
        found = [uid for uid in seg.series if uid in known]
        if not found:
            rejected.append(Rejected(relative(seg.path, seg.root), "DICOM SEG of a series that is not in this folder"))
            continue
        labels += seg.labels
        for uid in found:
            masks.setdefault(uid, []).append(seg.path)
    cases = []
    for series in dicom.series:
        if task == "segmentation" and series.uid not in masks:
            rejected.append(
                Rejected(_place(series), "no mask: no DICOM SEG refers to this series (--task unlabelled keeps such series)")
            )
            continue
        mask = tuple(masks.get(series.uid, ()))
        cases.append(Case(series.uid, series.patient_id, series.modality, None, "dicom", series, mask))
    return cases, seg_classes(labels) if task == "segmentation" else (), rejected


def _from_nifti(dicom: DicomScan, nifti: NiftiScan, task: str) -> tuple[list[Case], tuple[str, ...], list[Rejected]]:
    rejected: list[Rejected] = []
    cases = []
    for item in nifti.cases:
        if item.held_out and task != "unlabelled":
            continue
        if task == "segmentation" and item.label is None:
            rejected.append(Rejected(_place(item), "no mask of this name in labelsTr (--task unlabelled keeps such images)"))
            continue
        mask = (item.label,) if task == "segmentation" and item.label is not None else ()
        cases.append(Case(item.name, item.name, item.modality, None, "nifti", item, mask))
    if task == "segmentation" and len(nifti.classes) < 2:
        raise SourceError("dataset.json: labels: expected the background and at least one class")
    return cases, nifti.classes if task == "segmentation" else (), rejected


def _apply_labels(cases: list[Case], table: LabelTable) -> tuple[list[Case], list[Rejected]]:
    """Cases with their labels; cases without one are set aside.

    Raises:
        SourceError: a row that fits no case; it is named by number, not by the identifier.
    """

    def key(case: Case) -> str:
        return case.source_id if table.by == "series" else case.patient_id

    unknown = sorted(table.rows[name] for name in table.labels.keys() - {key(case) for case in cases})
    if unknown:
        shown = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise SourceError(
            f"{table.name}: row {shown}: label for an unknown {table.by}: no image in the folder has this "
            f"{'PatientID' if table.by == 'patient' else 'SeriesInstanceUID'}; remove the row or add the images"
        )
    labelled, missing = [], []
    for case in cases:
        label = table.labels.get(key(case))
        if label is None:
            missing.append(Rejected(_place(case.image), f"no label in {table.name}"))
        else:
            labelled.append(replace(case, label=label))
    return labelled, missing


def _place(image: SeriesFiles | NiftiCase) -> str:
    return relative(image.files[0], image.root)
