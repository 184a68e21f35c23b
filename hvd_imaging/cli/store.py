"""`hvd-imaging store`."""

from __future__ import annotations

from pathlib import Path

import click

from .fetch import access_options, tell


@click.command(
    epilog="""\b
Examples:
  hvd-imaging predict runs/unet3d series/ mask.dcm
  hvd-imaging store https://pacs.example/dicom-web mask.dcm --user me --password-file ~/secret/pacs
  hvd-imaging store https://pacs.example/dicom-web deidentified/ --token-file ~/secret/token
\b
Files that the server does not take are set aside, by reference, and the exit code is then 10. Storing a file again does no
harm. --user, --password-file, --token-file and --ca-file can stand in HVD_DICOMWEB_USER, _PASSWORD_FILE, _TOKEN_FILE
and _CA_FILE.
"""
)
@click.argument("url")
@click.argument("src", type=click.Path(path_type=Path), metavar="FILE_OR_FOLDER")
@access_options
@click.option("--key-file", type=click.Path(path_type=Path), help="Key of the references in the report (default: a new one).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    url: str,
    src: Path,
    user: str | None,
    password_file: str | None,
    token_file: str | None,
    ca_file: str | None,
    attempts: int,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Store a DICOM file, or all DICOM files of a folder, on the DICOMweb server at URL (STOW-RS), one by one."""
    from ..errors import PARTIAL, SourceError
    from ..sources import dicomweb
    from .console import counter, refuse_many_ranks

    refuse_many_ranks("store")
    address = dicomweb.parse(url)
    if not src.exists():
        raise SourceError(f"{src}: expected a DICOM file or a folder of them, found nothing")
    files, others = dicomweb.storable(src)
    if not files:
        raise SourceError(f"{src}: expected a DICOM file or a folder of them, found {others} files that are none")
    server = dicomweb.Server(address, dicomweb.access(user, password_file, token_file, ca_file), attempts)
    with counter("storing", unit="instances") as report:
        refused = dicomweb.store(server, files, report)
    root = src if src.is_dir() else src.parent
    rows = tell(dict(refused), root, key_file, src.with_name(src.name + ".files.json"))
    stored = len(files) - len(rows)
    if as_json:
        import json

        click.echo(json.dumps({"url": address.base, "stored": stored, "not_dicom": others, "set_aside": rows}, indent=1))
    else:
        click.echo(f"{address.base}: {stored} of {len(files)} instances stored; {others} files that are no DICOM objects left out")
    if rows:
        click.get_current_context().exit(PARTIAL)
