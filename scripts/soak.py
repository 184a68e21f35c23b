"""The soak test behind soak.sh: SIGKILL at random moments of training, validation and saving, then compare the weights."""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from datasets import make_dataset

from hvd_imaging.training import checkpoint
from hvd_imaging.training.events import read_events
from hvd_imaging.training.heartbeat import Beat, read_beats

PHASES = ("training", "validation", "saving")


def main() -> int:
    """Print one line a kill and one a run; 1 if a run ended with other weights or not at all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="ranks to kill in all")
    parser.add_argument("--per-run", type=int, default=5, help="kills in one run")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=40, help="give up after this time")
    args = parser.parse_args()
    dice, end = random.Random(args.seed), time.monotonic() + 60 * args.minutes
    kills: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="hvd_imaging_soak.") as name:
        folder = Path(name)
        config = write_config(folder)
        begin(folder, config, "whole", args.ranks).communicate(timeout=300)
        expected = state_hash(folder / "whole")
        print(f"uninterrupted: {expected[:16]}", flush=True)
        run, wrong = 0, 0
        while sum(kills.values()) < args.kills and time.monotonic() < end:
            run += 1
            directory = folder / f"run{run}"
            process = begin(folder, config, directory.name, args.ranks)
            try:
                for _ in range(min(args.per_run, args.kills - sum(kills.values()))):
                    # The phase that was hit least comes next.
                    phase = kill_in(min(PHASES, key=lambda p: (kills[p], dice.random())), directory, process, args.ranks, dice)
                    if phase is None:
                        break
                    kills[phase] += 1
                code = process.wait(timeout=300)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait(timeout=60)
            found = state_hash(directory) if code == 0 else f"exit code {code}"
            alike = found == expected
            wrong += not alike
            restarts = sum(e["event"] == "restart" for e in read_events(directory))
            print(f"run {run}: {restarts} restarts, {found[:16]} {'alike' if alike else 'DIFFERENT'}", flush=True)
    total = sum(kills.values())
    print(f"{total} kills ({', '.join(f'{kills[p]} in {p}' for p in PHASES)}) in {run} runs, {wrong} ended otherwise")
    return int(wrong > 0 or total < args.kills)


def write_config(folder: Path) -> Path:
    """A run of about 40 steps with frequent checkpoints and a long validation."""
    make_dataset(folder / "data", samples=12, shape=(24, 40, 40), split=(0.4, 0.0))
    values = {
        "data": {"dataset": str(folder / "data"), "patch": [8, 16, 16], "patches_per_volume": 3},
        "model": {"name": "unet3d", "filters": 16, "depth": 3},
        "train": {
            "epochs": 8, "batch_size": 4, "checkpoint_steps": 1, "keep_checkpoints": 3, "reproducible": True,
            "learning_rate": 1e-3, "guard_steps": 5,
        },
        "parallel": {"heartbeat_seconds": 0.02, "threads_per_rank": 1},
        "output": {"tensorboard": False},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def begin(folder: Path, config: Path, run: str, ranks: int) -> subprocess.Popen[bytes]:
    """Start the launcher; what it says goes to a file."""
    command = [sys.executable, "-m", "hvd_imaging.cli.main", "launch", "-np", str(ranks), "--max-restarts", "1000", "--",
               "train", str(config), "--run-dir", str(folder / run)]  # fmt: skip
    with open(folder / f"{run}.log", "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def kill_in(phase: str, run: Path, process: subprocess.Popen[bytes], ranks: int, dice: random.Random) -> str | None:
    """Wait for a random later step, then for ``phase``; kill a random rank. None if the run has ended before."""
    before = {beat.pid for beat in read_beats(run)}
    start: int | None = None
    # Two steps at least: a failure that repeats at one step without a checkpoint in between ends the launcher, rightly.
    ahead = dice.randint(2, 7)
    while process.poll() is None:
        beats = [beat for beat in read_beats(run) if alive(beat) and beat.pid not in before and beat.event != "start"]
        if len(beats) == ranks and start is None:
            start = min(beat.step for beat in beats)
        if start is not None and len(beats) == ranks and min(beat.step for beat in beats) >= start + ahead:
            if phase == "saving":
                # Rank 0 alone writes.
                if any((run / checkpoint.FOLDER).glob(".step-*.part*")):
                    return hit(beats[0], phase)
            elif any(beat.event.startswith("valid") for beat in beats) == (phase == "validation"):
                time.sleep(dice.random() * 0.02)
                return hit(dice.choice(beats), phase)
        time.sleep(0.001)
    return None


def hit(beat: Beat, phase: str) -> str:
    """Kill, and wait until the process is gone."""
    os.kill(beat.pid, signal.SIGKILL)
    print(f"  killed rank {beat.rank} in {phase} at step {beat.step}", flush=True)
    while alive(beat):
        time.sleep(0.005)
    return phase


def alive(beat: Beat) -> bool:
    """True while the rank's process runs."""
    try:
        return Path(f"/proc/{beat.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def state_hash(run: Path) -> str:
    """SHA-256 of all arrays of the newest checkpoint, and of the best weights."""
    state, problems = checkpoint.load_newest(run)
    if state is None or problems:
        return f"no state {json.dumps(problems)}"
    best = checkpoint.load(run / "best.npz")
    return checkpoint.digest([*state.weights, *state.optimizer, *best.weights])


if __name__ == "__main__":
    sys.exit(main())
