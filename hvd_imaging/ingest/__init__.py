"""From an archive to a dataset; `run` composes scan, prepare and plan."""

from .plan import Note, Quarantined
from .run import QUARANTINE, IngestResult, Progress, ingest

__all__ = ["QUARANTINE", "IngestResult", "Note", "Progress", "Quarantined", "ingest"]
