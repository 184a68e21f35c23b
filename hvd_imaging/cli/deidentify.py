"""`hvd-imaging deidentify`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    epilog="""\b
Examples:
  hvd-imaging deidentify archive shared --key-file ~/secret/project.key
  hvd-imaging deidentify archive shared --retain dates,characteristics --burned-in blank --deface
\b
What cannot be cleaned is set aside in OUT/quarantine.json, by reference; the exit code is then 10. Which file a
reference stands for is in OUT's name + .files.json beside the key: keep both to yourself.
"""
)
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--key-file", type=click.Path(path_type=Path), help="Pseudonym key (default: OUT.key, made if missing).")
@click.option("--retain", default="", metavar="LIST", help="Of dates (shifted), device, characteristics; with commas.")
@click.option(
    "--burned-in",
    type=click.Choice(["quarantine", "blank", "keep"]),
    default="quarantine",
    show_default=True,
    help="Images with writing in their pixels.",
)
@click.option("--deface", is_flag=True, help="Cut faces off head series of CT and MR.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    src: Path, out: Path, key_file: Path | None, retain: str, burned_in: str, deface: bool, as_json: bool
) -> None:
    """Copy the DICOM objects in SRC to the new folder OUT without what identifies (PS3.15 Annex E, basic profile).

    Names, numbers, dates, UIDs, free text, private tags, comments in compressed frames and writing in pixels leave or
    become pseudonyms; reports, documents and other objects made of text have no copy.
    """
    from ..errors import PARTIAL, ConfigError
    from ..privacy.profile import RETAINABLE, Options
    from ..world import World
    from .console import listed, progress, refuse_many_ranks

    refuse_many_ranks("deidentify")
    wanted = {word.strip() for word in retain.split(",") if word.strip()}
    if not wanted <= set(RETAINABLE):
        raise ConfigError(f"--retain: expected some of {', '.join(RETAINABLE)}, found a word that is none of them")
    options = Options(frozenset(name for name in RETAINABLE if name in wanted), burned_in, deface)  # type: ignore[arg-type]

    from ..privacy.folder import REPORT, run

    outcome = run(src, out, options, key_file, lambda items, text: progress(items, text, World()))
    if as_json:
        import dataclasses
        import json

        click.echo(json.dumps({"out": str(out), **dataclasses.asdict(outcome)}, indent=1))
    else:
        click.echo(
            f"{out}: {outcome.written} files of {outcome.patients} patients, {outcome.blanked} with writing blanked"
            f"{f', {outcome.defaced} without their face' if deface else ''}; "
            f"{len(outcome.set_aside)} set aside, "
            f"{outcome.not_dicom} files that are no DICOM objects left behind"
        )
    if outcome.set_aside:
        listed("set aside", [(item.file, item.reason) for item in outcome.set_aside])
        click.echo(f"the reasons stand in {out / REPORT}; exit code {PARTIAL}", err=True)
        click.get_current_context().exit(PARTIAL)
