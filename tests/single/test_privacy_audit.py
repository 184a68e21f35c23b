"""The search finds what is there, in whatever spelling, and says nothing of it."""

import gzip
import json
import unicodedata

import h5py
import numpy as np
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


def test_found_however_it_is_written_and_packed(tmp_path):
    import zipfile

    import pydicom
    from PIL import Image, PngImagePlugin
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    from hvd_imaging.shards import content

    known = ["MÜLLER^Jörg", "PAT-471199", "A&B-4711"]
    (tmp_path / "a.json").write_text(json.dumps({"who": "Müller^Jörg"}))
    (tmp_path / "b.html").write_text("<td>a&amp;b-4711</td> file?name=m%C3%BCller%5Ej%C3%B6rg")
    with zipfile.ZipFile(tmp_path / "c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pat-471199/notes", "x" * 200 + "Jörg MÜLLER")
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "PAT-471199 " * 3, zip=True)
    text.add_itxt("Who", "Müller^Jörg" * 3, "de", "wer", zip=True)
    Image.new("L", (4, 4)).save(tmp_path / "d.png", pnginfo=text)
    ds = planted._image(planted._Names(0), "PAT-471199", 0)
    ds.StudyInstanceUID = ds.SeriesInstanceUID = "1.2"
    planted._save(ds, tmp_path / "e.dcm", planted._Names(0), DeflatedExplicitVRLittleEndian)
    assert pydicom.dcmread(tmp_path / "e.dcm").PatientID == "PAT-471199"
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file.create_dataset("text", data=np.frombuffer(b"." * 5000 + b"PAT-471199" + b"." * 5000, np.uint8), compression="gzip")
        file.create_dataset("short", data=np.frombuffer(b"." * 5000 + b"4711" + b"." * 5000, np.uint8), compression="gzip")
        file.create_dataset("names", data=["x" * 500, "Jörg Müller"], dtype=h5py.string_dtype(), chunks=(2,), compression="gzip")
        file["short"].attrs["note"] = np.bytes_(b"A&B-4711")
    (tmp_path / unicodedata.normalize("NFD", "Müller^Jörg")).write_text("")
    found = find_identifiers(tmp_path, [*known, "4711"], content.texts, content.values)
    files = sorted(tmp_path.rglob("*"))
    places = {(f.identifier, files[f.file].name[:1], f.kind) for f in found}
    packed = "compressed content"
    assert places >= {(0, "a", "content"), (2, "b", "content"), (0, "b", "content"), (1, "c", packed), (0, "c", packed),
                      (1, "d", packed), (0, "d", packed), (1, "e", packed), (1, "f", packed), (0, "f", packed),
                      (2, "f", packed), (0, "M", "name")}  # fmt: skip
    # Four figures among voxels are chance.
    assert not [f for f in found if f.identifier == 3 and files[f.file].name == "f.h5"]


def test_damaged_packing_is_no_crash(tmp_path):
    for name, start in (("a.gz", b"\x1f\x8b"), ("b.zip", b"PK\x03\x04"), ("c.png", b"\x89PNG\r\n\x1a\n\0\0\0\x05zTXt"), ("d.dcm", bytes(128) + b"DICM" + b"1.2.840.10008.1.2.1.99")):
        (tmp_path / name).write_bytes(start + b"PAT-4711" * 3)
    assert len(find_identifiers(tmp_path, ["PAT-4711"])) == 4 * 3


def test_the_longest_word_at_a_place_and_none_inside_it(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"meier-4711-b meier 4711- 4711-b")
    for piece in (3, 5, 1 << 20):
        monkeypatch.setattr(audit, "PIECE", piece)
        found = find_identifiers(tmp_path, ["4711-b", "meier-4711", "4711"])
        assert [(f.identifier, f.offset) for f in found] == [(1, 0), (2, 19), (0, 25)]


def test_found_across_the_border_of_two_pieces_once(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "PIECE", 7)
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
