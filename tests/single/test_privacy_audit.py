"""The search finds what is there, in whatever spelling, and says nothing of it."""

import gzip
import json

import h5py
import planted

from hvd_imaging.privacy import audit, folder
from hvd_imaging.privacy.audit import find_identifiers, rare_combinations, spellings
from hvd_imaging.privacy.profile import Options


def test_spellings_of_names_and_dates():
    assert {"Meier^Anna", "Anna Meier", "Anna_Meier", "Meier, Anna"} <= set(spellings("Meier^Anna"))
    assert {"19620312", "1962-03-12", "12.03.1962", "03/12/1962"} <= set(spellings("19620312"))
    assert spellings("19629912") == ["19629912"]


def test_found_in_text_json_hdf5_gzip_and_names(tmp_path):
    (tmp_path / "a.txt").write_bytes("Herr MÜLLER^Jörg".encode("latin-1"))
    (tmp_path / "b.json").write_text(json.dumps({"who": "anna meier", "born": "1962-03-12"}))
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.attrs["note"] = "PAT-4711"
    (tmp_path / "d.gz").write_bytes(gzip.compress(b"x" * 100 + b"PAT-4711"))
    (tmp_path / "e.bin").write_bytes("Anna Meier".encode("utf-16"))
    (tmp_path / "pat-4711.dat").write_bytes(b"")
    found = find_identifiers(tmp_path, ["MÜLLER^Jörg", "Meier^Anna", "19620312", "PAT-4711", "abc"])
    assert {(f.identifier, f.file) for f in found} == {(0, 0), (1, 1), (2, 1), (3, 2), (3, 3), (1, 4), (3, 5)}
    assert [f.offset for f in found if f.kind == "compressed content"] == [100]
    assert "4711" not in repr(found) and "eier" not in repr(found)
    assert find_identifiers(tmp_path, ["ab"]) == []


def test_found_across_the_border_of_two_pieces_once(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "_PIECE", 7)
    (tmp_path / "a").write_bytes(b"..... PAT-4711 and PAT-4711")
    assert [f.offset for f in find_identifiers(tmp_path, ["PAT-4711"])] == [6, 19]


def test_nothing_of_a_planted_archive_is_found_in_its_copy(tmp_path):
    identifiers = planted.plant(tmp_path / "archive", 11)
    folder.run(tmp_path / "archive", tmp_path / "copies" / "out", Options(), tmp_path / "key")
    # One inside a longer one is found as the longer one.
    whole = {n for n, value in enumerate(identifiers) if not any(value in other != value for other in identifiers)}
    assert len(whole) > 300
    missed = whole - {f.identifier for f in find_identifiers(tmp_path / "archive", identifiers)}
    drawn = 2 * 3 * 3  # those in pixels: of two objects, three frames, three a frame
    assert len(missed) == drawn
    (tmp_path / "copies" / "out.files.json").unlink(missing_ok=True)
    assert find_identifiers(tmp_path / "copies", identifiers) == []


def test_rare_combinations_count_patients_not_samples():
    rows = [("a", ("CT", "north")), ("a", ("CT", "north")), ("b", ("CT", "north")), ("c", ("MR", "north"))]
    assert rare_combinations(rows, 2) == [(("MR", "north"), 1)]
    assert rare_combinations(rows, 3) == [(("MR", "north"), 1), (("CT", "north"), 2)]
    assert rare_combinations([], 5) == []
