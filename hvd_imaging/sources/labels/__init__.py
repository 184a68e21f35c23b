"""What is known about an image: masks from DICOM SEG, RTSTRUCT, NIfTI and NRRD, one label a case from CSV."""

from __future__ import annotations

from .layers import BACKGROUND, Annotation, Layer, seg_classes
from .rtstruct import read_rtstruct
from .seg import read_seg, read_seg_mask
from .segments import labels_of, read_segments
from .table import LabelTable, read_labels_csv, sort_classes
from .volumes import read_mask

__all__ = [
    "BACKGROUND",
    "Annotation",
    "LabelTable",
    "Layer",
    "labels_of",
    "read_labels_csv",
    "read_mask",
    "read_rtstruct",
    "read_seg",
    "read_seg_mask",
    "read_segments",
    "seg_classes",
    "sort_classes",
]
