"""Which names of structures, codes and modalities are kept: terms of medicine, and nobody's name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_labels_seg import archive, block, catalog, codes, described, write_seg  # noqa: F401

from hvd_imaging.config import IngestConfig, LabelsConfig, check
from hvd_imaging.errors import ConfigError, DatasetError, SourceError
from hvd_imaging.inference.predict import to_csv
from hvd_imaging.privacy import vocabulary
from hvd_imaging.privacy.redact import Redactor
from hvd_imaging.sources.labels.table import read_labels_csv
from hvd_imaging.sources.nifti import parse_classes

KEY = b"k" * 32
NAMES = """
spleen kidney_right gallbladder liver stomach pancreas adrenal_gland_right lung_upper_lobe_left esophagus trachea thyroid_gland small_bowel duodenum colon
urinary_bladder prostate kidney_cyst_left sacrum vertebrae_S1 vertebrae_L5 heart aorta pulmonary_vein brachiocephalic_trunk subclavian_artery_right
common_carotid_artery_right atrial_appendage_left superior_vena_cava inferior_vena_cava portal_vein_and_splenic_vein iliac_artery_left iliac_vena_left
humerus_left scapula_left clavicula_left femur_left hip_left spinal_cord gluteus_maximus_left autochthon_left iliopsoas_left brain skull rib_left_1
rib_right_12 sternum costal_cartilages GTV-1 CTV PTV_60 Lesion Nodule Anterior Posterior parotid_left mandible cochlea_right chiasm brainstem
"""  # those of TotalSegmentator, of radiotherapy, of the Medical Segmentation Decathlon


@pytest.mark.parametrize("name", [*NAMES.split(), "white matter", "Ground glass", "Enhancing tumor", "Gray matter", "lower lobe of left lung"])
def test_terms_stay(name):
    assert vocabulary.label(KEY, name) == name


@pytest.mark.parametrize(
    "name",
    ["Jacob Simpson", "Norman", "Lincoln", "Castro", "Moran", "Russo", "Willis", "Paget", "Boyd", "Meyer", "Parkinson", "Fuchs", "Wolf", "Klein",
     "lung 12 34", "lesion 1234", "12 34", "rib 1 2 3 4", "lung\nleft", "lung\rleft", "\x1b[31mlung", "lung\u2028", "lung\tleft", "lung\0", "x" * 65,
     "l u n g", "=lung()&cmd", "<b>lung</b>"],
)  # fmt: skip
def test_what_can_be_somebody_is_a_label(name):
    assert vocabulary.label(KEY, name).startswith("label-")


@given(st.text(max_size=30), st.sets(st.sampled_from(["LUNG", "WHITE", "0042", "77"])))
def test_a_label_is_one_line_and_none_of_the_forbidden(name, forbidden):
    found = vocabulary.label(KEY, name, forbidden)
    assert found.isprintable() and len(found) <= 64 and sum(c.isdigit() for c in found.removeprefix("label-")) <= 8
    assert found.startswith("label-") or not vocabulary.names_somebody(name, forbidden)


@pytest.mark.parametrize(("name", "word"), [("Lung", "LUNG"), ("white_matter", "WHITE"), ("rib 4 2", "0042"), ("lesion 77", "77"), ("left Hand", "HAND")])
def test_the_objects_own_names_are_forbidden(name, word):
    assert vocabulary.label(KEY, name) == name or word.isdigit()
    assert vocabulary.label(KEY, name, {word}).startswith("label-")


def test_modalities_and_codes():
    assert [vocabulary.modality(text) for text in ("CT", " mr ", "", "DOE^JOHN", "CT\x1b[2J", "QBROWN")] == ["CT", "MR", "", "OT", "OT", "OT"]
    assert vocabulary.code("SCT:39607008") == "SCT:39607008"
    assert [vocabulary.code(text) for text in ("SCT:DOE", "DOE:39607008", "99LOCAL:1", "", ":")] == [""] * 5


# Through the catalog: the rule on real objects


def named(slices, name, patient="P1"):
    for ds in slices:
        ds.PatientName, ds.PatientID = name, patient
    return slices


@pytest.mark.parametrize("label", ["Lung", "left lung", "LUNG"])
def test_a_segment_of_the_patients_name_is_no_class(archive, label):  # noqa: F811
    root, slices = archive
    write_seg(root / "seg", named(slices, "Lung^Ann"), {label: block(0), "Liver": block(1)})
    redactor = Redactor(KEY, root)
    found = catalog.choose(catalog.scan(root), LabelsConfig(), redactor.label)
    assert sorted(name.startswith("label-") for name in found.classes[1:]) == [False, True] and "Liver" in found.classes
    assert redactor.known == {next(name for name in found.classes if name.startswith("label-")): label}
    assert "lung" not in repr(found).lower().replace(str(root).lower(), "")
    # Who knows better says so.
    assert catalog.choose(catalog.scan(root), LabelsConfig(names=[label]), redactor.label).classes == ("background", label)


def test_one_patient_of_a_terms_name_among_many_takes_it_from_nobody():
    from pathlib import Path

    from hvd_imaging.sources.catalog import Case, _people
    from hvd_imaging.sources.dicom import SegFile

    def case(number, words):
        return Case(str(number), "", "CT", None, "dicom", None, (SegFile(Path(str(number)), (), ("white matter",), named=frozenset(words)),))

    some = [case(n, {"MILLER", f"P{n}"}) for n in range(19)]
    assert _people([*some[:3], case(99, {"WHITE"})])["white matter"] >= {"WHITE"}
    assert "WHITE" not in _people([*some, case(99, {"WHITE"})])["white matter"]


def test_codes_of_nobodys_list_are_not_told(archive):  # noqa: F811
    import numpy as np

    root, slices = archive
    local = codes.SCT.Lung.__class__("DOEJOHN", "99DOE", "Doe")
    for number, code in enumerate((local, codes.SCT.Lung, codes.SCT.Liver)):
        described(root / f"seg{number}", slices, np.ones((4, 4, 6, 1), np.uint8), ["nodule"], code=code)
    notes = " ".join(catalog.choose(catalog.scan(root), LabelsConfig(), Redactor(KEY, root).label).notes)
    assert "DOE" not in notes and "stands for different things" in notes and "SCT:39607008" in notes


# Other ways in


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "", " ", "x" * 65, "a\u202eb"])
def test_class_names_are_one_line_wherever_they_come_from(name, tmp_path):
    with pytest.raises(SourceError, match=r"dataset\.json: labels: "):
        parse_classes({"0": "background", "1": name}, "dataset.json")
    with pytest.raises(ConfigError):
        check(IngestConfig, {"labels": {"names": [name]}}, "t")
    table = tmp_path / "labels.csv"
    table.write_text(f'PatientID,label\nA,b\nB,"{name}"\n')
    with pytest.raises(SourceError, match=r"labels\.csv: row 3: ") as caught:
        read_labels_csv(table)
    assert "\x1b" not in str(caught.value)


def test_a_manifest_with_such_a_class_is_refused(tmp_path):
    import json

    from hvd_imaging.shards import manifest as manifests

    values = {"schema": 2, "task": "classification", "classes": ["a", "\x1b[2J"], "channels": 1, "preprocess": {"intensity": "none"}, "split": {}, "samples": []}
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DatasetError, match=r"classes\.1: ") as caught:
        manifests.load(tmp_path)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 7, "1" + "0" * 400])
def test_a_label_value_of_many_digits_is_told(number):
    with pytest.raises(SourceError, match="a value below"):
        parse_classes({"0": "background", number: "a"}, "dataset.json")


def test_no_cell_that_is_written_is_a_formula():
    text = to_csv([{"id": "=cmd|' /C calc'!A0", "@x": "-1+1", "b": "+a", "c": -1.5, "d": -3, "e": "plain"}])
    head, row = text.splitlines()
    assert head == "id,'@x,b,c,d,e" and row == "'=cmd|' /C calc'!A0,'-1+1,'+a,-1.5,-3,plain"
