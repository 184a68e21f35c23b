#!/usr/bin/env bash
# From nothing to a predicted DICOM series: environment, synthetic archive, ingest, training on 2 ranks, evaluation,
# export, prediction, and a table. See --help.
set -euo pipefail

usage() {
  cat <<'T'
Usage: scripts/quickstart.sh [FOLDER]

Sets up the environment (scripts/setup_env.sh), then makes in FOLDER (default: quickstart beside this script's folder):
  archive/  unseen/            synthetic chest CT: one to learn from, one patient that no training sees
  segment/  classify/          datasets
  runs/                        a 3D U-Net and a VGG16, trained on 2 ranks
  models/                      exports
  predictions/                 of the unseen series
About 15 minutes on 2 cores after the set-up. FOLDER must not exist yet, or be empty.
T
}

case "${1:-}" in
  -h|--help) usage; exit 0 ;;
  -*) usage >&2; exit 2 ;;
esac
[ $# -le 1 ] || { usage >&2; exit 2; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-$here/quickstart}
if [ -e "$out" ] && [ -n "$(ls -A "$out" 2>&1)" ]; then
  printf 'quickstart: %s is not empty; remove it (rm -r %q) or give another folder\n' "$out" "$out" >&2
  exit 1
fi

"$here/scripts/setup_env.sh"
venv=${HVD_IMAGING_VENV:-$here/.venv}
export PATH="$venv/bin:$PATH"
# shellcheck source=scripts/mpi_env.sh
. "$here/scripts/mpi_env.sh"
# Open MPI binds two ranks to one core each; unbound, each takes its half of all cores.
export OMPI_MCA_hwloc_base_binding_policy=none

mkdir -p "$out"
cd "$out"
started=$SECONDS
run() { printf '\n[%3d s] $ %s\n' "$((SECONDS - started))" "$*"; "$@"; }

# One patient of another seed is held out of everything.
run hvd-imaging phantom archive --patients 120 --seed 1
run hvd-imaging phantom unseen --patients 1 --seed 3

run mpirun -np 2 hvd-imaging ingest archive segment --task segmentation \
  --set 'preprocess.spacing=[5,4,4]' --set preprocess.crop=body \
  --set split.val=0.1 --set split.test=0.2 --set split.stratify=true
# The middle half of each chest as one image: there the lungs lie open, and nodules are bright spots in them.
run mpirun -np 2 hvd-imaging ingest archive classify --task classification --labels archive/labels.csv \
  --set 'preprocess.spacing=[4,3.25,3.25]' --set preprocess.crop=body \
  --set preprocess.projection=mip --set 'preprocess.projection_slab=[0.25,0.75]' \
  --set split.val=0.1 --set split.test=0.2
run hvd-imaging dataset info segment

run hvd-imaging init segmentation --dataset segment -o segment.yaml
# Small batches are many updates, and patches away from nodules show what is none: so healthy chests stay healthy.
run mpirun -np 2 hvd-imaging train segment.yaml --run-dir runs/unet3d \
  --set data.patches_per_volume=1 --set data.foreground=0.6 --set model.filters=8 --set model.norm=group \
  --set train.epochs=20 --set train.batch_size=2 --set train.learning_rate=4e-3 --set train.validate_every=4
run hvd-imaging init classification --dataset classify -o classify.yaml
run mpirun -np 2 hvd-imaging train classify.yaml --run-dir runs/vgg16 \
  --set 'data.patch=[1,48,80]' --set 'data.augment.flip=[false,true,true]' \
  --set train.epochs=40 --set train.learning_rate=3e-4 --set train.validate_every=4

run mpirun -np 2 hvd-imaging evaluate runs/unet3d
run mpirun -np 2 hvd-imaging evaluate runs/vgg16

run hvd-imaging init compress-segmentation -o recipe.yaml
# Exit code 11 says that no format kept the limits: worth a look, and no reason to stop here.
run mpirun -np 2 hvd-imaging compress runs/unet3d --recipe recipe.yaml --out compressed --set repeats=1 || [ $? -eq 11 ]

run hvd-imaging export runs/unet3d --format savedmodel models/unet3d-savedmodel
run hvd-imaging export runs/unet3d --format tflite models/unet3d-tflite
run hvd-imaging export runs/vgg16 --format savedmodel models/vgg16-savedmodel
run hvd-imaging export runs/vgg16 --format tflite models/vgg16-tflite

mkdir predictions
run hvd-imaging predict models/unet3d-savedmodel unseen/patient_0000/series predictions/unseen_seg.dcm
run hvd-imaging predict models/vgg16-tflite unseen/patient_0000/series predictions/unseen.csv

printf '\n=== after %d s ===\n\n' "$((SECONDS - started))"
python -m hvd_imaging.reporting.summary runs/unet3d runs/vgg16 \
  --files archive segment classify runs models predictions
cat <<T

The data is synthetic and small: the figures show that the chain works, not how good a network can be.

Where to look next, in $out
  runs/unet3d/plots, runs/vgg16/plots       learning curves, ROC, confusion matrix, worst and best cases
  runs/*/evaluation-test.json               every case with its figures and confidence intervals
  compressed/model_card.html                the compressed U-Net: what it is good for, what was released and why
  predictions/                              DICOM SEG of the unseen series, and its class as CSV
  segment.yaml, classify.yaml               every setting with a comment: change one and train again
  tensorboard --logdir runs                 the course of training (first: source $venv/bin/activate)
  $here/docs/quickstart.md    the same with your own data
T
