"""`hvd-imaging dataset sign`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    epilog="""\b
Examples:
  hvd-imaging dataset sign dataset --key-file maker.pem --new-key
  hvd-imaging dataset verify dataset --public-key maker.pem.pub
  hvd-imaging train run.yaml --set data.public_key=maker.pem.pub
\b
Keep the key file secret and outside the dataset; give the .pub file to those who train.
"""
)
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--key-file", type=click.Path(path_type=Path), required=True, help="Ed25519 private key, PEM, mode 600.")
@click.option("--new-key", is_flag=True, help="Make the key pair first: KEY-FILE and KEY-FILE.pub.")
def sign(dataset: Path, key_file: Path, new_key: bool) -> None:
    """Sign the manifest of DATASET, and with it, by their SHA-256, all its shards: writes DATASET/manifest.sig."""
    from .. import keys
    from ..errors import DatasetError
    from ..shards import signing
    from ..shards.manifest import SIGNATURE, load
    from ..world import world_from_environment

    if not world_from_environment().is_root:
        return
    manifest = load(dataset)
    if dataset.resolve() in (key_file.resolve().parent, *key_file.resolve().parent.parents):
        raise DatasetError(f"{key_file}: a secret key must not lie in the dataset; choose another place")
    if new_key:
        click.echo(f"public key {keys.make_key(key_file)}")
    signing.sign(dataset, manifest, key_file)
    click.echo(f"{dataset / SIGNATURE}: signs version {manifest.hash()[:16]}, {len(manifest.shards)} shards")
