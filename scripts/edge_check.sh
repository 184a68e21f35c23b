#!/usr/bin/env bash
# A fresh environment for the edge: base install and one light runtime, no TensorFlow, no Horovod. Predicts a volume of
# 256 x 256 x 256 with it, and prints the installed size and the peak memory. See --help.
set -euo pipefail

usage() {
  cat <<'T'
Usage: scripts/edge_check.sh EXPORT [EXPORT ...]

EXPORT: folders of `hvd-imaging export` or `hvd-imaging compress` (tflite..., onnx...), segmentation of one channel.

Environment:
  PYTHON          the interpreter to use                                     (default: python3)
  EDGE_EXTRA      what to install beside the base: edge, or "" for a runtime
                  by name in EDGE_PACKAGES                                   (default: edge)
  EDGE_PACKAGES   more packages, such as onnxruntime                         (default: none)
  EDGE_SIDE       voxels along each axis of the volume                       (default: 256)
T
}

case "${1:-}" in
  -h|--help) usage; exit 0 ;;
  "") usage >&2; exit 2 ;;
esac
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
extra=${EDGE_EXTRA-edge}
side=${EDGE_SIDE:-256}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "[edge] making an environment"
started=$SECONDS
"$python" -m venv "$work/venv"
# shellcheck disable=SC2086
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-compile \
  -c "$here/scripts/constraints.txt" "$here${extra:+[$extra]}" ${EDGE_PACKAGES:-}
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# pip and setuptools come with the environment and are not ours.
echo "[edge] installed in $((SECONDS - started)) s: $(du -sm --exclude='pip*' --exclude='setuptools*' "$site" | cut -f1) MiB," \
  "$("$work/venv/bin/python" -m pip list --format=freeze --disable-pip-version-check | wc -l) packages"
du -sm "$site"/* | sort -rn | sed -n "1,8s|$site/|        |p"
for name in tensorflow horovod tf_keras mpi4py; do
  if "$work/venv/bin/python" -c "import $name" 2>/dev/null; then echo "[edge] error: $name is installed" >&2; exit 1; fi
done

cd "$work"
"$work/venv/bin/python" - "$side" <<'P'
import sys
import nibabel
import numpy
side = int(sys.argv[1])
values = numpy.random.default_rng(0).random((side, side, side), numpy.float32)
nibabel.save(nibabel.Nifti1Image(values, numpy.eye(4)), "volume.nii")
P
for export in "$@"; do
  export=$(cd "$OLDPWD" && realpath "$export")
  began=$(date +%s.%N)
  "$work/venv/bin/hvd-imaging" predict --edge "$export" volume.nii mask.nii.gz --force --json > answer.json
  "$work/venv/bin/python" - "$began" "$side" <<'P'
import json
import sys
import time
answer, began, side = json.load(open("answer.json")), float(sys.argv[1]), sys.argv[2]
print(f"[edge] {answer['format']}: {side}^3 voxels in {time.time() - began:.1f} s, peak memory {answer['peak_bytes'] / 2**20:.0f} MiB")
P
done
