"""`hvd-imaging doctor`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Try out the file system of this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(data: Path | None, as_json: bool) -> None:
    """Check the installation: versions, MPI, Horovod, speed, storage, services. Exit code 1 on an error."""
    import dataclasses
    import json

    from ..doctor import examine

    findings = examine(data)
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
