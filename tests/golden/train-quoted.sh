#!/bin/bash
#SBATCH --job-name="a 'b' \"c\" \\d"
#SBATCH --output="/data/a b/$HOME/runs/it's 100%% \"new\"/slurm/train-%j.out"
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180

# train: 1 rank on 1 node, made by `hvd-imaging submit`.
cd '/data/a b/$HOME' || exit
export PATH=/data/ada/venv/bin:"$PATH"
echo "$(date -Is) train: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1))"
# Slurm tells this script alone that the time ends or that the job gives way, 180 s before. The ranks then
# write a checkpoint and leave with code 75; queued again, they go on there.
child='' asked=''
# shellcheck disable=SC2317 # the traps call it
ask() {
  asked=$1
  [ -z "$child" ] || kill -USR1 "$child" 2>/dev/null
}
trap 'ask requeue' USR1
trap 'ask leave' TERM
hvd-imaging launch -np 1 --max-restarts 3 --leave-lost-hosts --grace 150 --mpirun-arg --bind-to --mpirun-arg none -- train runs/unet3d/slurm/run.yaml --run-dir 'runs/it'"'"'s 100% "new"' --resume --set train.epochs=20 &
child=$!
wait "$child"
code=$?
# A trap ends `wait`, not the command.
while kill -0 "$child" 2>/dev/null; do
  wait "$child"
  code=$?
done
echo "$(date -Is) train: ended with code $code${asked:+, asked to $asked}"
case $asked/$code in
  */0 | */2 | */3 | */5 | */6 | leave/*) ;; # done, or nothing that another start would mend
  requeue/* | */205 | */255) # asked to make room; or a node was lost (mpirun's codes)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
      echo "$(date -Is) train: queued again"
      scontrol requeue "$SLURM_JOB_ID" && exec sleep 60 # Slurm ends it here
    fi
    echo "train: not queued again after $((${SLURM_RESTART_COUNT:-0} + 1)) starts" >&2
    ;;
esac
exit "$code"
