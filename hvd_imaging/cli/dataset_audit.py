"""`hvd-imaging dataset audit`."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..audit.leaks import Leak
    from ..audit.run import Report

_MOST = 20


@click.command(
    epilog="""\b
Examples:
  hvd-imaging dataset audit dataset
  hvd-imaging dataset audit dataset --known identifiers.txt --json
  mpirun -np 8 hvd-imaging dataset audit dataset      the ranks share the images
"""
)
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option(
    "--known", type=click.Path(path_type=Path), metavar="FILE", help="Identifiers that must stand nowhere, one a line; never repeated."
)
@click.option("--least", type=click.IntRange(min=2), default=5, show_default=True, help="Patients that must share modality, site and month.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def audit(dataset: Path, known: Path | None, least: int, as_json: bool) -> None:
    """Look in DATASET for leaks between its splits, and for identifiers; exit code 4 if there is one.

    Leaks are: the same patient, the same pixels, the same image stored otherwise (perceptual hash), or neighbouring frames of
    a volume, in two splits. Volumes of two splits so alike that they may be visits of one patient, combinations that fewer than
    --least patients share, and faces in head series, are told, and are no reason to fail.
    """
    from ..audit.run import audit as run
    from ..audit.run import read_known
    from ..communicator import connect
    from ..errors import DatasetError
    from .console import progress

    communicator = connect()
    identifiers = read_known(known) if known is not None else None
    report = run(dataset, communicator, identifiers, least, lambda items, text: progress(items, text, communicator.world))
    if communicator.world.is_root:
        if as_json:
            click.echo(json.dumps(_described(dataset, report), indent=1))
        else:
            _say(dataset, report)
    if not report.passed:
        if communicator.world.is_root:
            found = [f"{len(report.leaks)} leaks between splits"] if report.leaks else []
            found += [f"{len(report.identifiers)} places with identifiers"] if report.identifiers else []
            click.echo(
                f"hvd-imaging: error: {dataset}: {' and '.join(found)}; docs/splits.md tells what to do about each kind", err=True
            )
        communicator.barrier()  # leaving with a code ends all ranks: not before rank 0 has spoken
        click.get_current_context().exit(DatasetError.exit_code)


def _described(dataset: Path, report: Report) -> dict[str, Any]:
    manifest = report.manifest
    return {
        "dataset": str(dataset),
        "manifest_hash": manifest.hash(),
        "samples": len(manifest.samples),
        "passed": report.passed,
        "leaks": [dataclasses.asdict(leak) for leak in report.leaks],
        "suspicions": [dataclasses.asdict(leak) for leak in report.suspicions],
        "repeated_in_a_split": report.repeated,
        "identifiers": None if report.identifiers is None else [dataclasses.asdict(found) for found in report.identifiers],
        "rare_combinations": [{"modality": c[0], "site": c[1], "month": c[2], "patients": n} for c, n in report.rare],
        "least": report.least,
        "faces": list(report.faces),
    }


def _both(leak: Leak) -> str:
    sides = zip(leak.samples, leak.patients, leak.splits, strict=True)
    return " and ".join(f"{sample} of patient {patient} ({split})" for sample, patient, split in sides)


def _say(dataset: Path, report: Report) -> None:
    for leak in report.leaks[:_MOST]:
        distance = "" if leak.distance is None else f", distance {leak.distance:g}"
        click.echo(f"{leak.kind}: {_both(leak)}{distance}")
    if len(report.leaks) > _MOST:
        click.echo(f"and {len(report.leaks) - _MOST} more leaks (--json shows all)")
    kinds = Counter(leak.kind for leak in report.leaks)
    samples = len(report.manifest.samples)
    click.echo(f"{dataset}: {samples} samples; leaks: " + (", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none found"))
    for leak in report.suspicions[:_MOST]:
        click.echo(f"perhaps one patient: {_both(leak)}: distance {leak.distance:g}, where other patients are {leak.usual:g} apart")
    if report.suspicions:
        click.echo(
            f"{len(report.suspicions)} pairs of volumes in two splits are much more alike than patients are here: visits of one patient? Look at "
            "them; ingest --patient tells which cases are of one patient"
        )
    if report.repeated:
        click.echo(f"{report.repeated} samples repeat the voxels of another one of their own split")
    if report.identifiers is not None:
        click.echo(f"identifiers: {len(report.identifiers)} places" if report.identifiers else "identifiers: none found")
        for found in report.identifiers[:_MOST]:
            click.echo(f"  identifier {found.identifier + 1} of the list: {found.kind} of file {found.file + 1} in sorted order")
    if report.faces:
        click.echo(
            f"a face can be seen in {len(report.faces)} sample{'s' * (len(report.faces) != 1)}, first {report.faces[0]}; "
            "ingest with privacy.faces=deface cuts faces off"
        )
    if report.rare:
        patients = sum(count for _, count in report.rare)
        click.echo(f"{len(report.rare)} combinations of modality, site and month belong to fewer than {report.least} patients ({patients} in all)")
