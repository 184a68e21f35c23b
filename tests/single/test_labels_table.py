"""Labels of a CSV: what is one class, and what cannot be told."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_sources_dicom import make_slice, write

from hvd_imaging.config import IngestConfig
from hvd_imaging.errors import SourceError
from hvd_imaging.ingest import ingest
from hvd_imaging.sources import catalog
from hvd_imaging.sources.labels.table import read_labels_csv, unify


@pytest.mark.parametrize(
    ("written", "classes"),
    [
        (["0.0", "1.0", "1"], ["0", "1", "1"]),
        (["01", "1", "2", "+2", "2."], ["1", "1", "2", "2", "2"]),
        (["-1", "1.0", "-1.00"], ["-1", "1", "-1"]),
        (["1,0", "0"], ["1", "0"]),
        (["10", "9"], ["10", "9"]),
        (["TRUE", "true", "False"], ["true", "true", "false"]),
        (["healthy", "ill"], ["healthy", "ill"]),
        (["T1a", "01", "02"], ["T1a", "01", "02"]),
        (["none", "mild"], ["none", "mild"]),
    ],
)
def test_one_class_however_it_is_written(written, classes):
    found = unify(set(written))
    assert [found[label] for label in written] == classes


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["0.5", "1"], "'0.5': expected whole numbers"),
        (["1e3", "1"], "'1e3': expected whole numbers"),
        (["healthy", "Healthy"], "'Healthy' and 'healthy'"),
        (["healthy", "1", "1.0"], "'1' and '1.0'"),
        (["healthy", "01", "1"], "'01' and '1'"),
        (["true", "1", "0"], "true or false in some rows and numbers in others"),
    ],
)
def test_what_can_not_be_told(written, expected):
    with pytest.raises(SourceError, match=expected):
        unify(set(written))


@pytest.mark.parametrize("cell", ["nan", "NaN", "<NA>", "NA", "n/a", "NULL"])
def test_missing_values_are_no_class(tmp_path, cell):
    (tmp_path / "l.csv").write_text(f"PatientID,label\na,1\nb,{cell}\n")
    with pytest.raises(SourceError, match=r"l\.csv: row 3: the label is .*, which stands for no value"):
        read_labels_csv(tmp_path / "l.csv")


def test_blanks_and_the_same_label_twice(tmp_path):
    (tmp_path / "l.csv").write_text("PatientID;label\n a ; 1.0 \na;01\nb;  2\nc;big  mass\n".replace("c;big  mass\n", ""))
    table = read_labels_csv(tmp_path / "l.csv")
    assert table.classes == ("1", "2") and table.labels == {"a": 0, "b": 1}
    (tmp_path / "l.csv").write_text("PatientID,label\na,big  mass\nb, big mass \nc,none\n")
    assert read_labels_csv(tmp_path / "l.csv").labels == {"a": 0, "b": 0, "c": 1}


@pytest.fixture()
def archive(tmp_path):
    root = tmp_path / "in"
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 2000, (8, 8), dtype=np.int16)
        write(root / f"p{number}", [make_slice(z, pixels, series=f"1.2.{number + 5}", PatientID=f"P{number}") for z in (0, 2, 4)])
    return root


def test_one_class_is_an_error(archive, tmp_path):
    (archive / "labels.csv").write_text("PatientID,label\n" + "".join(f"P{n},{v}\n" for n, v in enumerate(("1", "1.0", "01", "1"))))
    for labels in (None, archive / "labels.csv"):
        with pytest.raises(SourceError, match=r"labels\.csv: all 4 labels are '1': classification needs at least two classes"):
            catalog.scan(archive, labels)
    with pytest.raises(SourceError, match="two classes"):
        ingest(archive, tmp_path / "d", IngestConfig())
    assert not (tmp_path / "d").exists()
    assert catalog.scan(archive, task="unlabelled").task == "unlabelled"


def test_one_class_that_is_left_is_an_error_too(archive, tmp_path):
    (archive / "labels.csv").write_text("PatientID,label\nP0,no\nP1,no\nP2,no\nP3,yes\n")
    ingest(archive, tmp_path / "a", IngestConfig())
    damaged = archive / "p3" / "f001"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    with pytest.raises(SourceError, match=r"one class only: all 3 usable inputs are 'no', 1 others were set aside \(.*truncated") as caught:
        ingest(archive, tmp_path / "b", IngestConfig())
    assert "p3" not in str(caught.value)
    # As the next version of a data set that has both.
    with pytest.raises(SourceError, match="one class only"):
        ingest(archive, tmp_path / "b", IngestConfig(), parent=tmp_path / "a")
    assert not (tmp_path / "b").exists() and json.loads((tmp_path / "a" / "manifest.json").read_text())["classes"] == ["no", "yes"]
