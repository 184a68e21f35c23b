import stat
import threading

import pytest

from hvd_imaging.errors import SetupError
from hvd_imaging.privacy.pseudonym import MOST_DAYS, load_or_make_key, pseudonym, shift_days, shifted_date


def test_pseudonym_depends_on_key_kind_and_identifier_only():
    key = bytes(range(32))
    one = pseudonym(key, "patient", "4711")
    assert one == pseudonym(key, "patient", " 4711 ") and len(one) == 16 and int(one, 16) >= 0
    others = {
        pseudonym(bytes(32), "patient", "4711"),
        pseudonym(key, "series", "4711"),
        pseudonym(key, "patient", "4712"),
    }
    assert one not in others and len(others) == 3


def test_known_value():
    """HMAC-SHA256 of "patient\\0A": a change of the rule would part new data from old."""
    import hashlib
    import hmac

    assert pseudonym(b"k" * 32, "patient", "A") == hmac.new(b"k" * 32, b"patient\0A", hashlib.sha256).hexdigest()[:16]


def test_key_is_made_once_and_private(tmp_path):
    path = tmp_path / "sub" / "data.key"
    key = load_or_make_key(path)
    assert len(key) == 32 and load_or_make_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["data.key"]


def test_many_makers_agree(tmp_path):
    keys = []
    threads = [threading.Thread(target=lambda: keys.append(load_or_make_key(tmp_path / "k"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8 and len(set(keys)) == 1


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_open_permissions_are_refused(tmp_path, mode):
    path = tmp_path / "k"
    load_or_make_key(path)
    path.chmod(mode)
    with pytest.raises(SetupError, match="mode 600.*chmod 600"):
        load_or_make_key(path)


@pytest.mark.parametrize("content", ["", "abc", "g" * 64, "0" * 63, "0" * 66])
def test_invalid_content_is_refused_and_not_shown(tmp_path, content):
    path = tmp_path / "k"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(SetupError, match="64 hexadecimal") as error:
        load_or_make_key(path)
    assert not content or len(content) < 10 or content not in str(error.value)
    assert path.read_text() == content


def test_folder_and_dangling_link_are_refused(tmp_path):
    with pytest.raises(SetupError):
        load_or_make_key(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SetupError):
        load_or_make_key(tmp_path / "link")
    assert not (tmp_path / "nowhere").exists()


def test_dates_of_a_patient_move_together():
    import datetime

    key = bytes(range(32))
    first, second = datetime.date(2020, 2, 28), datetime.date(2021, 3, 1)
    a, b = shifted_date(key, "4711", first), shifted_date(key, " 4711 ", second)
    assert b - a == second - first and 1 <= (first - a).days <= MOST_DAYS
    assert first - a == datetime.timedelta(shift_days(key, "4711"))
    others = {shift_days(key, str(number)) for number in range(50)}
    assert len(others) > 40 and shift_days(bytes(32), "4711") != shift_days(key, "4711")
    assert shifted_date(key, "4711", datetime.date(1, 1, 1)) == datetime.date(1, 1, 1)


def test_odd_characters_have_pseudonyms_too():
    assert len(pseudonym(bytes(32), "patient", "M\udcfcller \ud800")) == 16
