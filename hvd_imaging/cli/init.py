"""`hvd-imaging init`: a commented configuration, generated from the models in `config.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..config import Section

STARTS: dict[str, dict[str, Any]] = {
    "segmentation": {
        "data": {"dataset": "dataset", "patch": [32, 48, 48], "patches_per_volume": 2},
        "model": {"name": "unet3d"},
        "output": {"run_dir": "runs/segmentation"},
    },
    "classification": {
        "data": {"dataset": "dataset", "patch": [1, 96, 96]},
        "model": {"name": "vgg16", "width": 0.25, "norm": "group"},
        "train": {"batch_size": 8, "base_batch_size": 8, "loss": "ce", "class_weights": "balanced"},
        "output": {"run_dir": "runs/classification"},
    },
}

RECIPE = "compress-"


@click.command(
    epilog="""\b
Examples:
  hvd-imaging init segmentation --dataset dataset -o run.yaml
  hvd-imaging train run.yaml
  hvd-imaging init compress-segmentation -o recipe.yaml
  hvd-imaging compress runs/segmentation --recipe recipe.yaml --out small
  hvd-imaging init prices -o prices.yaml      for `report` and `plan`; its numbers are examples
"""
)
@click.argument("task", type=click.Choice([*STARTS, *(f"{RECIPE}{task}" for task in STARTS), "prices"]))
@click.option("-o", "--output", "--out", type=click.Path(path_type=Path), help="Write here instead of to the terminal.")
@click.option("--dataset", help="The dataset folder to train on.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def command(task: str, output: Path | None, dataset: str | None, force: bool) -> None:
    """Write a commented configuration for TASK, with every key; or a recipe for `hvd-imaging compress`, or a price file."""
    if dataset is not None and task == "prices":
        from ..errors import ConfigError

        raise ConfigError("--dataset: a price file names no dataset")
    if task == "prices":
        text, following = render_prices(), "report RUN_DIR --prices"
    elif task.startswith(RECIPE):
        from ..compression.recipe import TEMPLATES

        if dataset is not None:
            from ..errors import ConfigError

            raise ConfigError("--dataset: a recipe names no dataset; `hvd-imaging compress` takes the run's")
        text, following = TEMPLATES[task.removeprefix(RECIPE)], "compress RUN_DIR --out DIR --recipe"
    else:
        text, following = render(task, dataset), "train"
    if output is None:
        click.echo(text, nl=False)
        return
    if output.exists() and not force:
        from ..errors import ConfigError

        raise ConfigError(f"{output}: exists; give another name with -o, or --force to replace it")
    from ..files import write_text

    write_text(output, text)
    click.echo(f"{output}: next: hvd-imaging {following} {output}")


def render(task: str, dataset: str | None = None) -> str:
    """The YAML text; it loads back to the same values."""
    from ..config import RunConfig, check

    values = {section: dict(keys) for section, keys in STARTS[task].items()}
    if dataset is not None:
        values["data"]["dataset"] = dataset
    head = f"# hvd-imaging, {task}. Keys that you leave out keep the value shown here.\n"
    return head + "\n".join(_lines(check(RunConfig, values, "init"), 0)) + "\n"


def render_prices() -> str:
    """The price file with its example numbers."""
    from ..planning.prices import Prices

    head = "# Prices for `hvd-imaging report` and `plan`. ALL NUMBERS ARE INVENTED EXAMPLES: put in your own.\n"
    return head + "\n".join(_lines(Prices(), 0)) + "\n"


def _lines(section: Section, indent: int) -> list[str]:
    from ..config import Section as SectionType

    lines, pad = [], "  " * indent
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, SectionType):
            title = (type(value).__doc__ or "").splitlines()[0] or info.description
            lines += [""] * (indent == 0) + [f"{pad}{name}:  # {title}", *_lines(value, indent + 1)]
        else:
            # JSON is YAML: strings are quoted where they must be, lists stay on one line.
            text = f"{pad}{name}: {json.dumps(value)}"
            lines.append(f"{text:<36}  # {info.description}" if info.description else text)
    return lines
