"""No file name of the archive in a message; the owner of the key can still find the file."""

import ast
import datetime
import json
import re
import stat
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hvd_imaging
from hvd_imaging.errors import SourceError
from hvd_imaging.privacy.redact import Redactor
from hvd_imaging.privacy.vocabulary import MESSAGES

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


# Real messages: what our own modules say, without the values that they put in.
SOURCES = [*Path(hvd_imaging.__file__).parent.joinpath("sources").rglob("*.py"), *Path(hvd_imaging.__file__).parent.joinpath("ingest").rglob("*.py")]
SENTENCES = sorted(
    {
        node.value
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[^\n{}]*[a-z]+ [a-z]+[^\n{}]*", node.value)
    }
)
ENDINGS = ("", ".dcm", ".nii.gz", ".NII.GZ", ".seg.nrrd", "_0000.nii.gz", ".2.nii")
words = st.sampled_from(sorted(MESSAGES))
dates = st.dates(datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)).map(lambda day: day.strftime("%Y%m%d"))
uids = st.lists(st.integers(1, 10**9), min_size=6, max_size=9).map(lambda parts: "1.3." + ".".join(map(str, parts)))
letters = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=2, max_size=20).map(str.strip)
people = st.one_of(st.sampled_from(["DOE_JOHN", "Doe^John", "doe john", "Müller", "O'Neil", "x.DOE.JOHN", "long", "May", "mark", "Image Anna"]), letters, dates, uids)


def is_name(text):
    """Neither a word that our messages are made of, nor a number or letter, nor something that is no file name."""
    return len(text) > 1 and text not in (*MESSAGES, "SRC", "..") and not re.fullmatch(r"[\d.]+", text[:7].rstrip(".")) and text.strip(".") == text


def said(text):
    """What is left of a message beside references."""
    return re.sub(r"(file|folder)-[0-9a-f]{10}|SRC|UID|DATE", "\0", text)


def stands_in(name, text):
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", text) is not None


@settings(max_examples=150, deadline=None)
@given(st.data(), people.filter(is_name), st.sampled_from(ENDINGS), st.lists(people.filter(is_name) | words, max_size=2), st.sampled_from(SENTENCES))
def test_the_name_of_a_person_never_survives(data, name, ending, folders, sentence):
    path = "/".join([*folders, name + ending])
    redactor = Redactor(KEY, "/archive/of/us")
    forms = [path, f"/archive/of/us/{path}", name + ending, name, *folders, repr(name), repr(path)]
    forms = data.draw(st.lists(st.sampled_from(forms), min_size=1, max_size=4))
    frame = data.draw(st.sampled_from(["{}: {}", "{}; {}", "[Errno 2] No such file: {} ({})", '"{}" and \'{}\'', "of {}, {}"]))
    message = frame.format(forms[0], sentence) + "".join(f" {form}, " for form in forms[1:])
    texts = [redactor.text(message, [path]), redactor.text(message, [Path("/archive/of/us") / path])]
    if not ending:  # a folder
        texts += [redactor.text(message, ["x"], [path]), redactor.text(message, [f"{path}/x"])]
    for text in texts:
        left = said(text)
        for secret in (name, *folders):
            if is_name(secret) and not stands_in(secret, sentence) and not any(secret in part for part in (frame, "archive/of/us")):
                assert not stands_in(secret, left), text


@settings(max_examples=100, deadline=None)
@given(words, st.sampled_from(ENDINGS), st.lists(words | st.sampled_from(["1", "07", "12", "a"]), max_size=2), st.sampled_from(SENTENCES))
def test_a_file_called_by_a_word_garbles_no_sentence(word, ending, folders, sentence):
    path = "/".join([*folders, word + ending])
    redactor = Redactor(KEY, "/data/in")
    reference = redactor.reference(path)
    assert redactor.text(sentence, [path]) == sentence
    assert redactor.text(f"{path}: {sentence}", [path]) == f"{reference}: {sentence}"
    if ending or folders:
        assert redactor.text(f"the gap between {path} and '/data/in/{path}' is 1.2 mm", [path]) == f"the gap between {reference} and '{reference}' is 1.2 mm"


@settings(max_examples=60, deadline=None)
@given(uids, dates, st.sampled_from(SENTENCES))
def test_uids_and_dates_never_survive(uid, date, sentence):
    iso = f"{date[:4]}-{date[4:6]}-{date[6:]}"
    text = Redactor(KEY, "in").text(f"{uid}: {sentence} '{date}', {iso}, {date}120000.5 of {uid}", ["other.dcm"])
    assert uid not in text and date not in text and iso not in text
    assert text == f"UID: {sentence} 'DATE', DATE, DATE.5 of UID"


def test_what_the_standard_and_the_program_number_stays():
    text = "transfer syntax 1.2.840.10008.1.2.4.50, version 2.18.0, 512 x 512 x 120 voxels of (0.7, 0.7, 1.25) mm, 20480000 bytes, 10.0.0.12"
    assert Redactor(KEY, "in").text(text, ["1/2/3.dcm", "0.7/1.25.nii"]) == text
    assert Redactor(KEY, "in").text("a 2.25.329800735698586629295641978511506172918", []) == "a UID"


def test_no_word_of_messages_is_a_name_of_people():
    names = "may long mark small short white black brown green young king head hand page read case stone field face bell rose will grant bill art rob pat frank guy day"
    assert not set(names.split()) & (MESSAGES - {"case", "read"})


def test_an_ingest_of_files_called_by_words_or_people(tmp_path):
    """All that ingest leaves and says: sentences are whole, and no name is in them."""
    from click.testing import CliRunner

    from hvd_imaging.cli.ingest import command

    src = tmp_path / "in" / "DOE_JOHN"
    names = ("image", "mask", "values", "lung", "Doe^Jane", "19620807", "ok")
    for number, name in enumerate(names):
        for place, value in ((f"imagesTr/{name}_0000.nii.gz", number), (f"labelsTr/{name}.nii.gz", 1 if name == "ok" else 7)):
            (src / place).parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(np.full((5, 4, 3), value, np.int16), np.diag([1.0, 1, 2, 1])), src / place)
    (src / "dataset.json").write_text('{"channel_names": {"0": "CT"}, "labels": {"background": 0, "lung": 1}}')
    result = CliRunner().invoke(command, [str(tmp_path / "in"), str(tmp_path / "d")], catch_exceptions=False)
    written = (tmp_path / "d/quarantine.json").read_text()
    sentence = r"file-[0-9a-f]{10}: mask with values from 7 to 7, expected whole numbers from 0 to 1 \(background, lung\)"
    assert [re.fullmatch(sentence, item["reason"]) is not None for item in json.loads(written)["quarantined"]] == [True] * 6
    for secret in ("DOE", "JOHN", "Doe", "Jane", "1962"):
        assert secret not in said(written) + said(result.output)
    (src / "dataset.json").write_text("{")
    with pytest.raises(SourceError, match=r"^folder-[0-9a-f]{10}/dataset.json: cannot be read|^file-[0-9a-f]{10}: cannot be read"):
        CliRunner().invoke(command, [str(tmp_path / "in"), str(tmp_path / "e")], catch_exceptions=False)


def test_classes_are_shown_by_the_dataset_anyway():
    redactor = Redactor(KEY, "in")
    message = "labels/liver.nii.gz: mask with values from 0 to 7, expected whole numbers from 0 to 1 (background, liver)"
    redactor.words = ("background", "liver")
    assert redactor.text(message, ["labels/liver.nii.gz"]) == message.replace("labels/liver.nii.gz", redactor.reference("labels/liver.nii.gz"))


def test_a_message_on_the_whole_archive_names_nothing_of_it(tmp_path):
    root = tmp_path / "archive"
    for name in ("DOE_JOHN/imagesTr/DOE_JOHN_0000.nii.gz", "Meier^Anna/2019/x.dcm", "image/ok.dcm"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    redactor = Redactor(KEY, root)
    text = redactor.text_of_archive(f"{root}: 2 data sets in one folder (DOE_JOHN, Meier^Anna), case DOE_JOHN of an image; ok; give one of them")
    john = redactor.reference("DOE_JOHN/imagesTr/DOE_JOHN_0000.nii.gz")
    assert text == (
        f"SRC: 2 data sets in one folder ({john}, {redactor.folder('Meier^Anna')}), case {john} "
        f"of an image; {redactor.reference('image/ok.dcm')}; give one of them"
    )
