"""Every file of public collections is read, or set aside with a right reason; docs/dicom-conformance.md says which.

``python tests/single/test_dicom_conformance.py`` writes the tables of that page again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import data_store
import numpy as np
import pydicom
import pytest
from pydicom.uid import UID

from hvd_imaging.errors import SourceError
from hvd_imaging.sources.dicom import group_headers, read_header, read_series, walk

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "dicom-conformance.md"
COLLECTIONS = {
    "pydicom": Path(pydicom.__file__).parent / "data",
    "pydicom-data": Path(data_store.__file__).parent / "data",
    "brain_series": REPOSITORY.parent / "shared" / "data" / "brain_series",
}
FOLDERS = {"pydicom": ("charset_files", "palettes", "test_files")}
CODINGS = {
    "1.2.840.10008.1.2": "implicit",
    "1.2.840.10008.1.2.1": "explicit",
    "1.2.840.10008.1.2.1.99": "deflated",
    "1.2.840.10008.1.2.2": "big endian",
    "1.2.840.10008.1.2.4.50": "JPEG baseline",
    "1.2.840.10008.1.2.4.51": "JPEG extended",
    "1.2.840.10008.1.2.4.57": "JPEG lossless",
    "1.2.840.10008.1.2.4.70": "JPEG lossless SV1",
    "1.2.840.10008.1.2.4.80": "JPEG-LS",
    "1.2.840.10008.1.2.4.81": "JPEG-LS near-lossless",
    "1.2.840.10008.1.2.4.90": "JPEG 2000 lossless",
    "1.2.840.10008.1.2.4.91": "JPEG 2000",
    "1.2.840.10008.1.2.5": "RLE",
}


def files(collection: str) -> list[Path]:
    root = COLLECTIONS[collection]
    return [
        path
        for path in walk(root)
        if collection not in FOLDERS or path.relative_to(root).parts[0] in FOLDERS[collection]
    ]


def outcome(path: Path, root: Path) -> tuple[str, str]:
    """(what it is, what becomes of it) of one file alone."""
    header = read_header(path, root)
    scan = group_headers([header], root)
    coding = CODINGS.get(header.syntax, UID(header.syntax).name if header.syntax else "")
    if header.kind == "not_dicom":
        return "not DICOM, or not to be known as such", "counted"
    if header.kind == "other":
        return "DICOM without an image", "counted"
    if header.kind == "rejected":
        return "DICOM", f"set aside: {header.reason}"
    if header.kind in ("seg", "rtstruct"):
        return header.kind.upper(), f"read as masks of another series: {len(header.labels)} label(s)"
    what = f"{header.modality or 'no Modality'}, {header.photometric}, {coding}"
    results = []
    for series in scan.series:
        try:
            volume = read_series(series)
        except SourceError as error:
            results.append(f"set aside: {str(error).removeprefix(header.name).lstrip(': ')}")
            continue
        size = " x ".join(map(str, volume.array.shape))
        place = {"patient": "placed", "image": "sized", "none": "pixels"}[volume.geometry]
        results.append(f"read: {f'{series.part}: ' if series.part else ''}{size}, {place}")
    assert len(results) == 1 or all(result.startswith("read") for result in results)
    return what, "; ".join(results)


def table(collection: str) -> str:
    """Rows of a collection; neighbours with one outcome share a row."""
    rows: list[tuple[list[str], tuple[str, str]]] = []
    root = COLLECTIONS[collection]
    for path in files(collection):
        result = outcome(path, root)
        name = path.relative_to(root).as_posix().replace("test_files/", "", 1)
        if rows and rows[-1][1] == result:
            rows[-1][0].append(name)
        else:
            rows.append(([name], result))
    lines = ["| File | What | Outcome |", "|---|---|---|"]
    for names, (what, result) in rows:
        first = names[0] if len(names) < 3 else f"{names[0]} to {names[-1].rsplit('/', 1)[-1]} ({len(names)} files)"
        lines.append(f"| {first if len(names) != 2 else ', '.join(names)} | {what} | {result} |")
    return "\n".join(lines)


def between(text: str, collection: str) -> str:
    start, end = f"<!-- table {collection} -->", f"<!-- end {collection} -->"
    return text.split(start)[1].split(end)[0].strip("\n")


@pytest.mark.parametrize("collection", COLLECTIONS)
def test_the_page_says_what_becomes_of_every_file(collection):
    if not COLLECTIONS[collection].is_dir():
        pytest.skip("the real images of ../shared/data are not on this machine")
    assert between(PAGE.read_text(encoding="utf-8"), collection) == table(collection), (
        f"write it again: python {Path(__file__).relative_to(REPOSITORY)}"
    )


def image(collection: str, name: str) -> np.ndarray:
    root = COLLECTIONS[collection]
    (series,) = group_headers([read_header(root / name, root)], root).series
    return read_series(series).array


ALIKE = [
    ("test_files/MR_small.dcm", "test_files/MR_small_RLE.dcm", 0),
    ("test_files/MR_small.dcm", "test_files/MR_small_bigendian.dcm", 0),
    ("test_files/MR_small.dcm", "test_files/MR_small_implicit.dcm", 0),
    ("test_files/MR_small.dcm", "test_files/MR_small_jp2klossless.dcm", 0),
    ("test_files/MR_small.dcm", "test_files/MR_small_jpeg_ls_lossless.dcm", 0),
    ("test_files/693_J2KI.dcm", "693_UNCI.dcm", 0),
    ("693_UNCR.dcm", "693_J2KR.dcm", 0),
    ("MR2_UNCR.dcm", "MR2_J2KR.dcm", 0),
    ("RG1_UNCR.dcm", "RG1_J2KR.dcm", 0),
    ("US1_UNCR.dcm", "US1_J2KR.dcm", 0),
    ("US1_UNCI.dcm", "US1_J2KI.dcm", 1),
    ("OBXXXX1A.dcm", "OBXXXX1A_rle.dcm", 0),
    ("OBXXXX1A.dcm", "OBXXXX1A_expb.dcm", 0),
    ("OBXXXX1A_2frame.dcm", "OBXXXX1A_rle_2frame.dcm", 0),
    ("SC_rgb.dcm", "test_files/SC_rgb_rle.dcm", 0),
    ("SC_rgb.dcm", "SC_rgb_expb.dcm", 0),
    ("SC_rgb.dcm", "test_files/SC_rgb_jpeg_gdcm.dcm", 0),
    ("SC_rgb.dcm", "test_files/SC_rgb_gdcm_KY.dcm", 3),
    ("SC_rgb.dcm", "SC_ybr_full_uncompressed.dcm", 3),
    ("SC_rgb.dcm", "test_files/SC_rgb_jpeg_dcmtk.dcm", 40),
    ("SC_rgb.dcm", "test_files/SC_rgb_dcmtk_+eb+cr.dcm", 40),
    ("SC_rgb_16bit_2frame.dcm", "test_files/SC_rgb_rle_16bit_2frame.dcm", 0),
    ("color-pl.dcm", "color-px.dcm", 0),
]


@pytest.mark.parametrize(("one", "other", "most"), ALIKE)
def test_codings_of_one_image_give_one_image(one, other, most):
    """Lossless ones to the bit; lossy ones in most of their pixels."""
    a, b = (image("pydicom" if name.startswith("test_files") else "pydicom-data", name) for name in (one, other))
    assert a.shape == b.shape
    assert np.percentile(np.abs(a - b), 95) <= most


@pytest.mark.shared
def test_a_real_jpeg_lossless_file_is_read(shared_data):
    values = image("brain_series", "jpeg_lossless_sel1.dcm")
    assert values.shape == (1, 400, 512) and values.min() < 0 < values.max()


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for collection, folder in COLLECTIONS.items():
        if folder.is_dir():
            start, end = f"<!-- table {collection} -->", f"<!-- end {collection} -->"
            text = f"{text.split(start)[0]}{start}\n{table(collection)}\n{end}{text.split(end)[1]}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
