"""`hvd-imaging sign`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    epilog="""\b
Examples:
  hvd-imaging sign models/unet3d --key-file maker.pem --new-key
  hvd-imaging predict models/unet3d series/ mask.dcm --public-key maker.pem.pub
\b
Keep the key file secret and outside the model; give the .pub file to those who use it.
A run that is trained on, or an export that is written again, is to be signed again.
Datasets: hvd-imaging dataset sign.
"""
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--key-file", type=click.Path(path_type=Path), required=True, help="Ed25519 private key, PEM, mode 600.")
@click.option("--new-key", is_flag=True, help="Make the key pair first: KEY-FILE and KEY-FILE.pub.")
def command(model: Path, key_file: Path, new_key: bool) -> None:
    """Sign MODEL, a run or an export, and with it, by their SHA-256, its files: writes MODEL/model.sig."""
    from .. import keys
    from ..errors import RunError
    from ..inference import signing
    from .console import refuse_many_ranks

    refuse_many_ranks("sign")
    if model.resolve() in (key_file.resolve().parent, *key_file.resolve().parent.parents):
        raise RunError(f"{key_file}: a secret key must not lie in the model; choose another place")
    if new_key:
        click.echo(f"public key {keys.make_key(key_file)}")
    files = signing.sign(model, key_file)
    click.echo(f"{model / signing.NAME}: signs {', '.join(files)}")
