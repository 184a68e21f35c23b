"""Writing in pixels is found whatever its size and colour, and anatomy is no writing."""

import numpy as np
import pydicom
import pytest
from PIL import Image, ImageDraw, ImageFont

from hvd_imaging.privacy.burned_in import blank, find_in_frames, find_text, merge, policy


def ground(kind):
    random = np.random.default_rng(0)
    if kind == "black":
        return np.zeros((200, 400))
    if kind == "noise":
        return random.normal(100, 12, (200, 400)).clip(0, 255)
    return np.tile(np.linspace(20, 140, 400), (200, 1))


def written(kind, size, ink, text="Meier, Anna 12.03.1962", place=(30, 80)):
    image = Image.fromarray(ground(kind).astype(np.uint8))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    draw.text(place, text, ink, font)
    left, top, right, bottom = (int(n) for n in draw.textbbox(place, text, font))
    return np.asarray(image), (slice(top, bottom), slice(left, min(right, 400)))


def covered(boxes, shape):
    mask = np.zeros(shape, bool)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize("kind", ["black", "noise", "slope"])
@pytest.mark.parametrize("size", [10, 14, 18, 30])
@pytest.mark.parametrize("ink", [255, 200, 0])
def test_writing_is_found(kind, size, ink):
    if kind == "black" and ink == 0:
        pytest.skip("black on black")
    image, where = written(kind, size, ink)
    assert covered(find_text(image), image.shape)[where].mean() > 0.95
    clean = blank(image, find_text(image), value=50)
    assert (clean[where] == 50).mean() > 0.95


def test_in_any_frame_in_colour_and_in_sixteen_bits():
    plain, (image, where) = ground("noise").astype(np.uint8), written("noise", 16, 255)
    assert not find_text(plain)
    frames = np.stack([plain, image, plain])
    assert covered(find_in_frames(frames), plain.shape)[where].mean() > 0.95
    colour = np.stack([image, plain, plain], -1)  # red writing
    assert covered(find_in_frames(colour[None]), plain.shape)[where].mean() > 0.95
    assert covered(find_text(image.astype(np.int16) * 12 - 1024), plain.shape)[where].mean() > 0.95


def test_blank_leaves_the_given_array_and_fills_every_frame():
    array = np.arange(2 * 4 * 5).reshape(2, 4, 5)
    filled = blank(array, [(1, 2, 3, 5)])
    assert (filled[:, 1:3, 2:5] == 0).all() and array[1, 1, 2] != 0 and (filled[:, 0] == array[:, 0]).all()


def test_boxes_that_touch_become_one():
    assert merge([(0, 0, 5, 5), (20, 20, 25, 25), (4, 4, 10, 10), (10, 9, 12, 12)]) == [(0, 0, 12, 12), (20, 20, 25, 25)]


@pytest.mark.parametrize(
    ("modality", "declared", "boxes", "mode", "expected"),
    [
        ("US", "", [], "quarantine", "keep"),
        ("US", "", [(0, 0, 1, 1)], "quarantine", "quarantine"),
        ("US", "NO", [(0, 0, 1, 1)], "blank", "blank"),
        ("US", "YES", [], "blank", "quarantine"),
        ("US", "YES", [(0, 0, 1, 1)], "keep", "keep"),
        ("CT", "", [(0, 0, 1, 1)], "blank", "quarantine"),
        ("CT", "YES", [(0, 0, 1, 1)], "blank", "blank"),
    ],
)
def test_policy(modality, declared, boxes, mode, expected):
    assert policy(modality, declared, boxes, mode) == expected


@pytest.mark.shared
def test_real_slices_hold_no_writing(shared_data):
    files = sorted((shared_data / "brain_series" / "volume").glob("*.dcm"))
    assert files and not [path for path in files if find_text(pydicom.dcmread(path).pixel_array)]


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "MR2_UNCR.dcm", "emri_small.dcm"])
def test_images_that_come_with_pydicom_hold_none(name):
    from pydicom.data import get_testdata_file

    found = get_testdata_file(name, download=False)
    if not found:
        pytest.skip("not on this machine")
    array = pydicom.dcmread(found).pixel_array
    assert not find_in_frames(array if array.ndim > 2 else array[None])


def test_ultrasound_with_a_banner():
    from pydicom.data import get_testdata_file

    image = pydicom.dcmread(get_testdata_file("examples_rgb_color.dcm")).pixel_array
    assert find_text(image)
