#!/bin/bash
#SBATCH --job-name=train-unet3d
#SBATCH --output=/data/ada/lung/runs/unet3d/slurm/train-%j.out
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=01:00:00
#SBATCH --no-requeue
#SBATCH --signal=B:USR1@180

# train: 2 ranks on 2 nodes, made by `hvd-imaging submit`.
cd /data/ada/lung || exit
export PATH=/data/ada/venv/bin:"$PATH"
echo "$(date -Is) train: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1))"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 's/$/:1/' | paste -sd,)
# horovodrun does not pass signals on: it is ended, and what came after the last checkpoint is computed again.
child='' asked=''
# shellcheck disable=SC2317 # the traps call it
ask() {
  asked=$1
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap 'ask requeue' USR1
trap 'ask leave' TERM
horovodrun -np 2 -H "$hosts" hvd-imaging train runs/unet3d/slurm/run.yaml --run-dir runs/unet3d --resume --set train.epochs=20 &
child=$!
wait "$child"
code=$?
# A trap ends `wait`, not the command.
while kill -0 "$child" 2>/dev/null; do
  wait "$child"
  code=$?
done
echo "$(date -Is) train: ended with code $code${asked:+, asked to $asked}"
exit "$code"
