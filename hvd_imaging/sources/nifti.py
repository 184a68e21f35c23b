"""NIfTI and NRRD volumes, alone or in the folder layouts of the Medical Segmentation Decathlon (MSD) and of nnU-Net.

A NIfTI array is indexed (W, H, D[, C]) in RAS+ mm; a `Volume` is (D, H, W[, C]) in LPS+ mm.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from ..errors import SourceError
from ..files import write_bytes
from ..volume import Volume, filled, flip_ras_lps, same_voxels
from . import nrrd
from .dicom import Rejected, relative, walk

SUFFIXES = (".nii.gz", ".nii", *nrrd.SUFFIXES)
DESCRIPTION = "dataset.json"
UNITS = {1: 1000.0, 2: 1.0, 3: 0.001}
"""mm of NIfTI's codes of length: meter, mm, micron (nifti1.h, xyzt_units)."""
LARGEST_VOXEL_MM = 100.0
"""No scanner has larger voxels: such a unit is a slip of the writer."""


@dataclass(frozen=True)
class NiftiCase:
    """One case.

    Attributes:
        name: file name without channel and suffix; stands for case and patient.
        files: one file (3D, or 4D with channels last), or one 3D file for each channel.
        label: mask, None if there is none.
        held_out: of ``imagesTs``, where labels are kept back.
    """

    name: str = field(repr=False)
    files: tuple[Path, ...]
    label: Path | None = None
    modality: str = ""
    held_out: bool = False
    root: Path = Path()


@dataclass(frozen=True)
class NiftiScan:
    """What a folder holds; ``classes`` is empty for a plain folder of images."""

    cases: tuple[NiftiCase, ...]
    classes: tuple[str, ...]
    rejected: tuple[Rejected, ...]


def stem(path: Path) -> str:
    """The file name without .nii, .nii.gz, .nrrd, .seg.nrrd or .nhdr."""
    return next((path.name[: -len(s)] for s in SUFFIXES if path.name.lower().endswith(s)), path.name)


def is_nifti_name(path: Path) -> bool:
    """True for NIfTI and NRRD; not for the ``._name`` shadows that macOS leaves in archives."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def scan_nifti(root: Path) -> NiftiScan:
    """The cases below ``root``: of the one ``dataset.json`` with an ``imagesTr`` folder, else every NIfTI file.

    Raises:
        SourceError: dataset.json is damaged, or there are several.
    """
    files = [path for path in walk(root) if is_nifti_name(path)]
    folders = [
        path.parent for path in walk(root) if path.name == DESCRIPTION and (path.parent / "imagesTr").is_dir()
    ]
    if len(folders) > 1:
        names = ", ".join(relative(folder, root) for folder in folders[:3])
        raise SourceError(f"{len(folders)} data sets with {DESCRIPTION} in one folder ({names}); give one of them")
    if folders:
        return _scan_layout(folders[0], root)
    cases: dict[str, NiftiCase] = {}
    rejected = []
    for path in files:
        name = relative(path, root)[: -len(path.name)] + stem(path)
        if name in cases:
            rejected.append(Rejected(relative(path, root), "another file has the same name before its suffix"))
        else:
            cases[name] = NiftiCase(name, (path,), root=root)
    return NiftiScan(tuple(cases[name] for name in sorted(cases)), (), tuple(rejected))


def _scan_layout(folder: Path, root: Path) -> NiftiScan:
    where = relative(folder / DESCRIPTION, root)
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{where}: can not be read as JSON ({type(error).__name__})") from error
    if not isinstance(description, dict):
        raise SourceError(f"{where}: expected an object, found {type(description).__name__}")
    channels: Any = description.get("channel_names")
    classes = parse_classes(description.get("labels"), where)
    modality = parse_modality(channels or description.get("modality"))
    split_channels = isinstance(channels, dict)
    rejected: list[Rejected] = []
    cases: dict[str, NiftiCase] = {}
    for part, held_out in (("imagesTr", False), ("imagesTs", True)):
        paths = sorted(path for path in (folder / part).glob("*") if path.is_file() and is_nifti_name(path))
        for name, files in group_channels(paths, split_channels).items():
            shown = relative(files[0], root)
            if split_channels and len(files) != len(channels):
                rejected.append(
                    Rejected(shown, f"case of {len(files)} channel files, {where} names {len(channels)} channels")
                )
                continue
            if name in cases:
                rejected.append(Rejected(shown, "another case of imagesTr or imagesTs has the same name"))
                continue
            found = (folder / "labelsTr" / f"{name}{suffix}" for suffix in SUFFIXES)
            label = None if held_out else next((path for path in found if path.is_file()), None)
            cases[name] = NiftiCase(name, files, label, modality, held_out, root)
    for entry in _listed(description, where):
        if not split_channels and stem(Path(entry)) not in cases:
            rejected.append(Rejected(Path(entry).as_posix(), f"named in {where}, but not in imagesTr"))
    return NiftiScan(tuple(cases[name] for name in sorted(cases)), classes, tuple(rejected))


def _listed(description: dict[str, Any], where: str) -> list[str]:
    """The image paths of MSD's "training" list; they are compared by name only, never opened."""
    entries = description.get("training") or []
    if not isinstance(entries, list):
        raise SourceError(f"{where}: training: expected a list, found {type(entries).__name__}")
    return [str(e["image"]) for e in entries if isinstance(e, dict) and "image" in e]


def group_channels(paths: Sequence[Path], split: bool) -> dict[str, tuple[Path, ...]]:
    """Case name -> files; with ``split``, ``name_0000.nii.gz`` is channel 0 of case ``name`` (nnU-Net). Pure."""
    cases: dict[str, list[Path]] = {}
    for path in sorted(paths, key=lambda path: path.name):
        match = re.fullmatch(r"(.+)_\d{4}", stem(path)) if split else None
        cases.setdefault(match.group(1) if match else stem(path), []).append(path)
    return {name: tuple(files) for name, files in cases.items()}


def parse_classes(labels: Any, where: str) -> tuple[str, ...]:
    """Class names by mask value, from MSD's ``{"0": "background"}`` or nnU-Net's ``{"background": 0}``. Pure.

    Raises:
        SourceError: not one of the two, or the values are not 0, 1, 2, ...
    """
    if labels is None:
        return ()
    if not isinstance(labels, dict):
        raise SourceError(f"{where}: labels: expected an object, found {type(labels).__name__}")
    by_value: dict[int, str] = {}
    for key, value in labels.items():
        number, name = (value, key) if isinstance(value, int) else (key, value)
        if not re.fullmatch(r"\d+", str(number)) or not isinstance(name, str):
            raise SourceError(
                f"{where}: labels: '{key}': expected a whole number for each class name (regions are not supported yet)"
            )
        if name.lower() == "ignore":
            raise SourceError(f"{where}: labels: an 'ignore' label is not supported yet")
        by_value[int(number)] = name
    if sorted(by_value) != list(range(len(labels))):
        raise SourceError(
            f"{where}: labels: expected the values 0 to {len(labels) - 1}, each once; found "
            f"{', '.join(map(str, sorted(by_value)))}"
        )
    return tuple(by_value[value] for value in sorted(by_value))


def parse_modality(channels: Any) -> str:
    """DICOM's word for MSD's ``modality`` or nnU-Net's ``channel_names``; "" if they are mixed or unknown. Pure."""
    if not isinstance(channels, dict):
        return ""
    names = {str(name).strip().upper() for name in channels.values()}
    if names == {"CT"}:
        return "CT"
    return "MR" if names and all(re.fullmatch(r"MRI?|T1.*|T2.*|FLAIR|ADC|DWI", name) for name in names) else ""


def read_nifti(path: Path, root: Path = Path(), modality: str = "") -> Volume:
    """Read a NIfTI or NRRD file as float32 ``(D, H, W)``, or ``(D, H, W, C)`` if it is 4D, in the order of its voxels.

    Lengths are in the header's unit (``xyzt_units``: mm, micron, meter; mm if it says none).

    Args:
        modality: DICOM's word for what the file shows, if it is known.

    Raises:
        SourceError: not NIfTI or NRRD, cut off, of another dimension, colour, or with an unusable affine.
    """
    if nrrd.is_nrrd_name(path):
        return nrrd.read_nrrd(path, root, modality)
    name = relative(path, root)
    try:
        image = nibabel.load(path)
        header: Any = image.header
        if header.get_data_dtype().fields is not None or header.get_data_dtype().kind == "c":
            raise SourceError(f"{name}: colour or complex voxels are not supported yet, expected numbers")
        array = np.asarray(image.dataobj, dtype=np.float32)  # type: ignore[attr-defined]
        affine = np.asarray(image.affine, dtype=np.float64)  # type: ignore[attr-defined]
    except SourceError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        raise SourceError(f"{name}: not a NIfTI file, or truncated or damaged ({type(error).__name__})") from error
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise SourceError(f"{name}: expected 3 dimensions, or 4 with channels last; found shape {array.shape}")
    notes = []
    if "qform_code" in header and int(header["qform_code"]) == 0 and int(header["sform_code"]) == 0:
        notes.append("NIfTI without qform and sform: the axes are taken as R, A, S with the voxel size of its header")
    affine = flip_ras_lps(affine[:, [2, 1, 0, 3]])
    unit = UNITS.get(int(header["xyzt_units"]) & 7, 1.0) if "xyzt_units" in header else 1.0
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if unit != 1 and lengths.max() * unit > LARGEST_VOXEL_MM:
        notes.append(f"voxels of {lengths.max() * unit / 1000:g} m by the header's unit: its numbers are taken as mm")
    else:
        affine[:3] *= unit
        lengths *= unit
    if not np.isfinite(affine).all() or lengths.min() <= 0:
        raise SourceError(f"{name}: affine with zero, infinite or missing values; its geometry is not known")
    axes = affine[:3, :3] / lengths
    if np.abs(axes.T @ axes - np.eye(3)).max() > 1e-2:
        raise SourceError(f"{name}: sheared affine is not supported yet, expected perpendicular axes")
    array, note = filled(np.ascontiguousarray(array.transpose((2, 1, 0, 3)[: array.ndim])), modality)
    return Volume(array, affine, modality, source=(path,), notes=(*notes, note) if note else tuple(notes))


def read_case(case: NiftiCase) -> Volume:
    """Read a case; several files are its channels.

    Raises:
        SourceError: see `read_nifti`; or the channels lie on different grids.
    """
    first = read_nifti(case.files[0], case.root, case.modality)
    if len(case.files) == 1:
        return first
    channels, notes = [first.array], list(first.notes)
    for path in case.files[1:]:
        volume = read_nifti(path, case.root, case.modality)
        turned = same_voxels(volume, first) if volume.array.ndim == first.array.ndim == 3 else None
        if turned is None:
            raise SourceError(
                f"{relative(path, case.root)}: channel on another grid ({volume.shape}) than "
                f"{relative(case.files[0], case.root)} ({first.shape})"
            )
        channels.append(turned)
        notes += volume.notes
    return replace(first, array=np.stack(channels, axis=-1), source=case.files, notes=tuple(notes))


def write_nifti(path: Path, volume: Volume) -> None:
    """Write a volume as NIfTI-1 (gzip for .nii.gz), atomically, with scanner coordinates."""
    array = volume.array
    if array.dtype == bool:
        array = array.astype(np.uint8)
    elif array.dtype in (np.int64, np.uint64):
        array = array.astype(np.int32)
    elif array.dtype == np.float16:
        array = array.astype(np.float32)
    affine = flip_ras_lps(volume.affine)[:, [2, 1, 0, 3]]
    image = nibabel.Nifti1Image(array.transpose((2, 1, 0, 3)[: array.ndim]), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    data = image.to_bytes()
    write_bytes(path, gzip.compress(data, compresslevel=6, mtime=0) if path.name.endswith(".gz") else data)
