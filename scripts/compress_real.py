"""What integers cost on a real image: grey and white matter in the MNI152 template, cut into blocks, trained, compressed, judged.

    pip install --constraint scripts/constraints.txt nilearn
    python scripts/compress_real.py --work DIR

The template (a T1-weighted MR, averaged over 152 heads) and its tissue maps are files of nilearn; nothing is downloaded. Its two
halves are mirror images of each other, so one of them is used. Test blocks come from coronal slabs of their own, with a gap to
the others. About 2 minutes on one core; DIR keeps everything, and a second call goes on there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

SIDE, GAP, SLAB_GAP = 24, 4, 8
"""Side of a block, gaps in the slab and between slabs; all in mm, which are voxels here."""
TEST_SLABS = (1, 4)
LEAST = 0.02
"""Share of a block that grey and white matter must have each: blocks of air and edges teach and test nothing."""
# Name, the run that it begins from, steps. The second one is the question: the same weights in floats and in integers.
RECIPES = (
    ("frozen", "run", [{"do": "freeze_norms", "patches": 64, "epochs": 6}]),
    ("int8", "frozen/model", []),
    ("norms_left", "run", []),
)


def main() -> int:
    """Print one line a format; 1 if an integer format lost more than half a point of Dice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for blocks, dataset, run and models")
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()
    try:
        from nilearn import datasets
    except ImportError:
        print("compress_real: no nilearn here: pip install --constraint scripts/constraints.txt nilearn", file=sys.stderr)
        return 2
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "dataset").exists():
        make_dataset(work, datasets)
    if not (work / "run" / "best.npz").exists():
        train(work, args.epochs)
    product(work, "evaluate", "run")
    return judge(work)


def blocks(shape: tuple[int, int, int]) -> list[tuple[int, tuple[slice, slice, slice]]]:
    """Coronal slab and place of each block of the right half of ``shape`` (X, Y, Z); no two of them touch. Pure."""
    places = []
    for slab, y in enumerate(range(0, shape[1] - SIDE + 1, SIDE + SLAB_GAP)):
        for x in range(shape[0] // 2 + 1, shape[0] - SIDE + 1, SIDE + GAP):
            for z in range(0, shape[2] - SIDE + 1, SIDE + GAP):
                places.append((slab, (slice(x, x + SIDE), slice(y, y + SIDE), slice(z, z + SIDE))))
    return places


def make_dataset(work: Path, datasets) -> None:
    """Blocks as NIfTI files in the Decathlon's layout, then `hvd-imaging ingest`."""
    import nibabel

    from hvd_imaging.privacy.pseudonym import load_or_make_key, pseudonym

    image = datasets.load_mni152_template(resolution=1)
    voxels = image.get_fdata()
    grey = datasets.load_mni152_gm_template(resolution=1).get_fdata()
    white = datasets.load_mni152_wm_template(resolution=1).get_fdata()
    # A voxel belongs to the tissue that makes up more than half of it.
    tissue = np.where(grey > 0.5, 1, np.where(white > 0.5, 2, 0)).astype(np.uint8)
    used = [voxels.any(axis=(0, 2)).nonzero()[0][[0, -1]], voxels.any(axis=(0, 1)).nonzero()[0][[0, -1]]]
    (y0, y1), (z0, z1) = used
    source, test, count = work / "blocks", [], 0
    for folder in ("imagesTr", "labelsTr"):
        (source / folder).mkdir(parents=True, exist_ok=True)
    key = load_or_make_key(work / "dataset.key")
    for slab, (x, y, z) in blocks((voxels.shape[0], y1 + 1 - y0, z1 + 1 - z0)):
        y, z = slice(y.start + y0, y.stop + y0), slice(z.start + z0, z.stop + z0)
        mask = tissue[x, y, z]
        if min((mask == 1).mean(), (mask == 2).mean()) < LEAST:
            continue
        name = f"slab{slab}_{count:03d}"
        count += 1
        affine = image.affine.copy()
        affine[:3, 3] = (image.affine @ [x.start, y.start, z.start, 1])[:3]
        nibabel.save(nibabel.Nifti1Image(voxels[x, y, z].astype(np.float32), affine), source / "imagesTr" / f"{name}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(mask, affine), source / "labelsTr" / f"{name}.nii.gz")
        if slab in TEST_SLABS:
            test.append(pseudonym(key, "patient", name))
    description = {"name": "MNI152", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "grey", "2": "white"}}
    (source / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    (work / "test.txt").write_text("\n".join(test) + "\n", encoding="utf-8")
    print(f"{count} blocks of {SIDE} mm, {len(test)} of them for the test", flush=True)
    product(
        work, "ingest", "blocks", "dataset", "--task", "segmentation",
        # The template is one image with one scale: its blocks are not scaled again, each for itself.
        "--set", "preprocess.intensity=none", "--set", "split.frozen=test.txt", "--set", "split.val=0.15",
        "--set", f"shards.patch=[{SIDE},{SIDE},{SIDE}]",
    )  # fmt: skip


def train(work: Path, epochs: int) -> None:
    """A small 3D U-Net with instance norms."""
    product(work, "init", "segmentation", "--dataset", "dataset", "-o", "run.yaml", "--force")
    product(
        work, "train", "run.yaml", "--run-dir", "run", "--set", f"data.patch=[{SIDE},{SIDE},{SIDE}]",
        "--set", "data.patches_per_volume=2", "--set", "model.filters=16", "--set", "model.depth=3",
        "--set", "model.norm=instance", "--set", f"train.epochs={epochs}", "--set", "train.learning_rate=3e-3",
        "--set", "output.tensorboard=false",
    )  # fmt: skip


def judge(work: Path) -> int:
    """Compress by each recipe and print what the gate measured."""
    worst, lines = 0.0, []
    for name, start, steps in RECIPES:
        recipe = {"steps": steps, "formats": ["tflite", "tflite-int8", "onnx-int8"], "split": "test", "repeats": 1}
        (work / f"{name}.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        if not (work / name / "compress.json").exists():
            product(work, "compress", start, "--recipe", f"{name}.yaml", "--out", name, "--resume", accepted=(0, 11))
        result = json.loads((work / name / "compress.json").read_text(encoding="utf-8"))
        lines.append(f"{name}: {start} in float: Dice {result['reference']['metrics']['dice']['value']:.4f}")
        for one in result["formats"]:
            change = one["differences"].get("dice")
            if change is None:
                lines.append(f"{name}: {one['format']}: {one['reason']}")
                continue
            low, high = change["interval"] or (0.0, 0.0)  # none where no case differs
            lines.append(
                f"{name}: {one['format']}: Dice {one['metrics']['dice']['value']:.4f}, change {change['value']:+.3f} points "
                f"({low:+.3f} to {high:+.3f}), {change['count']} cases; {'released' if one['format'] in result['released'] else 'refused'}"
            )
            if one["format"].endswith("int8"):
                worst = max(worst, -change["value"])
    print("\n".join(lines))
    print(f"largest loss of an integer format: {worst:.3f} points of Dice (limit 0.5)")
    return int(worst > 0.5)


def product(work: Path, *arguments: str, accepted: tuple[int, ...] = (0,)) -> None:
    """Run `hvd-imaging` in ``work``; its words go to the terminal."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))}
    print("$ hvd-imaging", *arguments, flush=True)
    done = subprocess.run([sys.executable, "-m", "hvd_imaging.cli.main", *arguments], cwd=work, env=environ)
    if done.returncode not in accepted:
        raise SystemExit(f"compress_real: `hvd-imaging {arguments[0]}` ended with code {done.returncode}")


if __name__ == "__main__":
    sys.exit(main())
