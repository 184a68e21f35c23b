"""Mask volumes (NIfTI, NRRD) that lie beside DICOM series: which series each belongs to, and what its values mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import SourceError
from ...texts import TextError, read_json
from ..dicom import Rejected, SegFile, SeriesFiles, relative
from ..nifti import DESCRIPTION, NiftiCase, parse_classes, plain_name, stem
from ..nrrd import segments
from .layers import BACKGROUND
from .segments import labels_of

FOLDERS = ("labels", "labelstr", "masks")


def is_mask(volume: NiftiCase) -> bool:
    """True if it lies in a folder for masks (in small letters or capitals); a volume elsewhere may be an image."""
    return all(path.parent.name.lower() in FOLDERS for path in volume.files)


def masks_beside(
    volumes: Sequence[NiftiCase], series: Sequence[SeriesFiles], root: Path
) -> tuple[list[SegFile], list[Rejected]]:
    """The volumes as annotations of the series that they are named after, and those that cannot be given to one.

    A volume is named after a series by its SeriesInstanceUID, or by its PatientID or the name of a folder around it if no other
    series has the same. Values mean what ``labels`` of dataset.json, in the volumes' folder or the root, says; segments of 3D Slicer
    have names of their own.

    Raises:
        SourceError: no dataset.json, or no classes in it, for masks that do not name their structures.
    """
    by_name: dict[str, set[str]] = {}
    for item in series:
        around = [part for file in item.files[:1] for part in Path(relative(file, root)).parts[:-1]]
        for name in (item.patient_id, *around):
            by_name.setdefault(plain_name(name), set()).add(item.uid)
    known = {item.uid for item in series}
    classes: dict[Path, tuple[str, ...]] = {}
    masks, rejected = [], []
    for volume in volumes:
        path = volume.files[0]
        named = segments(path)
        if path.parent not in classes:
            described = any((place / DESCRIPTION).is_file() for place in (path.parent, root))
            if described or not named:
                classes[path.parent] = _classes(path.parent, root)
        meaning = classes.get(path.parent, ())
        name = stem(path)
        found = {name} & known or by_name.get(name, set())
        if len(found) == 1:
            if named:
                try:
                    labels = labels_of(named, meaning, relative(path, root)).values()
                    meaning = meaning if set(labels) <= set(meaning) else (BACKGROUND, *dict.fromkeys(labels))
                except SourceError as error:
                    rejected.append(Rejected(relative(path, root), str(error).removeprefix(f"{relative(path, root)}: ")))
                    continue
            masks.append(SegFile(path, tuple(found), meaning, root, "volume"))
        else:
            why = f"{len(found)} series fit its name" if found else "no series fits its name"
            rejected.append(
                Rejected(
                    relative(path, root),
                    f"mask volume, but {why}; expected a SeriesInstanceUID, or a PatientID or folder of one series",
                )
            )
    return masks, rejected


def _classes(folder: Path, root: Path) -> tuple[str, ...]:
    for place in (folder / DESCRIPTION, root / DESCRIPTION):
        if place.is_file():
            where = DESCRIPTION  # the folder's place could name a patient
            try:
                description = read_json(place)
                labels = description.get("labels") if isinstance(description, dict) else None
            except (OSError, ValueError) as error:
                raise SourceError(f"{where}: cannot be read as JSON ({error if isinstance(error, TextError) else type(error).__name__})") from error
            classes = parse_classes(labels, where)
            if len(classes) > 1:
                return classes
    raise SourceError(
        f"folder '{folder.name}': masks as volumes, but nothing says what their values mean: expected {DESCRIPTION} with "
        '{"labels": {"background": 0, "NAME": 1}} in this folder or the archive\'s'
    )
