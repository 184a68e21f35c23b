"""`hvd-imaging dataset`: info, verify and split; the other verbs stand in modules of their own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import dataset_audit, dataset_sign, dataset_versions

if TYPE_CHECKING:
    from ..shards.manifest import Manifest

_DATASET = click.argument("dataset", type=click.Path(path_type=Path))
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group(
    epilog="""\b
Examples:
  hvd-imaging dataset info dataset
  hvd-imaging dataset verify dataset
  hvd-imaging dataset split dataset --out dataset2 --val 0.2 --seed 1
"""
)
def command() -> None:
    """Look at a dataset: verify, audit, sign, split it, compare its versions."""


for _verb in (dataset_versions.log, dataset_versions.diff, dataset_versions.checkout, dataset_sign.sign, dataset_audit.audit):
    command.add_command(_verb)


@command.command(epilog="\b\nExample:\n  hvd-imaging dataset info dataset --json")
@_DATASET
@_JSON
def info(dataset: Path, as_json: bool) -> None:
    """Show what DATASET holds: task, classes, splits, sizes, spacing, preprocessing, manifest hash."""
    from ..shards.manifest import load
    from ..world import world_from_environment

    if not world_from_environment().is_root:
        return
    summary = summarize(load(dataset), dataset)
    if as_json:
        _print_json(summary)
        return
    rows = [("dataset", str(dataset)), *_rows(summary)]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


@command.command(
    epilog="""\b
Examples:
  hvd-imaging dataset verify dataset
  mpirun -np 8 hvd-imaging dataset verify dataset      the ranks share the samples
  hvd-imaging dataset verify dataset --public-key maker.pem.pub
"""
)
@_DATASET
@click.option("--public-key", type=click.Path(path_type=Path), metavar="FILE", help="The manifest must be signed by this key.")
@_JSON
def verify(dataset: Path, public_key: Path | None, as_json: bool) -> None:
    """Read every sample of DATASET and compare it with the manifest's SHA-256; exit code 4 if one differs."""
    from ..communicator import connect, together
    from ..errors import DatasetError
    from ..shards.manifest import load
    from ..shards.verify import verify as run
    from .console import progress

    communicator = connect()
    if public_key is not None:
        from ..shards import signing

        key = public_key
        together(communicator, lambda: signing.check(dataset, load(dataset), key))
    problems = run(dataset, communicator, lambda items, text: progress(items, text, communicator.world))
    manifest = load(dataset)
    if communicator.world.is_root:
        if as_json:
            found = [{"sample": p.sample, "shard": p.shard, "reason": p.reason} for p in problems]
            _print_json({"dataset": str(dataset), "samples": len(manifest.samples), "problems": found})
        else:
            for problem in problems:
                whom = f"sample {problem.sample}: " if problem.sample else ""
                click.echo(f"{problem.shard}: {whom}{problem.reason}")
            if not problems:
                signed = ", which is signed by this key" if public_key is not None else ""
                click.echo(f"{dataset}: {len(manifest.samples)} samples read, all as the manifest says{signed}")
    if problems:
        if communicator.world.is_root:
            click.echo(
                f"hvd-imaging: error: {dataset}: {len(problems)} problem(s) in {len(manifest.samples)} samples; restore "
                "the shards named above from a copy, or ingest again",
                err=True,
            )
        communicator.barrier()  # leaving with a code ends all ranks: not before rank 0 has spoken
        click.get_current_context().exit(DatasetError.exit_code)


@command.command(
    epilog="""\b
Examples:
  hvd-imaging dataset split dataset --out dataset2 --val 0.2 --test 0.2
  hvd-imaging dataset split dataset --out dataset2 --seed 1             the same shares, others in training and validation
  hvd-imaging dataset split dataset --out fold0 --folds 5 --fold 0      cross-validation; the test patients stay
  hvd-imaging dataset split dataset --out dataset2 --frozen test.txt    the patients of a list, and no others, are test
"""
)
@_DATASET
@click.option("--out", "-o", type=click.Path(path_type=Path), required=True, metavar="NEW", help="Folder of the new version.")
@click.option("--val", type=float, help="Share of the patients for validation (default: as it is).")
@click.option("--test", type=float, help="Share of the patients for the final test; chooses them anew (default: they stay).")
@click.option("--seed", type=int, help="Another seed, another split (default: as it is).")
@click.option("--by", type=click.Choice(["patient", "site"]), help="Whole sites, or single patients (default: as it is).")
@click.option("--stratify/--no-stratify", default=None, help="Equal shares of each label or class (default: as it is).")
@click.option("--folds", type=int, help="k-fold cross-validation: how many (0: none).")
@click.option("--fold", type=int, help="The fold that validates, from 0.")
@click.option("--frozen", type=click.Path(path_type=str), metavar="FILE", help="Pseudonyms of the test patients, one a line.")
@_JSON
def split(
    dataset: Path,
    out: Path,
    val: float | None,
    test: float | None,
    seed: int | None,
    by: str | None,
    stratify: bool | None,
    folds: int | None,
    fold: int | None,
    frozen: str | None,
    as_json: bool,
) -> None:
    """Make NEW, a version of DATASET with other splits and the same shards (as hard links).

    All samples of a patient stay in one split, and the test patients stay test unless --test or --frozen is given. DATASET
    itself does not change.
    """
    from ..config import SplitConfig, check
    from ..shards import manifest as manifests
    from ..shards import versions
    from ..shards.split import known_among, read_frozen, refuse_mixed_rules, resplit
    from ..world import world_from_environment

    if not world_from_environment().is_root:
        return
    old = manifests.load(dataset)
    given = {
        "val": val, "test": test, "seed": seed, "by": by, "stratify": stratify, "folds": folds, "fold": fold, "frozen": frozen,
    }  # fmt: skip
    values = old.split.model_dump(mode="json") | {key: value for key, value in given.items() if value is not None}
    if folds == 0 and fold is None:
        values["fold"] = 0
    config = check(SplitConfig, values, "dataset split")
    keep = {sample.patient for sample in old.of_split("test")} if test is None else set()
    if keep and frozen is None:
        refuse_mixed_rules(old.split, config)
    new = resplit(old, config, known_among(read_frozen(frozen), old.samples) if frozen is not None else keep)
    counts = versions.plan(old, new.samples).counts()
    key = old.version.key if old.version is not None else ""
    record = versions.record("split", old, {"task": new.task, "split": new.split.model_dump(mode="json")}, counts, key)
    if old.version is not None and "config" in old.version.parameters:
        # The next ingest goes on with the settings of the last one, and with this split.
        record.parameters["config"] = {**old.version.parameters["config"], "split": record.parameters["split"]}
    new = new.model_copy(update={"version": record})
    versions.derive(dataset, out, new)
    summary = summarize(new, out)
    if as_json:
        _print_json({key: summary[key] for key in ("dataset", "manifest_hash", "files_hash", "splits", "split")})
        return
    for name, found in summary["splits"].items():
        click.echo(f"{name:<5}  {_counted(found['samples'], 'sample')} of {_counted(found['patients'], 'patient')}")
        if found["samples"] == 0:
            click.echo(f"the split '{name}' is empty: too few patients for this share", err=True)
    click.echo(f"manifest {summary['manifest_hash']}")


def summarize(manifest: Manifest, dataset: Path) -> dict[str, Any]:
    """What `dataset info --json` prints."""
    from ..shards.manifest import SIGNATURE

    splits = {}
    for name in ("train", "val", "test"):
        members = manifest.of_split(name)
        splits[name] = {"samples": len(members), "patients": len({sample.patient for sample in members})}
    shapes = [sample.shape[:3] for sample in manifest.samples]
    spacings = [sample.spacing for sample in manifest.samples]
    shards = sorted({sample.shard for sample in manifest.samples})
    paths = [dataset / name for name in shards]
    return {
        "dataset": str(dataset),
        "schema": manifest.schema_version,
        "manifest_hash": manifest.hash(),
        "files_hash": manifest.files_hash(),
        "version": manifest.version.model_dump(mode="json") if manifest.version is not None else None,
        "signed": (dataset / SIGNATURE).is_file(),
        "task": manifest.task,
        "classes": list(manifest.classes),
        "class_counts": _class_counts(manifest),
        "channels": manifest.channels,
        "dtype": sorted({sample.dtype for sample in manifest.samples}),
        "modality": sorted({sample.modality for sample in manifest.samples}),
        "samples": len(manifest.samples),
        "patients": len({sample.patient for sample in manifest.samples}),
        "parts": dict(sorted(Counter(sample.part for sample in manifest.samples if sample.part).items(), key=_by_number)),
        "splits": splits,
        "split": manifest.split.model_dump(mode="json"),
        "shards": len(shards),
        "missing_shards": [path.name for path in paths if not path.is_file()],
        "bytes": sum(path.stat().st_size for path in paths if path.is_file()),
        "shape_min": _each(min, shapes),
        "shape_max": _each(max, shapes),
        "spacing_min": _each(min, spacings),
        "spacing_max": _each(max, spacings),
        "preprocess": manifest.preprocess.model_dump(mode="json"),
        "storage": {
            **manifest.storage.model_dump(mode="json"),
            "largest_error": max((sample.error for sample in manifest.samples), default=0.0),
            "layout": _layout(manifest),
        },
        "filesystem": _filesystem(dataset, manifest, paths),
    }


def _by_number(item: tuple[str, int]) -> list[tuple[str, int]]:
    """"echo 2" before "echo 10"."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", item[0])]


def _layout(manifest: Manifest) -> str:
    """How the middle one of the volumes is cut."""
    from ..shards.chunks import Layout, explain

    if not manifest.samples:
        return ""
    sample = sorted(manifest.samples, key=lambda sample: sample.shape)[len(manifest.samples) // 2]
    return explain(Layout(sample.chunk, sample.block), manifest.storage.patch, sample.shape)


def _filesystem(dataset: Path, manifest: Manifest, paths: Sequence[Path]) -> dict[str, Any]:
    """Where the dataset lies, and what its shards want there."""
    from .. import filesystem

    found = filesystem.of(dataset)
    largest = max((path.stat().st_size for path in paths if path.is_file()), default=0)
    return {
        "name": found.name,
        "kind": found.kind,
        "shared": found.shared,
        "advice": list(filesystem.advice(found, largest, max(len(manifest.samples), 1))),
    }


def _class_counts(manifest: Manifest) -> dict[str, int]:
    """Voxels (segmentation) or samples (classification) of each class."""
    if manifest.task == "segmentation":
        rows = [sample.class_voxels or () for sample in manifest.samples]
        return {name: sum(row[i] for row in rows if i < len(row)) for i, name in enumerate(manifest.classes)}
    if manifest.task == "classification":
        return {name: sum(s.label == i for s in manifest.samples) for i, name in enumerate(manifest.classes)}
    return {}


def _rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    unit = "voxels" if summary["task"] == "segmentation" else "samples"
    counts = ", ".join(f"{name} ({count} {unit})" for name, count in summary["class_counts"].items())
    rows = [("task", summary["task"]), ("classes", counts or "none"), ("samples", str(summary["samples"]))]
    for name, split in summary["splits"].items():
        rows.append((f"  {name}", f"{_counted(split['samples'], 'sample')} of {_counted(split['patients'], 'patient')}"))
    if summary["parts"]:
        shown = [f"{part} ({count})" for part, count in summary["parts"].items()]
        rows.append(("parts of series", ", ".join(shown[:8]) + (f" and {len(shown) - 8} more kinds" if len(shown) > 8 else "")))
    rows += [
        ("patients", str(summary["patients"])),
        ("modality", ", ".join(name or "unknown" for name in summary["modality"])),
        ("image", f"{summary['channels']} channel(s), {', '.join(summary['dtype'])}"),
        ("size D H W", _span(summary["shape_min"], summary["shape_max"])),
        ("spacing D H W", _span(summary["spacing_min"], summary["spacing_max"]) + " mm"),
        ("shards", f"{summary['shards']}, {summary['bytes'] / 1e6:.1f} MB"),
    ]
    if summary["missing_shards"]:
        rows.append(("missing shards", ", ".join(summary["missing_shards"])))
    settings = summary["preprocess"]
    used = {"spacing", "intensity", "crop", "projection"}
    used |= {"window": {"window"}, "percentile": {"percentiles"}, "zscore": {"zscore_range"}}.get(
        settings["intensity"], set()
    )
    used |= {"crop_margin_mm"} if settings["crop"] != "none" else set()
    rows.append(("preprocess", ", ".join(f"{key}={value}" for key, value in settings.items() if key in used)))
    storage = summary["storage"]
    rows.append(("compression", f"{storage['compression']} ({storage['reason']})" if storage["reason"] else storage["compression"]))
    rows.append(("loss", f"{storage['largest_error']:.2g} at most, by the stored type"))
    rows.append(("layout", storage["layout"]))
    rows.append(("filesystem", summary["filesystem"]["name"]))
    rows += [("", line) for line in summary["filesystem"]["advice"]]
    version = summary["version"]
    if version is not None and version["parents"]:
        counts = ", ".join(f"{count} {name}" for name, count in version["counts"].items())
        rows.append(("made by", f"{version['action']} from {version['parents'][0]['files_hash'][:16]}: {counts}"))
    rows.append(("signed", "yes, see `dataset verify --public-key`" if summary["signed"] else "no"))
    rows += [("manifest", summary["manifest_hash"]), ("with files", summary["files_hash"])]
    return rows


def _each(choose: Any, rows: Sequence[Sequence[float]]) -> list[float]:
    return [choose(column) for column in zip(*rows, strict=True)]


def _span(low: Sequence[float], high: Sequence[float]) -> str:
    return " x ".join(f"{a:g}" if a == b else f"{a:g}-{b:g}" for a, b in zip(low, high, strict=True))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _print_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=1))
