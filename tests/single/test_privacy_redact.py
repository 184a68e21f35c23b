"""No file name of the archive in a message; the owner of the key can still find the file."""

import json
import stat

from hvd_imaging.privacy.redact import Redactor

KEY = bytes(range(32))


def test_a_reference_depends_on_key_and_place_only(tmp_path):
    redactor = Redactor(KEY, tmp_path)
    one = redactor.reference("Meier/IM1.dcm")
    assert one == redactor.reference(tmp_path / "Meier" / "IM1.dcm") == Redactor(KEY, "other").reference("Meier/IM1.dcm")
    assert one.startswith("file-") and len(one) == 15
    assert Redactor(bytes(32), tmp_path).reference("Meier/IM1.dcm") != one != redactor.reference("Meier/IM2.dcm")


def test_every_mention_is_replaced(tmp_path):
    redactor = Redactor(KEY, tmp_path)
    path = tmp_path / "Meier^Anna" / "1962" / "Meier 2019.dcm"
    message = (
        f"{path}: bad; Meier^Anna/1962/Meier 2019.dcm: bad; Meier 2019.dcm is bad; folder Meier^Anna of {tmp_path}; "
        f"'Meier 2019' and 1962; expected 2 frames"
    )
    text = redactor.text(message, [path])
    assert "Meier" not in text and "1962" not in text and str(tmp_path) not in text
    assert text.startswith(f"{redactor.reference(path)}: bad; {redactor.reference(path)}: bad; ")
    assert text.endswith("expected 2 frames") and redactor.folder("Meier^Anna") in text


def test_words_that_only_contain_a_name_stay(tmp_path):
    text = Redactor(KEY, tmp_path).text("image of 2 images, 2 series", ["2/ima/ima.dcm"])
    assert text == "image of 2 images, 2 series"


def test_names_that_are_no_text_and_their_escapes(tmp_path):
    name = b"M\xfcller.dcm".decode(errors="surrogateescape")
    redactor = Redactor(KEY, tmp_path)
    text = redactor.text(f"{name} and {name!r}", [tmp_path / name])
    assert "ller" not in text
    redactor.save(tmp_path / "list.json")
    assert list(json.loads((tmp_path / "list.json").read_text()).values()) == [name]


def test_the_private_list_is_private(tmp_path):
    redactor, other = Redactor(KEY, tmp_path), Redactor(KEY, tmp_path)
    redactor.reference("a/b.dcm")
    other.reference("c.dcm")
    redactor.add(other.known)
    redactor.save(tmp_path / "keys" / "d.files.json")
    written = tmp_path / "keys" / "d.files.json"
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert sorted(json.loads(written.read_text()).values()) == ["a/b.dcm", "c.dcm"]
    assert [path.name for path in written.parent.iterdir()] == ["d.files.json"]
