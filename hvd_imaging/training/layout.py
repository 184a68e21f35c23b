"""The run directory: what a training run leaves. Names only, so that a login node can look without TensorFlow.

::

    run.yaml          resolved configuration          events.jsonl   what happened (training/events.py)
    run.json          dataset hash, versions, world   checkpoints/   newest states (training/checkpoint.py)
    model.json        the model's contract            best.npz       best weights
    manifest.json     copy of the dataset's manifest  tensorboard/   plots/   evaluation-<split>.json
    architecture.json layers, where no builder makes the network (models/architecture.py)
    owner.json        the start that may write (training/owner.py)
    ranks/            of each rank: sign of life, samples of its machine (monitoring/record.py), log (training/events.py)
    mlflow.json       its run on the MLflow server (monitoring/tracking.py)
    slurm/            jobs: scripts and output (cluster/)
"""

from __future__ import annotations

CONFIG, RECORD, BEST = "run.yaml", "run.json", "best.npz"
SCRIPTS = "slurm"
"""Folder of what `hvd-imaging submit` wrote before the run began."""
