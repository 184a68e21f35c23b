"""NIfTI and NRRD volumes, alone or in the folder layouts of the Medical Segmentation Decathlon (MSD) and of nnU-Net.

A NIfTI array is indexed (W, H, D[, C]) in RAS+ mm; a `Volume` is (D, H, W[, C]) in LPS+ mm.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import math
import os
import re
import unicodedata
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

import nibabel
import numpy as np

from .. import limits
from ..errors import SourceError
from ..files import write_bytes
from ..texts import TextError, read_json
from ..volume import Volume, filled, flip_ras_lps, same_voxels
from . import nrrd, streams
from .dicom import Rejected, relative, walk

SUFFIXES = (".nii.gz", ".nii", *nrrd.SUFFIXES)
DESCRIPTION = "dataset.json"
# nibabel's remarks on headers would stand between ours, and can quote what a header holds.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)

UNITS = {1: 1000.0, 2: 1.0, 3: 0.001}
"""mm of NIfTI's codes of length: meter, mm, micron (nifti1.h, xyzt_units)."""
LARGEST_VOXEL_MM = 100.0
"""No scanner has larger voxels: such a unit is a slip of the writer."""
_LARGEST_HEADER = 64 << 20  # with extensions: those of CIFTI and AFNI are texts of some MB
_DAMAGED = (
    nibabel.filebasedimages.ImageFileError,
    nibabel.spatialimages.HeaderDataError,
    nibabel.wrapstruct.WrapStructError,
)


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
    """What a folder holds.

    Attributes:
        classes: empty for a plain folder of images.
        layout: dataset.json and imagesTr tell what belongs to the data set.
        notes: what the user should know.
    """

    cases: tuple[NiftiCase, ...]
    classes: tuple[str, ...]
    rejected: tuple[Rejected, ...]
    layout: bool = False
    notes: tuple[str, ...] = ()


def stem(path: Path) -> str:
    """The file name without .nii, .nii.gz, .nrrd, .seg.nrrd or .nhdr, in small letters or capitals."""
    return plain_name(next((path.name[: -len(s)] for s in SUFFIXES if path.name.lower().endswith(s)), path.name))


def plain_name(name: str) -> str:
    """A name in Unicode's composed form, without blanks around it: macOS takes letters and their marks apart. Pure."""
    return unicodedata.normalize("NFC", name).strip()


def is_nifti_name(path: Path) -> bool:
    """True for NIfTI and NRRD; not for the ``._name`` shadows that macOS leaves in archives."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def scan_nifti(root: Path) -> NiftiScan:
    """The cases below ``root``: of the one ``dataset.json`` with an ``imagesTr`` folder, else every NIfTI file.

    Raises:
        SourceError: dataset.json is damaged, or there are several.
    """
    found = [path for path in walk(root) if is_nifti_name(path) or path.name == DESCRIPTION]
    files = [path for path in found if path.name != DESCRIPTION]
    folders = [path.parent for path in found if path.name == DESCRIPTION and (path.parent / "imagesTr").is_dir()]
    if len(folders) > 1:
        names = ", ".join(relative(folder, root) for folder in folders[:3])
        raise SourceError(f"{len(folders)} data sets with {DESCRIPTION} in one folder ({names}); give one of them")
    if folders:
        return _scan_layout(folders[0], root, files)
    cases: dict[str, NiftiCase] = {}
    rejected = []
    for path in files:
        name = plain_name(relative(path.parent, root) + "/").removeprefix("./") + stem(path)
        if name in cases:
            rejected.append(Rejected(relative(path, root), "another file has the same name before its suffix"))
        else:
            cases[name] = NiftiCase(name, (path,), root=root)
    return NiftiScan(tuple(cases[name] for name in sorted(cases)), (), tuple(rejected))


def _scan_layout(folder: Path, root: Path, files: Sequence[Path]) -> NiftiScan:
    where = relative(folder / DESCRIPTION, root)
    try:
        description = read_json(folder / DESCRIPTION)
    except (OSError, ValueError) as error:
        raise SourceError(f"{where}: cannot be read as JSON ({error if isinstance(error, TextError) else type(error).__name__})") from error
    if not isinstance(description, dict):
        raise SourceError(f"{where}: expected an object, found {type(description).__name__}")
    classes = parse_classes(description.get("labels"), where)
    named: Any = description.get("channel_names")
    channels: Any = named or description.get("modality")
    modality = parse_modality(channels)
    count = len(channels) if isinstance(channels, dict) else 1
    rejected: list[Rejected] = []
    labels: dict[str, Path] = {}
    parts: dict[str, list[Path]] = {"imagesTr": [], "imagesTs": [], "labelsTr": [], "labelsTs": []}
    for path in files:
        part = path.parent.name if path.parent.parent == folder else ""
        if part in parts:
            parts[part].append(path)
        else:
            rejected.append(Rejected(relative(path, root), f"outside of the folders of {where}; ingest it apart"))
    for path in sorted(parts["labelsTr"], key=_rank):
        if labels.setdefault(stem(path), path) != path:
            rejected.append(Rejected(relative(path, root), "another mask has the same name before its suffix"))
    listed = {plain_name(entry) for entry in map(_stem_of, _listed(description, where))}
    split = is_split(parts["imagesTr"], labels.keys() or listed, count, isinstance(named, dict))
    cases: dict[str, NiftiCase] = {}
    for part, held_out in (("imagesTr", False), ("imagesTs", True)):
        for name, members in group_channels(parts[part], split).items():
            shown = relative(members[0], root)
            if split and len(members) != count:
                rejected.append(Rejected(shown, f"case of {len(members)} channel files, {where} names {count} channels"))
            elif split and count > 1 and [stem(path)[-4:] for path in members] != [f"{number:04d}" for number in range(count)]:
                rejected.append(Rejected(shown, f"case whose {count} channel files are not numbered 0000 to {count - 1:04d}"))
            elif name in cases:
                rejected.append(Rejected(shown, "another case of imagesTr or imagesTs has the same name"))
            else:
                kept = members if split else members[:1]
                cases[name] = NiftiCase(name, kept, None if held_out else labels.get(name), modality, held_out, root)
                twice = "another file has the same name before its suffix"
                rejected += [Rejected(relative(path, root), twice) for path in members[len(kept) :]]
    trained = {name for path in parts["imagesTr"] for name in (stem(path), _CHANNEL.sub("", stem(path)))}
    for name, path in labels.items():
        if name not in trained and name not in listed:
            rejected.append(Rejected(relative(path, root), "mask without an image of this name in imagesTr"))
    for entry in _listed(description, where):
        if _stem_of(entry) not in trained:
            rejected.append(Rejected(relative(folder / entry, root), f"named in {where}, but not in imagesTr"))
    notes = (f"{len(parts['labelsTs'])} masks in labelsTs are not read: images of imagesTs are held out",) if parts["labelsTs"] else ()
    return NiftiScan(tuple(cases[name] for name in sorted(cases)), classes, tuple(rejected), True, notes)


_CHANNEL = re.compile(r"(?<=.)_\d{4}$")


def _rank(path: Path) -> tuple[int, str]:
    """Which of several files of one stem counts: the first by kind, then by name."""
    return next(number for number, suffix in enumerate(SUFFIXES) if path.name.lower().endswith(suffix)), path.name


def _stem_of(entry: str) -> str:
    return stem(Path(entry.replace("\\", "/")))


def _listed(description: dict[str, Any], where: str) -> list[str]:
    """The image paths of MSD's "training" list; they are compared by name only, never opened."""
    entries = description.get("training") or []
    if not isinstance(entries, list):
        raise SourceError(f"{where}: training: expected a list, found {type(entries).__name__}")
    return [str(e["image"]) for e in entries if isinstance(e, dict) and "image" in e]


def is_split(paths: Sequence[Path], known: Collection[str], channels: int, named: bool) -> bool:
    """True if each file is one channel, ``name_0000.nii.gz`` (nnU-Net), False if it is a whole case. Pure.

    What lies there decides: the names of the masks, else the numbers of the channels, else what kind of dataset.json it is.

    Args:
        paths: images.
        known: names of cases: of the masks, or of the list in dataset.json.
        channels: how many dataset.json names.
        named: they stand under ``channel_names``, as nnU-Net has it since version 2.
    """
    whole = {stem(path) for path in paths}
    parts = {name: _CHANNEL.sub("", name) for name in whole}
    as_whole, as_parts = len(whole & set(known)), len(set(parts.values()) & set(known))
    if as_whole != as_parts:
        return as_parts > as_whole
    if named:
        return True
    wanted = {f"{number:04d}" for number in range(channels)}
    found: dict[str, set[str]] = {}
    for name, case in parts.items():
        found.setdefault(case, set()).add(name[len(case) + 1 :])
    return bool(found) and all(numbers == wanted for numbers in found.values())


def group_channels(paths: Sequence[Path], split: bool) -> dict[str, tuple[Path, ...]]:
    """Case name -> files; with ``split``, ``name_0000.nii.gz`` is channel 0 of case ``name`` (nnU-Net). Pure."""
    cases: dict[str, list[Path]] = {}
    for path in sorted(paths, key=lambda path: (stem(path), path.name)):
        cases.setdefault(_CHANNEL.sub("", stem(path)) if split else stem(path), []).append(path)
    return {name: tuple(files) for name, files in cases.items()}


def parse_classes(labels: Any, where: str) -> tuple[str, ...]:
    """Class names by mask value, from MSD's ``{"0": "background"}`` or nnU-Net's ``{"background": 0}``. Pure.

    Raises:
        SourceError: not one of the two, the values are not 0, 1, 2, ..., or the background is not 0.
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
        if not name.strip() or not name.isprintable() or len(name) > 64 or len(str(number)) > 6:
            raise SourceError(f"{where}: labels: class {len(by_value)}: expected a name of 1 to 64 printable characters and a value below 10^6")
        if name.lower() == "ignore":
            raise SourceError(f"{where}: labels: an 'ignore' label is not supported yet")
        by_value[int(number)] = name
    if sorted(by_value) != list(range(len(labels))):
        raise SourceError(
            f"{where}: labels: expected the values 0 to {len(labels) - 1}, each once; found "
            f"{', '.join(map(str, sorted(by_value)))}"
        )
    misplaced = [value for value, name in by_value.items() if value and name.strip().lower() == "background"]
    if misplaced:
        raise SourceError(f"{where}: labels: expected the background as value 0, found it as {misplaced[0]}")
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
        with open(path, "rb") as raw:
            packed = path.name.lower().endswith(".gz")
            with cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if packed else contextlib.nullcontext(raw) as file:
                header = _header(file)
                shape = _shape(header)
                array = _voxels(file, header, shape, os.fstat(raw.fileno()).st_size, packed)
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except SourceError as error:
        raise SourceError(f"{name}: {error}") from None
    except (OSError, EOFError, ValueError, OverflowError, zlib.error, *_DAMAGED) as error:
        raise SourceError(f"{name}: not a NIfTI file, or truncated or damaged ({type(error).__name__})") from error
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
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
    array, note = filled(array, modality, reuse=True)
    return Volume(array, affine, modality, source=(path,), notes=(*notes, note) if note else tuple(notes))


def _header(file: IO[bytes]) -> Any:
    """The header alone: its extensions, which can claim any length, are not needed."""
    start = file.read(540)
    # sizeof_hdr, in the byte order of the writer.
    second = 540 in (int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big"))
    kind = nibabel.Nifti2Header if second else nibabel.Nifti1Header
    return kind.from_fileobj(io.BytesIO(start[: kind.template_dtype.itemsize]))


def _shape(header: Any) -> tuple[int, ...]:
    """Voxels along (W, H, D) or (W, H, D, C)."""
    dtype = header.get_data_dtype()
    if dtype.fields is not None or dtype.kind not in "iuf":
        raise SourceError("colour or complex voxels are not supported yet, expected numbers")
    shape = tuple(int(side) for side in header.get_data_shape())
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise SourceError(f"expected 3 dimensions, or 4 with channels last; found shape {shape}")
    return shape


def _voxels(file: IO[bytes], header: Any, shape: tuple[int, ...], held: int, packed: bool) -> np.ndarray:
    """float32 ``(D, H, W)`` or ``(D, H, W, C)`` of a file of ``held`` bytes. In a file the first axis is the fastest."""
    dtype, begin, count = header.get_data_dtype(), header.get_data_offset(), math.prod(shape)
    if not header.sizeof_hdr <= begin <= _LARGEST_HEADER:
        raise SourceError(f"NIfTI header of {limits.brief(begin)} bytes, expected {header.sizeof_hdr} to {_LARGEST_HEADER}")
    why = limits.unbelievable(begin + count * dtype.itemsize, held, "gzip" if packed else "none", 4 * count)
    if why:
        raise SourceError(why)
    slope, inter = header.get_slope_inter()
    scaling = (1.0 if slope is None else slope, 0.0 if inter is None else inter)

    def scaled(data: bytes, dtype: np.dtype) -> np.ndarray:
        # nibabel's own scaling, which chooses a precision.
        size = len(data) // dtype.itemsize
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(nibabel.arrayproxy.ArrayProxy(io.BytesIO(data), ((size,), dtype, 0, *scaling)), np.float32)

    file.seek(begin)
    out = np.empty((*shape[2::-1], *shape[3:]), np.float32)
    streams.fill(out.reshape(math.prod(shape[:3]), -1).T, file.read, dtype, None if scaling == (1, 0) else scaled)
    return out


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
