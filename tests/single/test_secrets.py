"""Passwords stand in files and in the environment, and nowhere else: not in what a run keeps, shows or sends."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from hvd_imaging.cli.report import command as report
from hvd_imaging.cli.submit import command as submit
from hvd_imaging.config import RunConfig, check, load
from hvd_imaging.errors import ConfigError, RunError, masked

WORD = "s3cret-w0rd"
URLS = [
    f"redis://:{WORD}@cache:6379/0", f"rediss://me:{WORD}@cache", f"redis://me:{WORD}@[::1]:7/2", f"redis://:{WORD}/x@cache", f"redis://:a@{WORD}@cache",
    f"REDIS://:{WORD}@cache",
]  # fmt: skip


def run(key: str, url: str) -> dict:
    values = {"data": {"dataset": "d", "cache": {"kind": "redis"}}, "model": {"name": "unet3d"}, "monitor": {}}
    section = values["data"]["cache"] if key == "data.cache.url" else values["monitor"]
    section[key.rpartition(".")[2]] = url
    return values


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("key", ["data.cache.url", "monitor.mlflow"])
def test_a_password_in_a_configuration_is_refused_and_not_shown(key, url):
    if key == "monitor.mlflow":
        url = url.replace("redis", "http")
    with pytest.raises(ConfigError, match=f"{key}: holds a password") as caught:
        check(RunConfig, run(key, url), "run.yaml")
    assert WORD not in str(caught.value) and "mode 600" in str(caught.value)


@pytest.mark.parametrize("url", ["redis://localhost:6379/0", "rediss://me@cache:6379/1", "redis://[::1]:6379"])
def test_addresses_without_a_password_are_taken(url):
    assert check(RunConfig, run("data.cache.url", url), "run.yaml").data.cache.url == url


def test_nor_on_a_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text("data: {dataset: d}\nmodel: {name: unet3d}\n")
    for url in URLS:
        with pytest.raises(ConfigError) as caught:
            load(RunConfig, tmp_path / "run.yaml", [f"data.cache.url={url}"])
        assert WORD not in str(caught.value)
        result = CliRunner().invoke(submit, [str(tmp_path / "run.yaml"), "--dry-run", "--set", f"data.cache.url={url}"])
        assert isinstance(result.exception, ConfigError) and WORD not in result.output + str(result.exception)


def test_a_report_on_an_earlier_run_does_not_show_it(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.yaml").write_text(json.dumps(run("data.cache.url", URLS[0])))
    (folder / "events.jsonl").write_text("")
    for words in ([str(folder)], [str(folder), "--json"]):
        result = CliRunner().invoke(report, words, catch_exceptions=False)
        shown = result.output + str(result.exception) + "".join(path.read_text() for path in folder.glob("*.html"))
        assert WORD not in shown and "redis://***@cache:6379/0" in shown


@given(st.sampled_from(["redis", "rediss", "http", "https", "mysql+x"]), st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=6).filter(lambda t: "'" not in t and '"' not in t))
def test_no_message_shows_the_login_of_an_address(scheme, word):
    text = str(RunError(f"{scheme}://me:{word}@host:1/x: no answer"))
    assert "***@" in text and "host:1/x: no answer" in text
    assert f":{word}@" not in text and masked({"a": [f"{scheme}://:{word}@host"]}) == {"a": [f"{scheme}://***@host"]}
