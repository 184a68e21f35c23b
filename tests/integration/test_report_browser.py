"""The report in a real browser: light, dark and on paper, without a network."""

import shutil
import subprocess

import numpy as np
import pytest
from reported import make_reported

from hvd_imaging.reporting.report import gather, html, make_page

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH (Debian: apt-get install chromium)")


def shoot(folder, page, *options):
    """Pixels (H, W, 3) of a page."""
    from matplotlib.image import imread

    picture = folder / "page.png"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,2400",
               f"--user-data-dir={folder / 'profile'}", *options, f"--screenshot={picture}", page.as_uri()]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return np.rint(imread(picture)[..., :3] * 255).astype(int)


def test_the_page_is_drawn_in_light_and_dark_and_printed(tmp_path):
    runs = make_reported(tmp_path / "runs")
    page = tmp_path / "report.html"
    page.write_text(html(make_page(gather(runs / "two <b>ranks"), [gather(runs / "alone")])))
    light, dark = shoot(tmp_path, page), shoot(tmp_path, page, "--blink-settings=preferredColorScheme=0")
    assert light[0, 0].tolist() == [255, 255, 255] and dark[0, 0].max() < 60
    for picture, colour in ((light, (0x00, 0x72, 0xB2)), (dark, (0x56, 0xA8, 0xE0))):
        # The first line of a chart, and text: contrast in the places where they are.
        near = np.abs(picture - colour).max(-1) < 12
        assert near.sum() > 500, "no chart is drawn"
        assert picture.reshape(-1, 3).std(0).min() > 8, "the page is empty"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--no-pdf-header-footer",
               f"--print-to-pdf={tmp_path / 'page.pdf'}", page.as_uri()]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    data = (tmp_path / "page.pdf").read_bytes()
    assert data.startswith(b"%PDF") and 2 <= data.count(b"/Type /Page\n") + data.count(b"/Type /Page/") + data.count(b"/Type /Page ") <= 8
