"""`hvd-imaging labels`: right figures, pictures, and nobody's name anywhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from contours import trace, write_structure_set
from PIL import Image
from test_sources_dicom import make_slice, write

from hvd_imaging.config import LabelsConfig
from hvd_imaging.reporting import annotations
from hvd_imaging.sources import catalog

PATIENT, READERS, SECRET = "JANE-DOE-77", ("Quincy^Xavier", "Wolfram^Adalberta"), "Rumpelstilz"
AFFINE = np.array([[0, 0, 2.0, -30], [0, 2.0, 0, -30], [5.0, 0, 0, 0], [0, 0, 0, 1.0]])
SHAPE = (8, 30, 32)


def ball(centre, radius) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    return np.linalg.norm((index - np.array(centre)) * (2.5, 1, 1), axis=-1) < radius


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Two series: two readers and an empty region; and one reader whose region has a patient's name."""
    root = tmp_path_factory.mktemp("archive") / SECRET
    random = np.random.default_rng(1)
    for number, series in enumerate(("1.2.3.4", "1.2.3.5")):
        pixels = random.integers(900, 1100, SHAPE, dtype=np.int16)
        slices = [
            make_slice(5 * z, pixels[z], (-30, -30, 5 * z), spacing=(2, 2), series=series, PatientID=f"{PATIENT}{number}")
            for z in range(SHAPE[0])
        ]
        write(root / f"{PATIENT}{number}", slices)
    one, two = ball((4, 14, 14), 8), ball((4, 16, 14), 8)
    write_structure_set(root / "m1", {"liver": trace(one, AFFINE), "cyst": []}, "1.2.3.4", OperatorsName=READERS[0], ApprovalStatus="APPROVED")
    write_structure_set(root / "m2", {"liver": trace(two, AFFINE)}, "1.2.3.4", OperatorsName=READERS[1], ApprovalStatus="BY " + SECRET.upper()[:8])
    write_structure_set(root / "m3", {f"GTV {SECRET}": trace(two, AFFINE)}, "1.2.3.5")
    broken = write_structure_set(root / f"{PATIENT}.dcm", {"liver": []}, "1.2.3.99")
    assert broken.is_file()
    return root, one, two


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "hvd_imaging.cli.main", "labels", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)


def test_report(archive, tmp_path):
    root, one, two = archive
    done = run(root, "--out", tmp_path / "report", "--json")
    assert done.returncode == 10, done.stderr
    summary = json.loads(done.stdout)
    assert json.loads((tmp_path / "report" / "labels.json").read_text()) == summary
    ml = 0.02 * np.count_nonzero(one & two)
    assert summary["labels"]["liver"] == {"cases": 1, "empty": 0, "ml": {"median": round(ml, 3), "min": round(ml, 3), "max": round(ml, 3)}}
    assert summary["labels"]["cyst"] == {"cases": 1, "empty": 1, "ml": None}
    liver = summary["agreement"]["liver"]
    assert liver["annotators"] == ["annotator 1", "annotator 2", annotations.CONSENSUS]
    expected = 2 * np.count_nonzero(one & two) / (np.count_nonzero(one) + np.count_nonzero(two))
    assert liver["dice"][0][1] == liver["dice"][1][0] == round(expected, 4) and liver["dice"][0][0] is None
    assert liver["cases"][0][1] == 1
    assert summary["review"] == {"APPROVED": 1, "not told": 1, "other": 1}
    assert [item["reason"] for item in summary["problems"]] == ["RTSTRUCT of a series that is not in this folder"]
    # What is given away: a page, its figures, pictures; the list of names is for its owner.
    texts = [done.stdout, done.stderr, str(sorted(path.name for path in (tmp_path / "report").rglob("*")))]
    texts += [path.read_bytes().decode("latin-1") for path in (tmp_path / "report").rglob("*") if path.is_file()]
    for secret in (PATIENT, SECRET, *(part for name in READERS for part in name.split("^")), "1.2.3.4", "1.2.3.5"):
        assert not any(secret.lower() in text.lower() for text in texts), secret
    private = tmp_path / "report.files.json"
    assert private.stat().st_mode & 0o077 == 0 and f"GTV {SECRET}" in json.loads(private.read_text()).values()


def test_page_is_whole_and_pictures_show_the_outlines(archive, tmp_path):
    root, one, two = archive
    assert run(root, "--out", tmp_path / "page.html", "--key-file", tmp_path / "key").returncode == 10
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"<script|<link|https?://|src=\"(?!data:)", page) and page.count("<img") == 2
    assert "default-src 'none'" in page
    again = run(root, "--out", tmp_path / "page.html")
    assert again.returncode == 2 and "exists already" in again.stderr
    found = catalog.choose(catalog.scan(root), LabelsConfig())
    volume, mask = catalog.load_case(found.cases[0], found)
    path = tmp_path / "a.png"
    path.write_bytes(annotations.draw_case(volume, mask))
    drawn = np.asarray(Image.open(path).convert("RGB")).astype(int)
    wanted = np.array([int(annotations.colour(found.classes.index("liver"))[i : i + 2], 16) for i in (1, 3, 5)])
    assert (np.abs(drawn - wanted).sum(-1) < 30).sum() > 200
    path.write_bytes(annotations.draw_case(volume, np.zeros_like(mask)))
    assert (np.abs(np.asarray(Image.open(path).convert("RGB")).astype(int) - wanted).sum(-1) < 30).sum() == 0


def test_without_matplotlib(archive, tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from hvd_imaging.cli.main import main; main()"
    arguments = ["labels", str(archive[0]), "--out", str(tmp_path / "page.html")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 6 and "pip install hvd_imaging[train]" in done.stderr and "Traceback" not in done.stderr
    assert subprocess.run([sys.executable, "-c", code, *arguments[:2]], capture_output=True, check=False, timeout=60).returncode == 10


def test_names_in_the_page_are_text():
    case = annotations.Examined("file-1", "CT", (1, 2, 3), (1, 1, 1), {"<b>": float("nan")}, notes=("<script>",))
    found = catalog.Catalog("segmentation", ("background", "<b>"), (), ())
    summary = annotations.summarize([case], found, [("file-2", "<i>")])
    assert summary["labels"]["<b>"] == {"cases": 1, "empty": 0, "ml": None} and summary["per_case"][0]["ml"] == {"<b>": None}
    page = annotations.page(summary, [case])
    assert "<b>" not in page and "<script" not in page and "<i>" not in page and "&lt;b&gt;" in page


def test_text_and_what_is_refused(archive, tmp_path):
    root, _, _ = archive
    done = run(root)
    assert done.returncode == 10 and "liver: mean Dice (cases)" in done.stdout and "review: APPROVED 1" in done.stdout
    assert run(root / "m1").returncode == 2
    (tmp_path / "empty").mkdir()
    empty = run(tmp_path / "empty")
    assert empty.returncode == 3 and "no DICOM or NIfTI images" in empty.stderr and "Traceback" not in empty.stderr


def test_unreadable_annotation_is_told_by_reference(archive, tmp_path):
    for z in range(3):
        d = make_slice(5.0 * z, np.full((6, 6), 7, np.int16), (-30, -30, 5 * z), spacing=(2, 2))
        (tmp_path / "a" / "ct").mkdir(parents=True, exist_ok=True)
        d.save_as(tmp_path / "a" / "ct" / f"{PATIENT}{z}", enforce_file_format=True)
    write_structure_set(tmp_path / "a" / f"{PATIENT}.dcm", {"liver": [[(-30, -30, 2), (-25, -30, 2), (-25, -25, 4.8)]]}, "1.2.3.4")
    done = run(tmp_path / "a", "--json")
    (problem,) = json.loads(done.stdout)["problems"]
    assert done.returncode == 10 and "oblique" in problem["reason"] and PATIENT not in done.stdout + done.stderr
    assert pydicom.dcmread(next((tmp_path / "a" / "ct").iterdir())).PatientID not in done.stdout
    assert isinstance(Path(problem["file"]), Path) and problem["file"].startswith("file-")
