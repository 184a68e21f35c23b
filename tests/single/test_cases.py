"""Each input of ``../shared/cases`` that once went wrong gives the right answer. Sorted by the number of the case."""

from __future__ import annotations

import re
import shutil

import pytest

from hvd_imaging.config import IngestConfig
from hvd_imaging.ingest import ingest

pytestmark = pytest.mark.shared


def test_01_each_view_of_a_series_is_a_sample_with_its_label(shared_cases, tmp_path):
    config = IngestConfig.model_validate({"privacy": {"burned_in": "keep"}})  # white noise: one image looks like writing
    result = ingest(shared_cases / "01-parts-lost" / "in", tmp_path / "data", config)
    samples = result.manifest.samples
    assert result.quarantined == [] and len(samples) == 6
    labels: dict[str, list[int]] = {}
    for sample in samples:
        labels.setdefault(sample.patient, []).append(sample.label)
    assert sorted(labels.values()) == [[0, 0], [1, 1], [1, 1]]
    assert sorted(sample.part for sample in samples) == ["image 1"] * 3 + ["image 2"] * 3


def test_31_visits_of_a_patient_stay_together_when_asked_and_are_proposed_when_not(shared_cases, tmp_path):
    source = shared_cases / "31-nifti-several-visits" / "in"
    alone = ingest(source, tmp_path / "alone", IngestConfig())
    (note,) = [note.note for note in alone.notes if "stems" in note.note]
    rule = re.search("--patient '(.*?)'", note)[1]
    assert rule == r"(genius_\d\d)" and "24 cases, but their names group into 8 stems of 3" in note
    manifest = ingest(source, tmp_path / "data", IngestConfig.model_validate({"split": {"patient": rule}})).manifest
    assert len({sample.patient for sample in manifest.samples}) == 8
    assert len({(sample.patient, sample.split) for sample in manifest.samples}) == 8
    # A table says the same.
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    names = sorted(path.name.removesuffix(".nii.gz") for path in (copy / "labelsTr").iterdir())
    (copy / "cases.csv").write_text("case,patient\n" + "".join(f"{name},{name[7:9]}\n" for name in names))
    manifest = ingest(copy, tmp_path / "table", IngestConfig()).manifest
    assert len({(sample.patient, sample.split) for sample in manifest.samples}) == 8
