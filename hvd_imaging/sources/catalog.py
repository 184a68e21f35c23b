"""What an archive holds, as cases with their labels: the one place where sources and labels meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from ..config import LabelsConfig
from ..errors import SourceError
from ..privacy import vocabulary
from ..volume import Volume
from . import unread
from .dicom import DicomScan, Rejected, SegFile, SeriesFiles, Units, read_series, relative, scan_dicom
from .labels import (
    Annotation,
    LabelTable,
    read_labels_csv,
    read_mask,
    read_rtstruct,
    read_seg,
    read_segments,
    seg_classes,
)
from .labels.beside import is_mask, masks_beside
from .labels.checks import doubts
from .labels.consensus import check_method, combine
from .labels.layers import BACKGROUND, from_mask, is_background
from .labels.references import Matched, match
from .nifti import DESCRIPTION, NiftiCase, NiftiScan, is_nifti_name, plain_name, read_case, scan_nifti
from .nrrd import segments

TASKS = ("segmentation", "classification", "unlabelled")
LABELS = "labels.csv"

MOST_CLASSES = 256
"""Masks are uint8."""

__all__ = ["LABELS", "TASKS", "Case", "Catalog", "Rejected", "annotations_of", "choose", "load_case", "read_image", "scan"]


@dataclass(frozen=True)
class Case:
    """One image with what is known about it. ``source_id`` and ``patient_id`` are raw: for memory only, never written.

    Attributes:
        source_id: SeriesInstanceUID, with ``#part`` if the series holds several volumes; or the NIfTI case's name.
        patient_id: who it counts as: PatientID, or the NIfTI case's name.
        modality: DICOM Modality, "" if unknown.
        label: class index for classification, else None.
        mask: annotations for segmentation: DICOM SEG, RTSTRUCT or volumes, sorted by path.
    """

    source_id: str = field(repr=False)
    patient_id: str = field(repr=False)
    modality: str
    label: int | None
    kind: Literal["dicom", "nifti"]
    image: SeriesFiles | NiftiCase
    mask: tuple[SegFile, ...] = ()

    @property
    def name(self) -> str:
        """What the source calls its patient: PatientID, "" if it has none, or the NIfTI case's name; raw."""
        if not isinstance(self.image, SeriesFiles):
            return self.image.name
        return next((header.patient for header in self.image.headers), self.image.patient_id)

    @property
    def part(self) -> str:
        """Which volume of its series it is ("echo 2"), "" if there is one only; safe to show."""
        return self.image.part if isinstance(self.image, SeriesFiles) else ""


@dataclass(frozen=True)
class Catalog:
    """All cases of an archive.

    Attributes:
        task: segmentation, classification or unlabelled.
        classes: names; index 0 is the background for segmentation; empty if unlabelled.
        cases: sorted by ``source_id``.
        rejected: inputs that cannot be used, with the reason.
        notes: what the user should know about the archive as a whole.
        remarks: what the user should know of single inputs, which are not set aside.
        labels: how annotations become masks.
        names: of segments and regions -> of classes; what is not in it stays as it is.
    """

    task: str
    classes: tuple[str, ...]
    cases: tuple[Case, ...]
    rejected: tuple[Rejected, ...]
    notes: tuple[str, ...] = ()
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    names: Mapping[str, str] = field(default_factory=dict, repr=False)
    remarks: tuple[Rejected, ...] = ()


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
        SourceError: no DICOM or NIfTI in the folder, a label for an unknown patient, no labels for the asked task, or labels of one
            class only.
    """
    root = Path(root)
    if task is not None and task not in TASKS:
        raise SourceError(f"task '{task}': expected one of {', '.join(TASKS)}")
    if not root.is_dir():
        raise SourceError(f"{root}: expected a folder with DICOM or NIfTI files, found {_what(root)}")
    nifti = scan_nifti(root)
    dicom = scan_dicom(root, on_file) if dicom is None else dicom
    unused = len(dicom.segmentations) + sum(is_mask(case) if dicom.series else case.label is not None for case in nifti.cases)
    asked = task
    left = unread.notes(path for path in dicom.unknown if not is_nifti_name(path))
    dicom, nifti, strays, notes = _one_kind(dicom, nifti, root, task)
    if not dicom.series and not nifti.cases:
        reason = "".join(f"; {note}" for note in left)
        if dicom.rejected:
            reason += f"; {len(dicom.rejected)} DICOM files cannot be read, {dicom.rejected[0].path}: {dicom.rejected[0].reason}"
        raise SourceError(
            f"{root}: no DICOM or NIfTI images in this folder or below ({dicom.skipped} other files, "
            f"{dicom.others + len(dicom.segmentations)} DICOM objects without an image){reason}"
        )
    matched = match(dicom.segmentations, dicom.series)
    has_masks = bool(matched.masks) or any(case.label for case in nifti.cases)
    table = _labels(root, labels_csv, task, has_masks)
    if task is None:
        # Nobody said that masks are not wanted: those of no series are told.
        strays += matched.rejected if table is not None or not has_masks else ()
        task = "classification" if table else "segmentation" if has_masks else "unlabelled"
    if task == "segmentation" and labels_csv is not None:
        raise SourceError(f"{Path(labels_csv).name}: labels from a CSV are for classification, but the task is segmentation")
    cases, classes, rejected = _from_dicom(dicom, matched, task) if dicom.series else _from_nifti(nifti, task)
    if table is not None:
        cases, missing = _apply_labels(cases, table)
        classes, rejected = table.classes, [*rejected, *missing]
    if task == "segmentation" and not cases and not has_masks:
        why = f"; {len(matched.rejected)} were set aside: {matched.rejected[0].reason}" if matched.rejected else ""
        raise SourceError(
            f"{root}: no masks for segmentation: expected DICOM SEG or RTSTRUCT objects that refer to the series, or labelsTr with "
            f"dataset.json; use --task unlabelled for images alone{why}"
        )
    rejected = sorted([*rejected, *strays, *dicom.rejected, *nifti.rejected], key=lambda item: item.path)
    notes += (*dicom.notes, *_several_volumes(dicom.series), *nifti.notes, *(matched.notes if task == "segmentation" else ()), *left)
    if task != "segmentation" and unused:
        notes += (f"{unused} masks are not used: the task is {task}",)
    if asked is None and task == "segmentation" and (root / LABELS).is_file():
        notes += (f"{LABELS} is not used: masks are there, so the task is segmentation; --task classification takes it",)
    remarks = [*dicom.remarks, *_left_out(nifti, task)]
    ordered = tuple(sorted(cases, key=lambda case: case.source_id))
    return Catalog(task, classes, ordered, tuple(rejected), notes, remarks=tuple(remarks))


def choose(catalog: Catalog, config: LabelsConfig, shown: Callable[[str, Collection[str]], str] = lambda name, forbidden: name) -> Catalog:
    """The catalog with the classes that ``config`` wants, and its way to make masks.

    Args:
        shown: gives the name that stands for a segment's or region's own, which is free text and can hold a patient's; takes words that
            name people in its objects. Names that ``config`` lists stay as they are.

    Raises:
        SourceError: a name that no annotation has, or more classes than a mask can hold.
        SetupError: there are several annotators, and what finds their consensus is not installed.
    """
    catalog = replace(catalog, labels=config)
    if catalog.task != "segmentation":
        return catalog
    if any(len(case.mask) > 1 for case in catalog.cases):
        check_method(config.consensus)
    volumes = any(case.kind == "nifti" for case in catalog.cases)
    if config.names is not None and volumes:
        raise SourceError("labels.names is for DICOM SEG and RTSTRUCT; masks as volumes have the classes of dataset.json")
    if not volumes:
        people = _people(catalog.cases)
        names = {name: name if name in (config.names or ()) else shown(name, people.get(name, ())) for name in catalog.classes[1:]}
        missing = [name for name in config.names or () if name not in names]
        if missing:
            raise SourceError(
                f"labels.names: no annotation has {', '.join(missing)}; found: {', '.join(sorted(set(names.values()))) or 'none'}"
            )
        classes = seg_classes(names.values()) if config.names is None else (BACKGROUND, *config.names)
        notes = _codes((seg for case in catalog.cases for seg in case.mask), names)
        hidden = sum(name != told for name, told in names.items() if told in classes)
        if hidden:
            notes += (
                f"{hidden} names of structures that are no terms of medicine stand as label-<hex>; what they are is in the list of "
                "references, and --set labels.names=[NAME,...] keeps names",
            )
        catalog = replace(catalog, classes=classes, names=names, notes=(*catalog.notes, *notes))
    if len(catalog.classes) > MOST_CLASSES:
        raise SourceError(
            f"{len(catalog.classes) - 1} different structures, expected at most {MOST_CLASSES - 1}; choose some with "
            "--set labels.names=[NAME,...]"
        )
    return catalog


def load_case(case: Case, catalog: Catalog, units: Units = "hu") -> tuple[Volume, np.ndarray | None]:
    """Read a case: image ``(D, H, W[, C])`` float32, and for segmentation its mask, uint8 ``(D, H, W)`` class indices.

    Raises:
        SourceError: the image or the mask cannot be used.
        SetupError: what decodes the image, or finds the consensus, is not installed.
    """
    volume = read_image(case, units)
    if catalog.task != "segmentation":
        return volume, None
    notes: tuple[str, ...] = ()
    if case.kind == "nifti" and not segments(case.mask[0].path):
        told: list[str] = []
        mask = read_mask(case.mask[0].path, volume, catalog.classes, case.image.root, told)
        notes = tuple(told)
    else:
        mask, notes = combine(annotations_of(case, volume, catalog), catalog.classes, volume.shape, catalog.labels)
    if catalog.labels.empty == "quarantine" and not mask.any():
        raise SourceError("nothing is marked in this image (labels.empty=keep keeps such cases)")
    return replace(volume, notes=(*volume.notes, *notes, *doubts(mask, catalog.classes))), mask


def read_image(case: Case, units: Units = "hu") -> Volume:
    """The case's image ``(D, H, W[, C])`` float32.

    Raises:
        SourceError: see `load_case`.
    """
    return read_case(case.image) if isinstance(case.image, NiftiCase) else read_series(case.image, units)


def annotations_of(case: Case, volume: Volume, catalog: Catalog) -> tuple[Annotation, ...]:
    """What each file says of the case's image, in the order of ``case.mask``.

    Raises:
        SourceError: one of them cannot be used.
    """
    found = []
    for file in case.mask:
        if file.kind == "volume":
            classes, named = file.labels or catalog.classes, segments(file.path)
            if named:
                annotation = read_segments(file.path, volume, named, classes, case.image.root, catalog.names)
            else:
                notes: list[str] = []
                shown = [catalog.names.get(label, label) for label in classes]
                mask = read_mask(file.path, volume, shown, case.image.root, notes)
                annotation = Annotation(
                    tuple(from_mask(label, mask == value) for value, label in enumerate(shown) if value), tuple(notes)
                )
        elif file.kind == "rtstruct":
            uid = case.image.uid if isinstance(case.image, SeriesFiles) else ""
            frame = case.image.frame_of_reference if isinstance(case.image, SeriesFiles) else ""
            annotation = read_rtstruct(file.path, volume, uid, case.image.root, catalog.names, frame)
        else:
            annotation = read_seg(file.path, volume, case.image.root, catalog.names)
        found.append(replace(annotation, annotator=file.annotator))
    return tuple(found)


_MOSTLY_NOT = 0.1


def _people(cases: Iterable[Case]) -> dict[str, set[str]]:
    """Label -> words that name people in the objects that have it, raw. Pure.

    A word that names people in few of many objects is one of medicine ("white matter", and a patient of the name White).
    """
    objects: Counter[str] = Counter()
    words: dict[str, Counter[str]] = {}
    for case in cases:
        own: set[str] = set()
        if isinstance(case.image, SeriesFiles):
            own.update(vocabulary.naming_words(text for header in case.image.headers[:1] for text in (header.person_name, header.patient)))
        for file in case.mask:
            for label in set(file.labels):
                objects[label] += 1
                words.setdefault(label, Counter()).update(own | file.named)
    return {label: {word for word, count in found.items() if count > _MOSTLY_NOT * objects[label]} for label, found in words.items()}


def _codes(segmentations: Iterable[SegFile], names: Mapping[str, str]) -> tuple[str, ...]:
    """Labels that mean different things in different files, or nearly the same under two names."""
    codes: dict[str, set[str]] = {}
    for file in set(segmentations):
        for number, label in enumerate(file.labels):
            if label and not is_background(label):
                codes.setdefault(names.get(label, label), set()).add(file.codes[number] if number < len(file.codes) else "")
    notes = []
    for label, found in sorted(codes.items()):
        if len(found - {""}) > 1:
            notes.append(f"'{label}' stands for different things: it has the codes {', '.join(sorted(found - {''}))}")
    alike: dict[str, list[str]] = {}
    for label in sorted(codes):
        alike.setdefault(" ".join(label.lower().replace("_", " ").split()), []).append(label)
    notes += [f"{', '.join(same)}: different classes that differ in spelling only" for same in alike.values() if len(same) > 1]
    return tuple(notes)


def _what(root: Path) -> str:
    return "a file" if root.exists() else "nothing"


def _one_kind(
    dicom: DicomScan, nifti: NiftiScan, root: Path, task: str | None
) -> tuple[DicomScan, NiftiScan, list[Rejected], tuple[str, ...]]:
    """Where DICOM and NIfTI lie in one folder: the images of one kind, what the other becomes, and a note.

    Volumes in folders for masks are masks of the DICOM series. Of images the kind stays that dataset.json describes, else the one
    that has masks, else the one with more images; the others are set aside one by one.

    Raises:
        SourceError: see `masks_beside`.
    """
    if not dicom.series or not nifti.cases:
        return dicom, nifti, [], ()
    masks = [] if nifti.layout else [case for case in nifti.cases if is_mask(case)]
    images = [case for case in nifti.cases if case not in masks]
    of_dicom = not nifti.layout and (bool(masks or dicom.segmentations) or len(dicom.series) >= len(images))
    if not of_dicom:
        why = "DICOM beside a data set of NIfTI or NRRD volumes; ingest it apart"
        strays = [Rejected(_place(series), why) for series in dicom.series]
        strays += [Rejected(relative(file.path, file.root), why) for file in dicom.segmentations]
        note = f"{len(nifti.cases)} NIfTI or NRRD cases are taken; {len(dicom.series)} DICOM series beside them were set aside"
        return replace(dicom, series=(), segmentations=()), nifti, strays, (note,)
    why = "NIfTI or NRRD beside DICOM; ingest it apart, or, if it is a mask, put it into a folder 'labels'"
    strays = [Rejected(_place(case), why) for case in images]
    if task in (None, "segmentation") and masks:
        beside, lost = masks_beside(masks, dicom.series, root)
        strays += lost
        dicom = replace(dicom, segmentations=tuple(sorted((*dicom.segmentations, *beside), key=lambda file: file.path)))
    notes = (f"{len(images)} NIfTI or NRRD volumes beside {len(dicom.series)} DICOM series were set aside",) if images else ()
    return dicom, replace(nifti, cases=()), strays, notes


def _labels(root: Path, labels_csv: Path | None, task: str | None, has_masks: bool) -> LabelTable | None:
    """The table to use; an explicit CSV speaks for classification unless the task says otherwise."""
    if task not in (None, "classification"):
        return None
    if labels_csv is not None:
        if not Path(labels_csv).is_file():
            raise SourceError(f"{labels_csv}: expected a CSV of labels, found {_what(Path(labels_csv))}")
        return _several(read_labels_csv(Path(labels_csv)))
    if (root / LABELS).is_file() and (task == "classification" or not has_masks):
        return _several(read_labels_csv(root / LABELS))
    if task == "classification":
        raise SourceError(
            f"{root}: no labels for classification: expected {LABELS} in this folder, or --labels FILE with the columns "
            "PatientID or SeriesInstanceUID, and label"
        )
    return None


def _several(table: LabelTable) -> LabelTable:
    """The table if it has several classes.

    Raises:
        SourceError: it has one: there is nothing to tell apart.
    """
    if len(table.classes) < 2:
        raise SourceError(
            f"{table.name}: all {len(table.labels)} labels are '{table.classes[0]}': classification needs at least two classes; add the "
            "others, or use --task unlabelled for images alone"
        )
    return table


def _from_dicom(dicom: DicomScan, matched: Matched, task: str) -> tuple[list[Case], tuple[str, ...], list[Rejected]]:
    masks = matched.masks if task == "segmentation" else {}
    rejected = list(matched.rejected) if task == "segmentation" else []
    labels = [label for file in dict.fromkeys(file for found in masks.values() for file in found) for label in file.labels]
    cases = []
    for series in dicom.series:
        if task == "segmentation" and series.source_id not in masks:
            why = matched.refused.get(series.source_id, "no DICOM SEG or RTSTRUCT refers to this series")
            rejected.append(Rejected(_place(series), f"no mask: {why} (--task unlabelled keeps such series)"))
            continue
        mask = masks.get(series.source_id, ())
        cases.append(Case(series.source_id, series.person, series.modality, None, "dicom", series, mask))
    return cases, seg_classes(labels) if task == "segmentation" else (), rejected


def _from_nifti(nifti: NiftiScan, task: str) -> tuple[list[Case], tuple[str, ...], list[Rejected]]:
    rejected: list[Rejected] = []
    cases = []
    for item in nifti.cases:
        if item.held_out and task != "unlabelled":
            continue
        if task == "segmentation" and item.label is None:
            rejected.append(Rejected(_place(item), "no mask of this name in labelsTr (--task unlabelled keeps such images)"))
            continue
        mask = (SegFile(item.label, (), (), item.root, "volume"),) if task == "segmentation" and item.label is not None else ()
        cases.append(Case(item.name, item.name, item.modality, None, "nifti", item, mask))
    if task == "segmentation" and len(nifti.classes) < 2:
        raise SourceError(
            f'{DESCRIPTION}: labels: expected the background and at least one class, as in {{"labels": {{"background": 0, "NAME": 1}}}}, '
            f"found {'none' if not nifti.classes else 'the background alone'}"
        )
    return cases, nifti.classes if task == "segmentation" else (), rejected


def _several_volumes(series: Sequence[SeriesFiles]) -> tuple[str, ...]:
    """Series of several volumes, which are all taken: how many, and what they are called."""
    parts = Counter(each.part for each in series if each.part)
    if not parts:
        return ()
    uids = len({each.uid for each in series if each.part})
    shown = ", ".join(f"{part} ({count})" for part, count in list(parts.items())[:6]) + (", ..." if len(parts) > 6 else "")
    return (f"{uids} series hold{'s' * (uids == 1)} several volumes, {parts.total()} in all, each a case of its own: {shown}",)


def _left_out(nifti: NiftiScan, task: str) -> list[Rejected]:
    """Cases that are none of this task by design."""
    why = "of imagesTs, whose labels are held back: left out (--task unlabelled takes it)"
    return [Rejected(_place(case), why) for case in nifti.cases if case.held_out and task != "unlabelled"]


def _apply_labels(cases: list[Case], table: LabelTable) -> tuple[list[Case], list[Rejected]]:
    """Cases with their labels; cases without one are set aside.

    Raises:
        SourceError: a row that fits no case; it is named by number, not by the identifier.
    """

    def keys(case: Case) -> tuple[str, ...]:
        """The most telling first: a volume of a series, then the series."""
        if table.by == "patient":
            return (plain_name(case.name),)
        return (case.source_id, case.image.uid) if isinstance(case.image, SeriesFiles) else (case.source_id,)

    unknown = sorted(table.rows[name] for name in table.labels.keys() - {key for case in cases for key in keys(case)})
    if unknown:
        shown = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise SourceError(
            f"{table.name}: row {shown}: label for an unknown {table.by}: no image in the folder has this "
            f"{'PatientID' if table.by == 'patient' else 'SeriesInstanceUID'}; remove the row or add the images"
        )
    labelled, missing = [], []
    for case in cases:
        label = next((table.labels[key] for key in keys(case) if key in table.labels), None)
        if label is None:
            missing.append(Rejected(_place(case.image), f"no label in {table.name}"))
        else:
            labelled.append(replace(case, label=label))
    return labelled, missing


def _place(image: SeriesFiles | NiftiCase) -> str:
    return relative(image.files[0], image.root)
