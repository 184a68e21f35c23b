"""`hvd-imaging doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import check_signed, trust


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Try out the file system of this folder.")
@click.option("--model", type=click.Path(path_type=Path), help="Compare an export's answers with those on the machine that made it.")
@trust
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(data: Path | None, model: Path | None, trusted: bool, public_key: Path | None, as_json: bool) -> None:
    """Check the installation: versions, MPI, Horovod, speed, storage, services. Exit code 1 on an error.

    With --model also whether an export (hvd-imaging export, compress) answers here as where it was made.
    """
    import dataclasses
    import json

    from ..doctor import examine

    findings = examine(data) + (_of_model(model, trusted, public_key) if model else [])
    errors = sum(finding.level == "error" for finding in findings)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        colours = {"ok": "green", "warning": "yellow", "error": "red"}
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            level = click.style(f"{finding.level:<7}", fg=colours[finding.level])
            click.echo(f"{level}  {finding.name:<{width}}  {finding.found}")
            if finding.mend and finding.level != "ok":
                click.echo(f"{'':9}{'':{width}}  -> {finding.mend}")
        warnings = sum(finding.level == "warning" for finding in findings)
        click.echo(f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}")
    if errors:
        click.get_current_context().exit(1)


def _of_model(path: Path, trusted: bool = False, public_key: Path | None = None) -> list[Any]:
    from .. import bootstrap
    from ..doctor import Finding
    from ..errors import HvdImagingError
    from ..inference import golden
    from ..inference.predictors import open_predictor

    bootstrap.prepare()
    try:
        check_signed(path, public_key)
        predictor = open_predictor(path, trusted=trusted)
        if predictor.kind == "run":
            mend = "give a folder that `hvd-imaging export` or `compress` wrote"
            return [Finding("model", "warning", f"{path}: a run folder, not an export: nothing to compare with", mend)]
        return list(golden.findings(path, predictor, golden.compare(path, predictor, anew=True)))
    except HvdImagingError as error:
        found, _, mend = str(error).partition("; ")
        return [Finding("model", "error", found, mend)]
