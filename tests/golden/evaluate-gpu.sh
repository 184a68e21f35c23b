#!/bin/bash
#SBATCH --job-name=evaluate-unet3d
#SBATCH --output=/data/ada/lung/runs/unet3d/slurm/evaluate-%j.out
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

# evaluate: 4 ranks on 4 nodes, made by `hvd-imaging submit`.
cd /data/ada/lung || exit
export PATH=/data/ada/venv/bin:"$PATH"
echo "$(date -Is) evaluate: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1))"
mpirun -np 4 --bind-to none hvd-imaging evaluate runs/unet3d
