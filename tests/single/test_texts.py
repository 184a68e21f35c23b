"""JSON, YAML, CSV and npz from outside: what is within the bounds is read as by any other reader, what is beyond is refused at once."""

from __future__ import annotations

import io
import json
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hvd_imaging import limits, npz, texts
from hvd_imaging.texts import TextError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_json_is_read_as_it_was_written(value):
    assert texts.parse_json(json.dumps(value)) == value
    assert texts.parse_json(json.dumps(value).encode()) == value


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=8), st.integers() | st.text("abc ", max_size=20) | st.lists(st.booleans()), max_size=4))
def test_yaml_is_read_as_it_was_written(value):
    assert texts.parse_yaml(yaml.safe_dump(value)) == value


DEEP = {
    "lists": "[" * 100_000 + "]" * 100_000, "objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "within Python's limit": "[" * 400 + "]" * 400, "just beyond": "[" * 65 + "]" * 65, "open": "[" * 1_000_000,
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("parse", [texts.parse_json, texts.parse_yaml])
def test_depth(parse, name):
    text = DEEP[name] if parse is texts.parse_json else DEEP[name][:1_000_000]
    with pytest.raises(TextError, match="nested more than 64 deep|not JSON|not valid YAML"):
        parse(text)
    assert parse("[" * 64 + "]" * 64)


@pytest.mark.parametrize("parse", [texts.parse_json, texts.parse_yaml])
@pytest.mark.parametrize("digits", [301, 5000, 200_000])
def test_digits(parse, digits):
    with pytest.raises(TextError, match="digits"):
        parse('{"a": -1' + "0" * digits + "}")
    assert parse('{"a": 1' + "0" * 299 + "}") == {"a": 10**299}


def laughs(levels, wide=10):
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * wide)}]" for n in range(1, levels)]
    return "\n".join(lines)


REFUSED = {
    "aliases of aliases": (laughs(9), "more than 100000 nodes"),
    "long texts repeated": ("a: &a " + "x" * 300_000 + "\nb: [" + ", ".join(["*a"] * 50) + "]", "nodes"),
    "an alias within itself": ("a: &a [1, *a]", "inside of what it stands for"),
    "a key twice": ("a: 1\na: 2", "stands here twice"),
    "a list as a key": ("? [a]\n: 1", "plain word"),
    "a tag": ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "no such day": ("a: 2026-13-45", "not valid YAML"),
    "sexagesimal": ("a: 1" + ":10" * 200, "digits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_yaml_refused(name):
    text, why = REFUSED[name]
    begin = time.process_time()
    with pytest.raises(TextError, match=why):
        texts.parse_yaml(text)
    assert time.process_time() - begin < 60  # seconds where it would be hours


def test_aliases_stay_usable():
    assert texts.parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}


def test_items():
    with pytest.raises(TextError, match="more than 10000000 items"):
        texts.parse_json("[" + "0," * 10_000_001 + "0]")


TABLES = {
    "a quote that is not closed": ('PatientID,label\nA,"benign\nB,malign\nC,benign\n', 2),
    "a line break in a cell": ('PatientID,label\nA,x\nB,"be\nnign"\n', 3),
    "a carriage return": ('PatientID,label\nA,"be\rnign"\n', 2),
    "an escape": ("PatientID,label\nA,\x1b[31mred\n", 2),
    "text turned around": ("PatientID,label\nA,b\u202egnineb\n", 2),
    "NUL": ("PatientID,label\nA,b\0\n", 2),
    "text behind a quote": ('PatientID,label\nA,"be"nign\n', 2),
    "a long cell": ("PatientID,label\nA,x\nB," + "x" * 1025 + "\n", 3),
    "a very long cell": ("PatientID,label\nA," + "x" * 200_000 + "\n", 2),
    "a quote in the header": ('PatientID,"label\nA,b\n', 1),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_refused(name):
    text, line = TABLES[name]
    with pytest.raises(TextError) as caught:
        texts.parse_csv(text)
    assert caught.value.line == line
    assert "benign" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables(end, delimiter):
    text = end.join(delimiter.join(row) for row in (["PatientID", " Label "], ["A", '"a ""b"""'], [""], ["B", " c,d;e "] if delimiter == "\t" else ["B", "c"]))
    table = texts.parse_csv(text)
    assert table.header == ("patientid", "label")
    assert [line for line, _ in table.rows] == [2, 4]
    assert table.rows[0][1] == ("A", 'a "b"')
    assert texts.parse_csv("") == texts.Table((), ())


def test_files(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')  # as Windows' editors write it
    assert texts.read_json(path) == {"a": 1}
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(TextError, match="not UTF-8"):
        texts.read_json(path)
    with open(path, "wb") as file:
        file.truncate(texts.LARGEST_YAML + 1)
    with pytest.raises(TextError, match="larger than 1 MiB"):
        texts.read_yaml(path)
    with pytest.raises(FileNotFoundError):
        texts.read_json(tmp_path / "none")


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TextError, match="not a plain file"):
        texts.read_json(tmp_path / "pipe")
    with pytest.raises((TextError, OSError)):
        texts.read_json(tmp_path)


# --- npz ----------------------------------------------------------------------------------------------------------------


def npy(shape, descr="<f4", data=b""):
    head = ("{'descr': %r, 'fortran_order': False, 'shape': %r, }" % (descr, shape)).encode()  # noqa: UP031
    head += b" " * (63 - (len(head) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data


def packed(path: Path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_npz(tmp_path):
    arrays = {"a": np.arange(24.0).reshape(2, 3, 4), "b": np.zeros(0, np.uint8), "c": np.array("text"), "d": np.asfortranarray(np.eye(3))}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        found = npz.read(tmp_path / "a.npz")
        assert found.keys() == arrays.keys() and all(np.array_equal(found[name], arrays[name]) for name in arrays)


def test_npz_refused(tmp_path, monkeypatch):
    bad = {
        "claims": {"a.npy": npy((1 << 40,))},
        "shape overflows": {"a.npy": npy((1 << 40, 1 << 40))},
        "negative": {"a.npy": npy((-1, 4), data=bytes(16))},
        "objects": {"a.npy": npy((1,), "|O", b"cos\nsystem\n.")},
        "bomb": {"a.npy": npy((2 << 30,), "|u1", bytes(1 << 20))},
        "no array": {"a.npy": b"text"},
    }
    for members in bad.values():
        with pytest.raises(ValueError):
            npz.read(packed(tmp_path / "a.npz", members))
    big = io.BytesIO()
    np.save(big, np.zeros(20 << 20, np.uint8))
    monkeypatch.setattr(limits, "FREELY", 10 << 20)
    with pytest.raises(ValueError, match="would unpack"):
        npz.read(packed(tmp_path / "a.npz", {"a.npy": big.getvalue()}, zipfile.ZIP_DEFLATED))
    for damage in (b"", b"PK\x03\x04", b"x" * 1000):
        (tmp_path / "a.npz").write_bytes(damage)
        with pytest.raises(ValueError):
            npz.read(tmp_path / "a.npz")
