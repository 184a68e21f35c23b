"""`hvd-imaging dataset log|diff|checkout`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..shards.versions import Known

_DATASET = click.argument("dataset", type=click.Path(path_type=Path))
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_MOST = 20


@click.command(epilog="\b\nExample:\n  hvd-imaging dataset log dataset3")
@_DATASET
@_JSON
def log(dataset: Path, as_json: bool) -> None:
    """Show this version of DATASET and those that it was made from.

    Ancestors are looked for in the folder that holds DATASET; of one that is not there only the hashes are known.
    """
    from ..shards.versions import lineage
    from ..world import world_from_environment

    if not world_from_environment().is_root:
        return
    rows = [_described(known) for known in lineage(dataset)]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        place = row["folder"] or "not beside: known by its child only"
        click.echo(f"version {row['hash'][:16]}  with files {row['files_hash'][:16]}  {place}")
        if row["folder"] is None:
            continue
        made = row["action"] or "not recorded"
        click.echo(f"  made by    {made}{', version ' + row['code'] if row['code'] else ''}")
        click.echo(f"  task       {row['task']}; samples: " + ", ".join(f"{k} {n}" for k, n in row["samples"].items()))
        if row["parents"]:
            click.echo("  parent     " + ", ".join(parent["files_hash"][:16] for parent in row["parents"]))
            click.echo("  since then " + ", ".join(f"{count} {name}" for name, count in row["counts"].items()))


def _described(known: Known) -> dict[str, Any]:
    row: dict[str, Any] = {"hash": known.hash, "files_hash": known.files_hash, "folder": None}
    if known.manifest is None:
        return row
    version = known.manifest.version
    return row | {
        "folder": str(known.folder),
        "task": known.manifest.task,
        "samples": known.manifest.counts(),
        "action": version.action if version else "",
        "code": version.code if version else "",
        "parents": [parent.model_dump() for parent in version.parents] if version else [],
        "parameters": version.parameters if version else {},
        "counts": version.counts if version else {},
    }


@click.command(
    epilog="""\b
Examples:
  hvd-imaging dataset diff dataset dataset2
  hvd-imaging dataset diff dataset dataset2 --json
"""
)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@_JSON
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Show what differs from dataset A to dataset B: samples, splits, classes, settings."""
    from ..shards import versions
    from ..shards.manifest import load
    from ..world import world_from_environment

    if not world_from_environment().is_root:
        return
    one, two = load(a), load(b)
    found = versions.diff(one, two)
    if as_json:
        found = {"a": {"hash": one.hash(), "files_hash": one.files_hash()}, "b": {"hash": two.hash(), "files_hash": two.files_hash()}} | found
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(f"A {one.hash()[:16]}  {a}")
    click.echo(f"B {two.hash()[:16]}  {b}")
    click.echo(
        f"{len(found['added'])} added, {found['kept']} kept, {len(found['changed'])} changed, {len(found['removed'])} removed, "
        f"{len(found['splits'])} in another split; {found['shared_shards']} shards shared"
    )
    lines = [f"+ {row['sample']}  patient {row['patient']}  {row['split']}" for row in found["added"]]
    lines += [f"- {row['sample']}  patient {row['patient']}  {row['split']}" for row in found["removed"]]
    lines += [f"~ {row['sample']}  patient {row['patient']}  {', '.join(row['fields'])}" for row in found["changed"]]
    lines += [f"> {row['sample']}  patient {row['patient']}  {row['from']} to {row['to']}" for row in found["splits"]]
    for line in lines[:_MOST]:
        click.echo(line)
    if len(lines) > _MOST:
        click.echo(f"and {len(lines) - _MOST} more (--json shows all)")
    for name, change in found["settings"].items():
        click.echo(f"{name}: {json.dumps(change['from'])} to {json.dumps(change['to'])}")


@click.command(
    epilog="""\b
Examples:
  hvd-imaging dataset checkout dataset3 4f0c2a91 old        the version of which a hash begins so
  hvd-imaging dataset checkout dataset3 parent old
  hvd-imaging dataset checkout dataset3 runs/first old      the one that this run was trained on
"""
)
@_DATASET
@click.argument("version")
@click.argument("out", type=click.Path(path_type=Path))
def checkout(dataset: Path, version: str, out: Path) -> None:
    """Make the folder OUT with another version of DATASET, from shards that lie there or beside it (as hard links).

    VERSION is the beginning of a hash (of content or files), the word parent, or a folder with a manifest.json: a run keeps
    the manifest that it was trained on, so its dataset can be put together again after its own folder is gone, as long as
    other versions hold the shards.
    """
    from ..errors import DatasetError
    from ..shards import manifest as manifests
    from ..shards import versions
    from ..world import world_from_environment

    if not world_from_environment().is_root:
        return
    candidates = versions.beside(dataset)
    if version == "parent":
        parents = [known for known in versions.lineage(dataset, candidates)[1:2] if known.folder is not None]
        if not parents:
            raise DatasetError(f"{dataset}: has no parent, or it does not lie beside; `hvd-imaging dataset log {dataset}` tells")
        source = parents[0].folder
    elif (Path(version) / manifests.NAME).is_file():
        source = Path(version)
    else:
        source = versions.find_version(dataset, version)[0]
    assert source is not None
    manifest = manifests.load(source)
    extra = [source / manifests.SIGNATURE] if (source / manifests.SIGNATURE).is_file() else []
    versions.checkout(manifest, candidates(), out, extra)
    click.echo(f"{out}: version {manifest.hash()[:16]}, {len(manifest.samples)} samples in {len(manifest.shards)} shards")
