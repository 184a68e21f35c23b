"""`hvd-imaging fetch`, and the options that it shares with `store`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def access_options(function: F) -> F:
    """Who asks, and how often."""
    path = click.Path(dir_okay=False)
    for decorate in (
        click.option(
            "--attempts", type=click.IntRange(1, 20), default=5, show_default=True, help="For each request, with growing pauses."
        ),
        click.option("--ca-file", type=path, envvar="HVD_DICOMWEB_CA_FILE", help="PEM of the authority behind the server's certificate."),
        click.option("--token-file", type=path, envvar="HVD_DICOMWEB_TOKEN_FILE", help="File with a bearer token."),
        click.option("--password-file", type=path, envvar="HVD_DICOMWEB_PASSWORD_FILE", help="File with the password of --user."),
        click.option("--user", envvar="HVD_DICOMWEB_USER", help="Name for HTTP basic authentication."),
    ):
        function = decorate(function)
    return function


def tell(set_aside: Mapping[Path, str], root: Path, key_file: Path | None, told: Path) -> list[dict[str, str]]:
    """Files and reasons with references in place of names; ``told`` then says, to its owner only, what they stand for."""
    import os

    from ..privacy.pseudonym import load_or_make_key
    from ..privacy.redact import Redactor

    if not set_aside:
        return []
    redactor = Redactor(load_or_make_key(key_file) if key_file else os.urandom(32), root)
    rows = [{"file": redactor.reference(path), "reason": reason} for path, reason in set_aside.items()]
    redactor.save(told)
    for row in rows[:10]:
        click.echo(f"  {row['file']}: {row['reason']}", err=True)
    if len(rows) > 10:
        click.echo(f"  and {len(rows) - 10} more", err=True)
    click.echo(f"which file is which: {told} (readable by you only)", err=True)
    return rows


@click.command(
    epilog="""\b
Examples:
  hvd-imaging fetch https://pacs.example/dicom-web archive --query Modality=CT --query StudyDate=20200101-20201231
  hvd-imaging fetch https://pacs.example/dicom-web archive --user me --password-file ~/secret/pacs --series-limit 20
  hvd-imaging ingest "https://pacs.example/dicom-web?Modality=CT" dataset      fetches by itself
\b
Started again it fetches only what is missing. What the server cannot give is set aside and the exit code is then 10.
The files are the patients' own data: see `hvd-imaging deidentify`. --user, --password-file, --token-file and --ca-file can
stand in HVD_DICOMWEB_USER, _PASSWORD_FILE, _TOKEN_FILE and _CA_FILE; `ingest` reads them there.
"""
)
@click.argument("url")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--query", multiple=True, metavar="KEY=VALUE", help="Only series that fit: keywords of DICOM, * and ? allowed, dates as FROM-TO."
)
@click.option("--series-limit", type=click.IntRange(min=1), help="At most so many series, in the order of their UIDs.")
@access_options
@click.option("--key-file", type=click.Path(path_type=Path), help="Key of the references in the report (default: a new one).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    url: str,
    out: Path,
    query: tuple[str, ...],
    series_limit: int | None,
    user: str | None,
    password_file: str | None,
    token_file: str | None,
    ca_file: str | None,
    attempts: int,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Fetch the series that fit a query from the DICOMweb server at URL into the folder OUT (QIDO-RS, WADO-RS)."""
    from ..errors import PARTIAL, DatasetError
    from ..sources import dicomweb
    from .console import counter, refuse_many_ranks

    refuse_many_ranks("fetch")
    address, asked = dicomweb.parse(url), dicomweb.parse_query(query)
    server = dicomweb.Server(address, dicomweb.access(user, password_file, token_file, ca_file), attempts)
    try:
        with counter("fetching", unit="instances") as report:
            found = dicomweb.fetch(url, out, asked, series_limit=series_limit, report=report, server=server)
    except OSError as error:
        raise DatasetError(f"{out}: cannot be written ({error.strerror}); check space and permissions") from None
    rows = tell({out / item.path: item.reason for item in found.refused}, out, key_file, out.with_name(out.name + ".files.json"))
    if as_json:
        import json

        counts = {"series": found.series, "fetched": found.fetched, "already_there": found.there, "bytes": found.bytes}
        click.echo(json.dumps({"url": address.base, "out": str(out), **counts, "set_aside": rows}, indent=1))
    else:
        click.echo(
            f"{out}: {found.series} series; {found.fetched} instances fetched ({found.bytes / 1e6:.1f} MB), {found.there} were there, "
            f"{len(rows)} set aside"
        )
    if rows:
        click.get_current_context().exit(PARTIAL)
