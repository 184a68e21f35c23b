"""`hvd-imaging ingest`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command(
    epilog="""\b
Examples:
  hvd-imaging ingest archive dataset
  hvd-imaging ingest archive.zip dataset
  hvd-imaging ingest "https://pacs.example/dicom-web?Modality=CT&StudyDate=2020" dataset
  hvd-imaging ingest archive dataset --task classification --labels labels.csv
  hvd-imaging ingest archive dataset --set preprocess.spacing=[2,1,1] --set preprocess.crop=body
  hvd-imaging ingest nnunet_folder dataset --patient '(genius_\\d\\d)'    genius_0800, genius_0801: visits of one patient
  mpirun -np 8 hvd-imaging ingest archive dataset
  hvd-imaging ingest archive dataset2 --parent dataset      the next version: reads what is new or changed
\b
Inputs that cannot be read are set aside in DATASET/quarantine.json with the reason; the exit code is then 10.
File names can be names of patients: reports show references, DATASET.files.json beside the dataset tells what they stand for.
The pseudonym key is DATASET.key beside the dataset: keep both secret, and keep them if more data is to come.
A killed ingest, started again with the same settings, goes on where it was.
"""
)
@click.argument("src")
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option(
    "--task",
    type=click.Choice(["segmentation", "classification", "unlabelled"]),
    help="What the labels are for; found out by itself when not given.",
)
@click.option(
    "--labels", type=click.Path(path_type=Path), metavar="labels.csv", help="Labels by PatientID or SeriesInstanceUID."
)
@click.option(
    "--patient", metavar="REGEX", help="Which part of a case's name is the patient, as in 'sub-\\d+'; short for --set split.patient=REGEX."
)
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change a key, as in preprocess.spacing=[2,1,1]."
)
@click.option("--key-file", type=click.Path(path_type=Path), help="Pseudonym key (default: DATASET.key, or the parent's).")
@click.option(
    "--parent", type=click.Path(path_type=Path), metavar="DATASET", help="Make the next version of this dataset, with its settings."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    src: str,
    dataset: Path,
    task: str | None,
    labels: Path | None,
    patient: str | None,
    assignments: tuple[str, ...],
    key_file: Path | None,
    parent: Path | None,
    as_json: bool,
) -> None:
    """Make the dataset DATASET from the DICOM or NIfTI files in SRC, alone or on many ranks.

    SRC is a folder, a ZIP, a TAR, a DICOMDIR file or the address of a DICOMweb server, and is searched in all its folders. DATASET must not exist yet, or be empty. No identifier enters DATASET.
    """
    from ..bootstrap import keep_freed_memory
    from ..communicator import connect
    from ..config import IngestConfig, load
    from ..errors import PARTIAL

    if patient is not None:
        assignments = (*assignments, f"split.patient={json.dumps(patient)}")
    config = load(IngestConfig, None, assignments)
    keep_freed_memory()
    communicator = connect()

    from ..ingest import QUARANTINE, ingest
    from .console import counter, kinds_of, listed

    result = ingest(
        src,
        dataset,
        config,
        labels_csv=labels,
        task=task,
        key_file=key_file,
        parent=parent,
        communicator=communicator,
        progress=lambda text, unit: counter(text, communicator.world, unit),
    )
    if communicator.world.is_root:
        manifest = result.manifest
        counts = manifest.counts()
        patients = len({sample.patient for sample in manifest.samples})
        aside = [(item.path, item.reason) for item in result.quarantined]
        if as_json:
            import dataclasses

            value = {
                "dataset": str(dataset),
                "manifest_hash": manifest.hash(),
                "files_hash": manifest.files_hash(),
                "changes": manifest.version.counts if manifest.version is not None else {},
                "task": manifest.task,
                "classes": list(manifest.classes),
                "samples": counts,
                "patients": patients,
                "set_aside": [{"reason": text, "count": len(paths)} for text, paths in kinds_of(aside)],
                "quarantined": [dataclasses.asdict(item) for item in result.quarantined],
                "notes": [dataclasses.asdict(item) for item in result.notes],
            }
            click.echo(json.dumps(value, indent=1))
        else:
            shown = ", ".join(f"{split} {count}" for split, count in counts.items())
            samples = len(manifest.samples)
            click.echo(
                f"{dataset}: {manifest.task}, {samples} sample{'s' * (samples != 1)} of {patients} "
                f"patient{'s' * (patients != 1)} ({shown})"
            )
            if parent is not None and manifest.version is not None:
                click.echo(f"since {parent}: " + ", ".join(f"{n} {name}" for name, n in manifest.version.counts.items()))
            click.echo(f"manifest {manifest.hash()}")
        listed(f"note{'s' * (len(result.notes) != 1)}", [(note.path, note.note) for note in result.notes])
        listed("set aside", aside)
        if result.quarantined:
            click.echo(f"the reasons stand in {dataset / QUARANTINE}; exit code {PARTIAL}", err=True)
        if result.quarantined or result.notes:
            click.echo(f"which file is which: {result.files} (readable by you only)", err=True)
    if result.quarantined:
        communicator.barrier()  # leaving with a code ends all ranks: not before rank 0 has spoken
        click.get_current_context().exit(PARTIAL)
