"""Each input of ``../shared/cases`` that once went wrong gives the right answer. Sorted by the number of the case."""

from __future__ import annotations

import json
import re

import pytest

pytestmark = pytest.mark.shared


def test_28_names_that_are_words(shared_cases, tmp_path):
    """A file called mask, values or image does not take these words out of the sentences about it."""
    from click.testing import CliRunner

    from hvd_imaging.cli.ingest import command

    result = CliRunner().invoke(command, [str(shared_cases / "28-names-that-are-words/in"), str(tmp_path / "d")], catch_exceptions=False)
    assert result.exit_code == 10
    reasons = [item["reason"] for item in json.loads((tmp_path / "d/quarantine.json").read_text())["quarantined"]]
    assert len(reasons) == 3
    for reason in reasons:
        assert re.fullmatch(r"file-[0-9a-f]{10}: mask with values from 7 to 7, expected whole numbers from 0 to 1 \(background, lung\)", reason)
