"""One process of `bench ingest`: what it reads, and the seconds for it as the last line."""

from __future__ import annotations

import sys
import time
from pathlib import Path


def _pydicom(archive: Path, out: Path) -> float:
    import pydicom
    import pydicom.pixels

    start = time.perf_counter()
    for path in sorted(archive.rglob("*.dcm")):
        _ = pydicom.dcmread(path).pixel_array
    return time.perf_counter() - start


def _nibabel(archive: Path, out: Path) -> float:
    import nibabel
    import numpy as np

    start = time.perf_counter()
    for path in sorted(archive.rglob("*.nii.gz")):
        np.asarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]
    return time.perf_counter() - start


def _simpleitk(archive: Path, out: Path) -> float:
    import SimpleITK

    start = time.perf_counter()
    for folder in sorted(archive.iterdir()):
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        SimpleITK.GetArrayViewFromImage(reader.Execute())
    return time.perf_counter() - start


def _dicom2nifti(archive: Path, out: Path) -> float:
    import dicom2nifti

    start = time.perf_counter()
    dicom2nifti.convert_directory(str(archive), str(out), compression=False, reorient=False)
    return time.perf_counter() - start


def _ours(archive: Path, out: Path) -> float:
    import blosc2  # noqa: F401  imported late by the writer
    import numpy as np
    import xxhash  # noqa: F401

    from ..bootstrap import keep_freed_memory
    from ..communicator import connect
    from ..config import IngestConfig
    from ..ingest import ingest
    from ..shards import kernel
    from ..shards.chunks import Layout
    from ..shards.packing import pack_array

    keep_freed_memory()
    array = np.zeros((32, 512, kernel.ENOUGH // (32 * 512)), np.uint8)
    for compression in ("none", "lz4"):  # compiled once for an installation
        pack_array(array, Layout((32, 4, 64), (1, 4, 64)), compression, lambda place, data: None)
    communicator = connect()
    communicator.barrier()
    start = time.perf_counter()
    result = ingest(archive, out / "dataset", IngestConfig(), task="unlabelled", communicator=communicator)
    communicator.barrier()
    seconds = time.perf_counter() - start
    if result.quarantined:  # what is left out costs no time
        sys.exit(f"{len(result.quarantined)} series were set aside: {result.quarantined[0].reason}")
    return seconds


if __name__ == "__main__":
    system, archive, out = sys.argv[1:]
    systems = {"pydicom": _pydicom, "nibabel": _nibabel, "SimpleITK": _simpleitk, "dicom2nifti": _dicom2nifti, "ours": _ours}
    seconds = systems[system](Path(archive), Path(out))
    from ..world import world_from_environment

    if world_from_environment().is_root:
        print(seconds)
