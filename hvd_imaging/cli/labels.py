"""`hvd-imaging labels`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    epilog="""\b
Examples:
  hvd-imaging labels archive
  hvd-imaging labels archive --out annotations.html
  hvd-imaging labels archive --out annotations --key-file dataset.key --set labels.consensus=staple
  hvd-imaging labels archive --json
\b
Nobody is named: cases are references, annotators numbers. Which file a reference is stands in OUT.files.json beside OUT; with
the key of a dataset references are those of its ingest. Exit code 10: something cannot be used.
"""
)
@click.argument("src", type=click.Path(path_type=Path))
@click.option("--out", "-o", type=click.Path(path_type=Path), help="A page (.html), or a folder: page, JSON, and a picture of each case.")
@click.option("--key-file", type=click.Path(path_type=Path), help="Pseudonym key (default with --out: OUT.key, made if missing).")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change a key, as in labels.consensus=union.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(src: Path, out: Path | None, key_file: Path | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """Report what the masks in SRC hold: volumes, empty ones, agreement of annotators, review, doubts; with pictures.

    SRC is a folder as for `ingest`, with DICOM SEG, RTSTRUCT, or NIfTI or NRRD masks.
    """
    from ..config import IngestConfig, load
    from ..errors import PARTIAL, ConfigError
    from .console import refuse_many_ranks

    refuse_many_ranks("labels")
    config = load(IngestConfig, None, assignments)
    if out is not None and out.exists() and not (out.is_dir() and out.suffix != ".html" and not any(out.iterdir())):
        raise ConfigError(f"{out}: exists already, expected a new name or an empty folder; choose another one")
    if not src.is_dir():
        raise ConfigError(f"{src}: expected a folder with images and masks, found {'a file' if src.exists() else 'nothing'}")

    import dataclasses
    import json
    import re
    import secrets

    from ..errors import HvdImagingError, SourceError
    from ..files import atomic_folder, write_bytes, write_json, write_text
    from ..privacy.pseudonym import load_or_make_key
    from ..privacy.redact import Redactor
    from ..reporting import annotations
    from ..sources import catalog as sources
    from ..sources.dicom import scan_dicom
    from ..world import World
    from .console import progress

    if out is not None or key_file is not None:
        key = load_or_make_key(key_file if key_file is not None else out.with_name(out.name + ".key"))  # type: ignore[union-attr]
    else:
        key = secrets.token_bytes(32)
    redactor = Redactor(key, src)
    dicom = scan_dicom(src)
    try:
        catalog = sources.choose(sources.scan(src, task="segmentation", dicom=dicom), config.labels, redactor.label)
    except SourceError as error:
        raise SourceError(redactor.text_of_archive(str(error)).replace("SRC", str(src), 1)) from None
    redactor.words = catalog.classes
    annotators = annotations.annotator_names(catalog, key)
    cases, problems = [], []
    for rejected in catalog.rejected:
        path = src / rejected.path
        problems.append((redactor.reference(path), redactor.text(rejected.reason, [path])))
    for case in progress(catalog.cases, "reading annotations", World()):
        files = [*case.image.files, *(file.path for file in case.mask)]
        name = redactor.reference(files[0]) + (f"-{re.sub('[^0-9A-Za-z]+', '-', case.part)}" if case.part else "")
        try:
            found = annotations.examine(case, catalog, name, annotators, config.preprocess.units, draw=out is not None)
        except SourceError as error:
            problems.append((name, redactor.text(str(error), files).removeprefix(f"{name}: ")))
            continue
        except HvdImagingError:
            raise
        except Exception as error:
            # One odd file must not end the report. The text may quote values of the file: its type must do.
            problems.append((name, f"cannot be read ({type(error).__name__})"))
            continue
        cases.append(dataclasses.replace(found, notes=tuple(redactor.text(note, files) for note in found.notes)))
    cases.sort(key=lambda case: case.name)
    summary = annotations.summarize(cases, catalog, sorted(problems))
    if out is not None:
        page = annotations.page(summary, cases)
        if out.suffix == ".html":
            write_text(out, page)
        else:
            with atomic_folder(out) as folder:
                write_text(folder / "index.html", page)
                write_json(folder / "labels.json", summary)
                for each in cases:
                    write_bytes(folder / "pictures" / f"{each.name}.png", each.picture)
        redactor.save(out.with_name(f"{out.name}.files.json"))
    if as_json:
        click.echo(json.dumps(summary, indent=1))
    else:
        for line in annotations.lines(summary):
            click.echo(line)
        if out is not None:
            click.echo(f"{out}: the page; {out.name}.files.json beside it tells which file is which (readable by you only)", err=True)
    if problems:
        click.get_current_context().exit(PARTIAL)
