"""Files that hold, or may hold, images of kinds that are not read: they are counted and named, so that nobody misses them later. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

IMAGES = (
    # Of medicine. Analyze has no orientation that can be trusted, and two files of a NIfTI look like it.
    ".mha", ".mhd", ".hdr", ".img", ".hdr.gz", ".img.gz", ".nii.bz2", ".nii.xz", ".nii.zst", ".mgz", ".mgh", ".mnc", ".par", ".rec",
    ".vti", ".vtk", ".svs", ".ndpi",
    # Pictures.
    ".png", ".jpg", ".jpeg", ".jp2", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".pgm", ".ppm",
    # Arrays.
    ".npy", ".npz", ".mat", ".h5", ".hdf5", ".zarr.zip",
    # Archives inside of an archive.
    ".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar", ".dcm.gz",
)  # fmt: skip
DICOM = (".dcm", ".ima", ".dicom")
_SHADOWS = ("._", "__MACOSX")
"""What macOS leaves in archives."""


def kinds(paths: Iterable[Path]) -> Counter[str]:
    """How many files there are of each ending that stands for an image of a kind that is not read."""
    found: Counter[str] = Counter()
    known = sorted(IMAGES + DICOM, key=len, reverse=True)
    for path in paths:
        if path.name.startswith(_SHADOWS[0]) or _SHADOWS[1] in path.parts:
            continue
        name = path.name.lower()
        ending = next((ending for ending in known if name.endswith(ending) and name != ending), None)
        if ending is not None:
            found[ending] += 1
    return found


def notes(paths: Iterable[Path]) -> tuple[str, ...]:
    """What to say of the files that are neither DICOM nor NIfTI nor NRRD; () if there is nothing to say."""
    found = kinds(paths)
    broken = {ending: found.pop(ending) for ending in DICOM if ending in found}
    said = []
    if found:
        what = _listed(found, "is of a kind that is", "are of kinds that are")
        said.append(f"{what} not read; convert images to DICOM or NIfTI, unpack archives")
    if broken:
        said.append(f"{_listed(broken, 'is no DICOM by what it holds', 'are no DICOM by what they hold')} (damaged or cut off?)")
    return tuple(said)


def _listed(found: dict[str, int], one: str, many: str) -> str:
    shown = ", ".join(f"{count} {ending}" for ending, count in sorted(found.items(), key=lambda item: (-item[1], item[0])))
    return f"{shown} file {one}" if sum(found.values()) == 1 else f"{shown} files {many}"
