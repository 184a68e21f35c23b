"""Distributed training of medical-image CNNs: DICOM in, a trained, evaluated, exported model out."""

__version__ = "0.1.0"
