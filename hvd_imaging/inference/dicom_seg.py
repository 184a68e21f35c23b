"""A label map as DICOM Segmentation (PS3.3 A.51) that refers to the images it was computed from.

A DICOM SEG belongs to its patient: it takes patient and study from its source images, as the standard demands. It is the
one output of the package that carries them, and only because its input did.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from highdicom.content import AlgorithmIdentificationSequence
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from highdicom.uid import UID
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from ..errors import RunError, SourceError
from ..files import atomic_path
from ..inflate import dcmread
from ..sources.dicom import quiet
from ..volume import Volume

MANUFACTURER = "hvd_imaging"
SERIES_DESCRIPTION = "Automatic segmentation"


def check_source(source: Volume, classes: Sequence[str]) -> None:
    """Whether a DICOM SEG of this volume can be written; costs little, so it comes before the work.

    Raises:
        RunError, SourceError: see `write_seg`.
    """
    trial = np.zeros(source.frames.shape if source.frames is not None else source.shape, np.uint8)
    trial[0, 0, 0] = 1
    _segmentation(trial, source, classes, "trial", "0")


def write_seg(
    path: str | Path, labels: np.ndarray, source: Volume, classes: Sequence[str], algorithm: str, version: str
) -> None:
    """Write ``labels`` as a binary DICOM SEG, atomically.

    Args:
        labels: ``(D, H, W)`` uint8 class indices on the grid of ``source.frames``; 0 is the background.
        source: the DICOM series; single images, or one enhanced object.
        classes: names, index 0 is the background; the others become segments (number = index), also those that were
            not found, so that "looked for and absent" can be told from "not looked for".
        algorithm, version: name and version of what made it.

    Raises:
        RunError: the source is no DICOM series, or its frames lie in several objects of many frames.
        SourceError: the source images lack what a DICOM SEG must refer to.
    """
    seg = _segmentation(labels, source, classes, algorithm, version)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with atomic_path(path) as temporary:
            seg.save_as(temporary)


def _segmentation(labels: np.ndarray, source: Volume, classes: Sequence[str], algorithm: str, version: str) -> Segmentation:
    frames = source.frames
    if frames is None:
        raise RunError(
            "a DICOM SEG refers to slices that have a place in the patient, which these images have not; write .nii.gz instead"
        )
    if labels.shape != frames.shape:
        raise ValueError(f"labels are {labels.shape}, the frames {frames.shape}")
    files = tuple(dict.fromkeys(frames.files))
    if 1 < len(files) < len(frames.files):
        raise RunError(
            f"a DICOM SEG refers to single images or to one object of many frames, and these slices lie in {len(files)} objects "
            "of many frames; write .nii.gz instead"
        )
    with quiet():
        images = [dcmread(file, stop_before_pixels=True) for file in files]
    count = int(images[0].get("NumberOfFrames") or 1)
    if len(files) == 1 and count > 1:
        # All frames of the object in their own order; those that are no slice of this volume are empty, and left out.
        every = np.zeros((count, *labels.shape[1:]), np.uint8)
        every[list(frames.numbers)] = labels
        labels = every
    identification = AlgorithmIdentificationSequence(
        name=algorithm, family=codes.DCM.ArtificialIntelligence, version=version, source=MANUFACTURER
    )
    segments = [
        SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=segment_code(name)[0],
            segmented_property_type=segment_code(name)[1],
            algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=identification,
        )
        for number, name in enumerate(classes)
        if number > 0
    ]
    with quiet(), warnings.catch_warnings():
        # highdicom passes on pydicom's remarks about odd values of the source images: not this user's to mend.
        warnings.simplefilter("ignore")
        try:
            return Segmentation(
                source_images=images,
                pixel_array=labels.astype(np.uint8),
                segmentation_type=SegmentationTypeValues.BINARY,
                segment_descriptions=segments,
                series_instance_uid=UID(),
                series_number=_series_number(images[0]),
                sop_instance_uid=UID(),
                instance_number=1,
                manufacturer=MANUFACTURER,
                manufacturer_model_name=algorithm[:64],
                software_versions=version,
                device_serial_number="0",
                content_label="SEGMENTATION",
                content_description=SERIES_DESCRIPTION,
                series_description=SERIES_DESCRIPTION,
                omit_empty_frames=True,
            )
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            # The text may quote values of the images: only its kind is told.
            raise SourceError(
                f"the series lacks what a DICOM SEG must refer to ({type(error).__name__}); write .nii.gz instead"
            ) from error


def _series_number(image: pydicom.Dataset) -> int:
    """Behind the source series in the viewer's list."""
    try:
        return max(1, int(image.get("SeriesNumber") or 0) * 100 + 1) % (2**31)
    except (TypeError, ValueError):
        return 9001


_FINDINGS = {
    "lesion": codes.SCT.Lesion,
    "nodule": codes.SCT.Nodule,
    "tumor": codes.SCT.Neoplasm,
    "tumour": codes.SCT.Neoplasm,
    "mass": codes.SCT.Mass,
    "cyst": codes.SCT.Cyst,
    "edema": codes.SCT.Edema,
}
_ORGANS = {
    "lung": codes.SCT.Lung,
    "liver": codes.SCT.Liver,
    "heart": codes.SCT.Heart,
    "kidney": codes.SCT.Kidney,
    "spleen": codes.SCT.Spleen,
    "brain": codes.SCT.Brain,
}


def segment_code(name: str) -> tuple[Code, Code]:
    """(category, type) that a class name says by a whole word; a finding before its organ ("lung nodule").

    Any other name is a body structure of no further kind: a code must not claim more than the name does. The segment's
    label always holds the name itself.
    """
    words = {word.removesuffix("s") for word in re.split(r"[^a-z]+", name.lower())} | set(name.lower().split())
    for table, category in (
        (_FINDINGS, codes.SCT.MorphologicallyAbnormalStructure),
        (_ORGANS, codes.SCT.AnatomicalStructure),
    ):
        for word, code in table.items():
            if word in words:
                return category, code
    return codes.SCT.AnatomicalStructure, codes.SCT.BodyStructure
