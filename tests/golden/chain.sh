#!/bin/bash
# Submits the jobs one after another; each begins when the one before has ended well. Made by `hvd-imaging submit`.
set -euo pipefail
ingest=$(sbatch --parsable '/data/ada/my runs/slurm/ingest.sbatch')
echo "ingest: job ${ingest%%;*}"
train=$(sbatch --parsable --dependency=afterok:"${ingest%%;*}" --kill-on-invalid-dep=yes '/data/ada/my runs/slurm/train.sbatch')
echo "train: job ${train%%;*}"
evaluate=$(sbatch --parsable --dependency=afterok:"${train%%;*}" --kill-on-invalid-dep=yes '/data/ada/my runs/slurm/evaluate.sbatch')
echo "evaluate: job ${evaluate%%;*}"
compress=$(sbatch --parsable --dependency=afterok:"${evaluate%%;*}" --kill-on-invalid-dep=yes '/data/ada/my runs/slurm/compress.sbatch')
echo "compress: job ${compress%%;*}"
