#!/usr/bin/env python3
"""Jobs on a virtual Slurm that are preempted, lose a node or come to their time limit at random moments; then the weights are compared.

    scripts/soak_slurm.py --jobs 10        # root, Debian's slurm-wlm and munge; about 10 minutes

Exit code 0: every job ended with the weights of one that nobody disturbed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from slurm_cluster import Cluster
from soak import state_hash, write_config

KINDS = ("preempted", "node of the script lost", "other node lost", "time limit")
URGENT = "#!/bin/sh\n#SBATCH --partition=urgent --nodes=1 --exclusive --time=1 --output=/dev/null\nsleep 2\n"


def main() -> int:
    """Print one line a job; 1 if one ended with other weights or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dice, wrong = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory(prefix="hvd_imaging_soak.") as name:
        folder = Path(name)
        cluster = Cluster(folder / "cluster")
        try:
            write_config(folder)
            expected = job(cluster, folder, "whole", [], dice)
            print(f"undisturbed: {expected[:16]}", flush=True)
            for number in range(args.jobs):
                what = [KINDS[number % len(KINDS)], *dice.sample(KINDS, dice.randint(0, 1))]
                began = time.monotonic()
                try:
                    found = job(cluster, folder, f"job{number}", what, dice)
                except AssertionError as error:
                    found = f"did not end: {error}"
                wrong += found != expected
                alike = "alike" if found == expected else "DIFFERENT"
                print(f"job {number + 1}: {', then '.join(what)}: {found[:64]} {alike} ({time.monotonic() - began:.0f} s)", flush=True)
        finally:
            cluster.close()
    print(f"{args.jobs - wrong} of {args.jobs} jobs ended with the weights of the undisturbed one")
    return int(wrong > 0)


def job(cluster: Cluster, folder: Path, name: str, disturbances: list[str], dice: random.Random) -> str:
    """Hash of weights and optimizer of a two-node job that was disturbed so."""
    out = cluster.hvd("submit", "run.yaml", "--nodes", "2", "--time", "10", "--signal-seconds", "30", "--run-dir", name,
                      "--set", "train.epochs=60", cwd=folder).stdout  # fmt: skip
    number = out.split("job ")[1].split()[0]
    step = 0
    for what in disturbances:
        ahead = step + dice.randint(3, 30)
        seen = cluster.wait(name, folder, lambda s, ahead=ahead: s["state"] == "done" or ((s["step"] or 0) > ahead and s["state"] in ("running", "saving")))
        if seen[-1]["state"] == "done":
            return f"ended before it was {what}"
        restarts = seen[-1]["jobs"][0]["restarts"]
        if what == "preempted":
            (folder / "urgent.sh").write_text(URGENT)
            assert cluster.call("sbatch", "urgent.sh", cwd=folder).returncode == 0
        elif what == "time limit":
            assert cluster.call("scontrol", "update", f"job={number}", "TimeLimit=1").returncode == 0
        else:
            node = "n1" if what.startswith("node of the script") else "n2"
            cluster.kill(node)
            time.sleep(8)  # Slurm has noticed
            cluster.start(node)
        again = cluster.wait(name, folder, lambda s, restarts=restarts: s["jobs"][0]["restarts"] > restarts or s["state"] == "done", 150)[-1]
        if again["jobs"][0]["restarts"] == restarts:
            return f"ended before it was {what}"
        cluster.call("scontrol", "update", f"job={number}", "TimeLimit=10")
        step = again["step"]
    cluster.wait(name, folder, lambda s: s["state"] == "done", 240)
    return state_hash(folder / name)


if __name__ == "__main__":
    sys.exit(main())
