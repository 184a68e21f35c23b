#!/usr/bin/env bash
# A real Slurm of two or more nodes on one machine, for trying and testing jobs. Nothing of the system is touched: configuration,
# keys, sockets and logs live in DIR. Needs Debian's slurm-wlm and munge, and root (slurmd starts jobs as their users).
#
#   eval "$(scripts/virtual_slurm.sh up DIR [NODES])"     start, and point this shell to it (SLURM_CONF)
#   scripts/virtual_slurm.sh kill DIR NODE                a node dies: its daemon and all that ran on it
#   scripts/virtual_slurm.sh start DIR NODE               and comes back
#   scripts/virtual_slurm.sh down DIR                     stop; DIR keeps the logs
#
# Partitions: batch (default; gives way to urgent, with 30 s for a checkpoint), urgent, short (10 minutes at most).
set -euo pipefail

usage() {
  sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
  exit 2
}

[ $# -ge 2 ] || usage
action=$1
mkdir -p "$2"
dir=$(realpath "$2")
export SLURM_CONF=$dir/slurm.conf

write_configuration() {
  local nodes=$1 host cores memory base
  host=$(hostname -s)
  cores=$(nproc)
  memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) * 3 / 4096))
  # Ports of this folder, so that two clusters can run side by side.
  base=$((20000 + $(printf %s "$dir" | cksum | cut -d' ' -f1) % 200 * 50))
  local names=()
  for i in $(seq 1 "$nodes"); do names+=("n$i"); done
  local list
  list=$(
    IFS=,
    echo "${names[*]}"
  )
  {
    cat <<EOF
ClusterName=virtual
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$base
AuthType=auth/munge
CredType=cred/munge
# A queued job that was thrown out waits for its old credential to expire.
AuthInfo=socket=$dir/run/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
SlurmdTimeout=6
KillWait=5
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
EOF
    for i in $(seq 1 "$nodes"); do
      echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((base + i)) CPUs=$cores RealMemory=$memory"
    done
    echo "PartitionName=batch Nodes=$list Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 State=UP"
    echo "PartitionName=urgent Nodes=$list MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF State=UP"
    echo "PartitionName=short Nodes=$list MaxTime=10 PriorityTier=1 State=UP"
  } >"$SLURM_CONF"
}

start_node() { slurmd -N "$1" -f "$SLURM_CONF"; }

pids_of_node() {
  # Steps are no children of slurmd and hide their environment, but every task has its node's name and this SLURM_CONF.
  local environment pid parent
  [ ! -f "$dir/run/$1.pid" ] || cat "$dir/run/$1.pid"
  for environment in /proc/[0-9]*/environ; do
    # A redirection would complain of processes that have gone.
    # shellcheck disable=SC2002
    if cat "$environment" 2>/dev/null | tr "\0" "\n" | grep -qx "SLURMD_NODENAME=$1" &&
      cat "$environment" 2>/dev/null | tr "\0" "\n" | grep -qx "SLURM_CONF=$SLURM_CONF"; then
      pid=${environment//[!0-9]/}
      echo "$pid"
      parent=$(awk '{print $4}' "/proc/$pid/stat" 2>/dev/null || true)
      [ "$(cat "/proc/${parent:-0}/comm" 2>/dev/null)" != slurmstepd ] || echo "$parent"
    fi
  done
}

kill_pids() {
  local pids
  pids=$(sort -u)
  [ -z "$pids" ] || xargs kill -KILL <<<"$pids" 2>/dev/null || true
}

case $action in
up)
  for program in slurmctld slurmd munged; do
    if ! PATH=$PATH:/usr/sbin command -v $program >/dev/null; then
      echo "virtual_slurm.sh: $program is missing; install Debian's slurm-wlm and munge" >&2
      exit 6
    fi
  done
  if [ "$(id -u)" -ne 0 ]; then
    echo "virtual_slurm.sh: needs root" >&2
    exit 6
  fi
  PATH=$PATH:/usr/sbin
  if [ -f "$dir/run/slurmctld.pid" ] && kill -0 "$(cat "$dir/run/slurmctld.pid")" 2>/dev/null; then
    echo "virtual_slurm.sh: $dir: runs already; 'down' stops it" >&2
    exit 5
  fi
  rm -rf "$dir"/{run,state} "$dir"/spool-*
  mkdir -p "$dir"/{run,log,state}
  chmod 755 "$dir" "$dir/run"
  write_configuration "${3:-2}"
  head -c 1024 /dev/urandom >"$dir/run/munge.key"
  chmod 600 "$dir/run/munge.key"
  munged --force --socket="$dir/run/munge.socket" --key-file="$dir/run/munge.key" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed" >&2
  slurmctld -c -f "$SLURM_CONF" >&2
  for i in $(seq 1 "${3:-2}"); do start_node "n$i" >&2; done
  for _ in $(seq 1 100); do
    if [ "$(sinfo -h -N -p batch -t idle -o %N 2>/dev/null | wc -l)" -eq "${3:-2}" ]; then
      echo "export SLURM_CONF=$SLURM_CONF"
      exit 0
    fi
    sleep 0.2
  done
  echo "virtual_slurm.sh: the nodes did not come up within 20 s; look at $dir/log" >&2
  sinfo -N -l >&2 || true
  exit 6
  ;;
kill)
  [ $# -eq 3 ] || usage
  pids_of_node "$3" | kill_pids
  ;;
start)
  [ $# -eq 3 ] || usage
  PATH=$PATH:/usr/sbin start_node "$3"
  ;;
down)
  if [ -f "$SLURM_CONF" ]; then
    scancel --full --signal=KILL --me 2>/dev/null || true
    sed -n 's/^NodeName=\([^ ]*\).*/\1/p' "$SLURM_CONF" | while read -r node; do pids_of_node "$node" | kill_pids; done
    for name in slurmctld munged; do
      [ ! -f "$dir/run/$name.pid" ] || kill "$(cat "$dir/run/$name.pid")" 2>/dev/null || true
    done
  fi
  ;;
*) usage ;;
esac
