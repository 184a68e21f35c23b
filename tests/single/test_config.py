"""Configuration: what is refused, with which words; and that its page in docs/ says what the models say.

`python tests/single/test_config.py` writes the tables of the page anew.
"""

import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined

from hvd_imaging import config
from hvd_imaging.config import IngestConfig, RunConfig, Section, check, keys, load, section_of
from hvd_imaging.errors import ConfigError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
LEAST = {"data": {"dataset": "d"}, "model": {"name": "unet3d"}}


def complaint(values, assignments=(), model=RunConfig):
    with pytest.raises(ConfigError) as caught:
        check(model, values, "run.yaml") if not assignments else load(model, None, assignments)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "key", "nearest"),
    [
        ({"train": {"learnig_rate": 1}}, "train.learnig_rate", "train.learning_rate"),
        ({"train": {"epoch": 1}}, "train.epoch", "train.epochs"),
        ({"data": {"dataset": "d", "patches": 1}}, "data.patches", "data.patches_per_volume"),
        ({"dat": {"dataset": "d"}}, "dat", "data"),
        ({"train": {"patch": [1, 1, 1]}}, "train.patch", "data.patch"),
        ({"data": {"dataset": "d", "augment": {"rotate": 1}}}, "data.augment.rotate", "data.augment.rotate_deg"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_ones(values, key, nearest):
    text = complaint(LEAST | values)
    assert "run.yaml: " in text and f"{key}: unknown key" in text and nearest in text


@pytest.mark.parametrize(
    ("values", "key", "shown"),
    [
        ({"train": {"epochs": "ten"}}, "train.epochs", "'ten'"),
        ({"train": {"epochs": 0}}, "train.epochs", "0"),
        ({"train": {"learning_rate": -1.0}}, "train.learning_rate", "-1.0"),
        ({"train": {"optimizer": "lion"}}, "train.optimizer", "'lion'"),
        ({"data": {"dataset": "d", "patch": [1, 2]}}, "data.patch", ""),
        ({"data": {"dataset": "d", "foreground": 1.5}}, "data.foreground", "1.5"),
        ({"data": {"dataset": "d", "augment": {"scale": "much"}}}, "data.augment.scale", "'much'"),
        ({"train": 5}, "train", "5"),
    ],
)
def test_a_wrong_value_names_its_key_and_itself(values, key, shown):
    text = complaint(LEAST | values)
    assert key in text and shown in text and "\n" not in text


def test_a_missing_key_is_named():
    assert "data.dataset: missing" in complaint({"data": {}, "model": {"name": "unet3d"}})
    assert "model: missing" in complaint({"data": {"dataset": "d"}})


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"preprocess": {"window": [400, -1000]}}, "window"),
        ({"preprocess": {"percentiles": [0.9, 0.1]}}, "percentiles"),
        ({"split": {"val": 0.6, "test": 0.6}}, "1.2"),
    ],
)
def test_values_that_contradict_each_other(values, word):
    assert word in complaint(values, model=IngestConfig)


def write(folder, text):
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


GOOD = "data: {dataset: d}\nmodel: {name: unet3d}\n"


def test_set_changes_keys_in_any_depth_and_later_ones_win(tmp_path):
    path = write(tmp_path, GOOD)
    settings = load(
        RunConfig,
        path,
        ["train.epochs=3", "data.patch=[8, 16, 16]", "data.augment=null", "model.options={stages: 4}", "train.epochs=5"],
    )
    assert settings.train.epochs == 5 and settings.data.patch == (8, 16, 16)
    assert settings.data.augment is None and settings.model.options == {"stages": 4}
    assert load(RunConfig, path).train.epochs == 10
    assert load(RunConfig, path, ["data.augment.noise=0.5"]).data.augment.noise == 0.5


@pytest.mark.parametrize("text", ["train.epochs", "=3", "train.=3", ".epochs=3", ""])
def test_a_set_without_key_or_value_says_the_form(tmp_path, text):
    with pytest.raises(ConfigError, match=r"expected key=value, such as train\.epochs=20"):
        load(RunConfig, write(tmp_path, GOOD), [text])


def test_a_set_into_a_value_or_with_broken_yaml(tmp_path):
    path = write(tmp_path, GOOD)
    with pytest.raises(ConfigError, match="'dataset' holds a value, not a section"):
        load(RunConfig, path, ["data.dataset.more=1"])
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(RunConfig, path, ["data.patch=[1,"])
    with pytest.raises(ConfigError, match=r"--set: preprocess\.spacin: unknown key; nearest valid keys: preprocess\.spacing"):
        load(IngestConfig, None, ["preprocess.spacin=[1,1,1]"])


def test_a_key_given_twice_is_refused_with_its_line(tmp_path):
    path = write(tmp_path, GOOD + "train:\n  epochs: 3\n  seed: 1\n  epochs: 4\n")
    with pytest.raises(ConfigError, match="line 6.*'epochs' stands here twice"):
        load(RunConfig, path)


@pytest.mark.parametrize("text", ["data: [1, 2\nmodel: 3\n", "data: !!python/object/apply:os.getcwd []\n", "a: b: c\n"])
def test_what_is_not_plain_yaml_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(RunConfig, write(tmp_path, text))


def test_a_list_binary_or_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="expected sections such as 'data:', found list"):
        load(RunConfig, write(tmp_path, "- a\n- b\n"))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(RunConfig, binary)
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read .*hvd-imaging init"):
        load(RunConfig, tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(RunConfig, tmp_path)


def test_checked_values_can_not_change():
    settings = check(RunConfig, LEAST, "here")
    with pytest.raises(ValueError, match="frozen"):
        settings.train.epochs = 3


@pytest.mark.parametrize("model", [RunConfig, IngestConfig])
def test_every_key_has_a_description(model):
    def plain(section, prefix=""):
        for name, info in section.model_fields.items():
            inner = section_of(info.annotation)
            if inner:
                yield from plain(inner, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", info

    found = dict(plain(model))
    assert list(found) == keys(model)
    assert [key for key, info in found.items() if not info.description] == []


# --- the page -----------------------------------------------------------------------------------------------------------
def kind(annotation, metadata=()):
    """A type in words, with its limits."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(arguments[0], arguments[1:])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if annotation is type(None):
        return "`null`"
    if origin is tuple:
        inner = list(dict.fromkeys(kind(a) for a in arguments))
        return f"{len(arguments)} x {' / '.join(inner)}"
    if origin is list:
        return f"list of {kind(arguments[0])}"
    if arguments and origin is not dict:
        return " or ".join(kind(a) for a in arguments)
    words = {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}
    limits = [
        f"{sign} {getattr(limit, name):g}"
        for field in metadata
        for limit in (*getattr(field, "metadata", ()), field)
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if getattr(limit, name, None) is not None
    ]
    return " ".join([words.get(annotation, "mapping"), ", ".join(limits)]).strip()


def default(info):
    if info.is_required():
        return "required"
    value = info.default_factory() if info.default is PydanticUndefined else info.default
    return f"`{json.dumps(value)}`"


def tables(model, prefix=""):
    """Markdown: one table a section."""
    lines, inner = [], []
    for name, info in model.model_fields.items():
        section = section_of(info.annotation)
        if section:
            inner += tables(section, f"{prefix}{name}.")
            continue
        words = (info.description or "").replace("|", "\\|")
        lines.append(f"| `{prefix}{name}` | {kind(info.annotation, info.metadata)} | {default(info)} | {words} |")
    if lines:
        about = (model.__doc__ or "").splitlines()[0]
        title = f"`{prefix[:-1]}`: {about}" if prefix else "top level"
        lines = [f"### {title}" if prefix else "### Top level", "", "| Key | Values | Default | Meaning |", "|---|---|---|---|", *lines, ""]
    return lines + inner


def page():
    """The page with fresh tables."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    body = ["", "## All keys of `run.yaml`", "", *tables(RunConfig), "## All keys of `ingest --set`", "", *tables(IngestConfig)]
    return head + BEGIN + "\n".join(body) + END + tail


def test_the_page_of_the_configuration_is_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert BEGIN in text and END in text
    assert page() == text, "run: python tests/single/test_config.py"
    assert all(f"`{key}`" in text for model in (RunConfig, IngestConfig) for key in keys(model))


def test_reading_the_configuration_needs_no_tensorflow():
    code = f"import sys, {config.__name__}; sys.exit(any(m in sys.modules for m in ('tensorflow', 'horovod', 'h5py', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


assert issubclass(RunConfig, Section)

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
