"""Every volume of a series becomes a sample, with its labels; who is one patient; and what is left out is counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner
from test_dicom_kinds import flat
from test_sources_catalog import write_seg
from test_sources_dicom import make_slice, write
from test_sources_parts import WAYS, diffusion

from hvd_imaging.cli.console import kinds_of
from hvd_imaging.cli.main import cli
from hvd_imaging.config import IngestConfig, SplitConfig
from hvd_imaging.errors import SourceError
from hvd_imaging.inference.predict import input_kind, read_only_series
from hvd_imaging.ingest import ingest
from hvd_imaging.privacy.pseudonym import load_or_make_key, pseudonym
from hvd_imaging.shards import manifest as manifests
from hvd_imaging.shards.reader import ShardReader
from hvd_imaging.sources import catalog, people
from hvd_imaging.sources.dicom import SegFile
from hvd_imaging.sources.drawn import Drawn
from hvd_imaging.sources.headers import Header
from hvd_imaging.sources.labels.references import match

PLAIN = {"preprocess": {"intensity": "none", "units": "stored"}, "privacy": {"burned_in": "keep"}}


def settings(**split) -> IngestConfig:
    return IngestConfig.model_validate({**PLAIN, "split": split})


def mr(index, series="1.2.5", patient="P1", count=3, **extra):
    extra = {"Modality": "MR", "PatientID": patient} | extra
    return [make_slice(2 * k, np.full((4, 6), 10 * index + k, np.int16), series=series, **extra) for k in range(count)]


def us(index, series="1.2.6", number=1):
    cine = flat("US", "1.2.840.10008.5.1.4.1.1.3.1")
    cine.SeriesInstanceUID, cine.InstanceNumber, cine.NumberOfFrames = series, str(number), "3"
    cine.PixelData = (np.arange(3, dtype="<i2") + 10 * index).repeat(24).tobytes()
    return [cine]


def firsts(dataset: Path) -> dict[str, int]:
    """First voxel of each sample by its part, to see that each holds its own volume."""
    manifest = manifests.load(dataset)
    with ShardReader(dataset, manifest) as reader:
        return {sample.part: int(reader.read_whole(sample)[0][0, 0, 0, 0]) for sample in manifest.samples}


@pytest.mark.parametrize(
    ("slices", "expected"),
    [
        (lambda: mr(1, EchoTime="5") + mr(2, EchoTime="9"), {"echo 1": 10, "echo 2": 20}),
        (lambda: mr(1, TemporalPositionIdentifier="1") + mr(2, TemporalPositionIdentifier="2"), {"time 1": 10, "time 2": 20}),
        (lambda: diffusion(1, 0.0) + [s for i, way in enumerate(WAYS) for s in diffusion(i + 2, 1000.0, way)],
         {"b=0": 1, "b=1000, direction 3": 2, "b=1000, direction 2": 3, "b=1000, direction 1": 4}),
        (lambda: us(1, number=1) + us(2, number=2), {"image 1": 10, "image 2": 20}),
        (lambda: [flat("DX", pixels=np.full((4, 6), n, np.int16), InstanceNumber=str(n)) for n in (1, 2, 3)],
         {"image 1": 1, "image 2": 2, "image 3": 3}),
        (lambda: mr(1), {"": 10}),
    ],
    ids=["echoes", "times", "directions", "cines", "views", "one"],
)  # fmt: skip
def test_all_volumes_of_a_series_are_samples_of_one_patient(tmp_path, slices, expected):
    write(tmp_path / "in", slices())
    result = ingest(tmp_path / "in", tmp_path / "data", settings())
    assert result.quarantined == []
    samples = result.manifest.samples
    assert firsts(tmp_path / "data") == expected
    assert len({s.id for s in samples}) == len(samples) and len({s.patient for s in samples}) == len({s.split for s in samples}) == 1
    told = [note.note for note in result.notes if "several volumes" in note.note]
    assert len(told) == (len(expected) > 1) and all(f"{len(expected)} in all" in note for note in told)


def test_a_series_of_one_volume_keeps_its_pseudonym_and_a_manifest_its_hash(tmp_path):
    write(tmp_path / "in", mr(1, "1.2.5") + mr(2, "1.2.7", EchoTime="5") + mr(3, "1.2.7", EchoTime="7"))
    manifest = ingest(tmp_path / "in", tmp_path / "data", settings()).manifest
    key = load_or_make_key(tmp_path / "data.key")
    by_part = {sample.part: sample.id for sample in manifest.samples}
    assert by_part == {
        "": pseudonym(key, "series", "1.2.5"),
        "echo 1": pseudonym(key, "series", "1.2.7#echo 1"),
        "echo 2": pseudonym(key, "series", "1.2.7#echo 2"),
    }
    plain = json.loads((tmp_path / "data" / "manifest.json").read_text())
    for sample in plain["samples"]:
        del sample["part"]
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(plain))
    assert manifests.load(tmp_path / "data").hash() == manifest.hash()
    again = ingest(tmp_path / "in", tmp_path / "next", settings(), parent=tmp_path / "data").manifest
    assert again.version.counts == {"added": 0, "kept": 3, "changed": 0, "removed": 0}


def test_info_shows_the_parts(tmp_path):
    write(tmp_path / "in", mr(1, EchoTime="5") + mr(2, EchoTime="9"))
    ingest(tmp_path / "in", tmp_path / "data", settings())
    run = CliRunner().invoke(cli, ["dataset", "info", str(tmp_path / "data")])
    assert "echo 1 (1), echo 2 (1)" in run.output


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("PatientID,label\nP1,a\nP2,b\n", {("1.2.5", "echo 1"): "a", ("1.2.5", "echo 2"): "a", ("1.2.7", ""): "b"}),
        ("SeriesInstanceUID,label\n1.2.5,a\n1.2.7,b\n", {("1.2.5", "echo 1"): "a", ("1.2.5", "echo 2"): "a", ("1.2.7", ""): "b"}),
        ("SeriesInstanceUID,label\n1.2.5#echo 2,c\n1.2.5,a\n1.2.7,b\n",
         {("1.2.5", "echo 1"): "a", ("1.2.5", "echo 2"): "c", ("1.2.7", ""): "b"}),
        ("SeriesInstanceUID,label\n1.2.5#echo 2,c\n1.2.7,b\n", {("1.2.5", "echo 2"): "c", ("1.2.7", ""): "b"}),
    ],
)  # fmt: skip
def test_labels_are_of_all_volumes_of_a_series_or_of_one(tmp_path, text, labels):
    write(tmp_path / "in", mr(1, EchoTime="5") + mr(2, EchoTime="9") + mr(3, "1.2.7", "P2"))
    (tmp_path / "in" / "labels.csv").write_text(text)
    found = catalog.scan(tmp_path / "in")
    assert {(case.image.uid, case.part): found.classes[case.label] for case in found.cases} == labels
    assert len(found.rejected) == 3 - len(labels)


def test_a_label_of_a_volume_that_is_not_there_is_refused(tmp_path):
    write(tmp_path / "in", mr(1, EchoTime="5") + mr(2, EchoTime="9"))
    (tmp_path / "in" / "labels.csv").write_text("SeriesInstanceUID,label\n1.2.5#echo 3,c\n1.2.5,b\n")
    with pytest.raises(SourceError, match="row 2: label for an unknown series"):
        catalog.scan(tmp_path / "in")


def test_a_mask_is_of_the_volumes_whose_images_it_names(tmp_path):
    one, two = mr(1, EchoTime="5", count=4), mr(2, EchoTime="9", count=4)
    write(tmp_path / "in", one + two)
    mask = np.zeros((4, 4, 6))
    mask[1] = 1
    write_seg(tmp_path / "in" / "seg.dcm", two, {"a": mask})
    found = catalog.scan(tmp_path / "in")
    assert [case.part for case in found.cases] == ["echo 2"]
    assert "of its other volumes (this is echo 1)" in found.rejected[0].reason
    # Named by the series only: of both.
    import pydicom

    seg = pydicom.dcmread(tmp_path / "in" / "seg.dcm")
    del seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    seg.pop("SourceImageSequence", None)
    for group in (*seg.SharedFunctionalGroupsSequence, *seg.PerFrameFunctionalGroupsSequence):
        group.pop("DerivationImageSequence", None)
    seg.save_as(tmp_path / "in" / "seg.dcm")
    found = catalog.scan(tmp_path / "in")
    assert [case.part for case in found.cases] == ["echo 1", "echo 2"]
    for case in found.cases:
        assert catalog.load_case(case, found)[1][1].all()


def test_a_mask_of_a_series_of_views_must_name_its_image(tmp_path):
    views = [flat("DX", pixels=np.full((4, 6), n, np.int16), InstanceNumber=str(n), FrameOfReferenceUID="1.2.9") for n in (1, 2)]
    series = catalog.scan(write(tmp_path / "in", views)).cases
    images = [case.image for case in series]
    named = SegFile(Path("s"), ("1.2.3.4",), ("a",), drawn=Drawn(listed=frozenset({str(views[1].SOPInstanceUID)})))
    loose = SegFile(Path("s"), ("1.2.3.4",), ("a",))
    assert match([named], images).masks == {images[1].source_id: (named,)}
    (lost,) = match([loose], images).rejected
    assert "2 images without a place, and it does not say which one" in lost.reason


def test_predict_names_the_volumes_and_takes_one(tmp_path):
    folder = write(tmp_path / "in", mr(1, EchoTime="5") + mr(2, EchoTime="9"))
    with pytest.raises(SourceError, match=r"series of 2: echo 1, echo 2; say which one as '.*in#echo 1'"):
        read_only_series(folder)
    assert read_only_series(folder, "echo 2", "stored").array[0, 0, 0] == 20
    with pytest.raises(SourceError, match="no volume 'echo 3' in this series, expected one of: echo 1, echo 2"):
        read_only_series(folder, "echo 3")
    assert input_kind(Path(f"{folder}#echo 2")) == "dicom"
    with pytest.raises(SourceError, match="no such file"):
        input_kind(tmp_path / "out#echo 2")
    write(folder / "b", mr(3, "1.2.8"))
    with pytest.raises(SourceError, match=r"expected one DICOM series, found 3: \. \(echo 1, MR, 3 files\)"):
        read_only_series(folder)


# Patients


def nifti(folder: Path, names, **description) -> Path:
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        image = np.arange(60, dtype=np.int16).reshape(5, 4, 3) + index
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / "imagesTr" / f"{name}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image((image > 30).astype(np.uint8), np.eye(4)), folder / "labelsTr" / f"{name}.nii.gz")
    (folder / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz", **description})
    )
    return folder


VISITS = [f"g_{patient:02d}{visit:02d}" for patient in range(3, 6) for visit in range(2)]


def grouped(manifest) -> set[int]:
    """How many samples the patients have."""
    counts: dict[str, int] = {}
    for sample in manifest.samples:
        counts[sample.patient] = counts.get(sample.patient, 0) + 1
    return set(counts.values())


def test_visits_of_a_patient_stay_together_by_rule_and_are_proposed_without(tmp_path):
    source = nifti(tmp_path / "in", VISITS)
    alone = ingest(source, tmp_path / "a", settings())
    assert grouped(alone.manifest) == {1}
    (note,) = [note.note for note in alone.notes if "--patient" in note.note]
    assert r"6 cases, but their names group into 3 stems of 2" in note and r"--patient '(g_\d\d)'" in note
    run = CliRunner().invoke(cli, ["ingest", str(source), str(tmp_path / "b"), "--patient", r"(g_\d\d)", "--key-file", str(tmp_path / "a.key"), "--json"])
    told, _ = json.JSONDecoder().raw_decode(run.output)
    assert told["patients"] == 3 and not any("--patient" in note["note"] for note in told["notes"])
    manifest = manifests.load(tmp_path / "b")
    assert grouped(manifest) == {2} and len({s.split for s in manifest.samples}) == 3
    assert manifest.split.patient == manifest.version.parameters["config"]["split"]["patient"] == r"(g_\d\d)"
    # What a next version inherits, and what it makes of a parent that divided the patients.
    nifti(source, [*VISITS, "g_0600"])
    kept = ingest(source, tmp_path / "c", IngestConfig(), parent=tmp_path / "b", key_file=tmp_path / "a.key").manifest
    assert kept.version.counts == {"added": 1, "kept": 6, "changed": 0, "removed": 0} and grouped(kept) == {1, 2}
    result = ingest(source, tmp_path / "d", IngestConfig(split=SplitConfig(patient=r"(g_\d\d)")), parent=tmp_path / "a", key_file=tmp_path / "a.key")
    assert grouped(result.manifest) == {1, 2}
    before = {sample.id: sample.split for sample in alone.manifest.samples}
    where: dict[str, set[str]] = {}
    for sample in result.manifest.samples:
        where.setdefault(sample.patient, set()).add(sample.split)
        if before.get(sample.id) == "test":
            assert sample.split == "test"
    assert all(len(splits) == 1 for splits in where.values())
    assert any("in several splits of the parent" in note.note for note in result.notes)


@pytest.mark.parametrize("kind", ["csv", "description", "training"])
def test_a_table_tells_the_patients(tmp_path, kind):
    table = {name: f"p{name[2:4]}" for name in VISITS[:-1]}
    more = {}
    if kind == "description":
        more = {"patients": table}
    if kind == "training":
        more = {"training": [{"image": f"./imagesTr/{name}.nii.gz", "patient": who} for name, who in table.items()]}
    source = nifti(tmp_path / "in", VISITS, **more)
    if kind == "csv":
        (source / "cases.csv").write_text("case;patient\n" + "".join(f"{name};{who}\n" for name, who in table.items()))
    result = ingest(source, tmp_path / "data", settings())
    assert len({s.patient for s in result.manifest.samples}) == 4 and grouped(result.manifest) == {1, 2}
    assert any("1 of 6 cases fit neither" in note.note for note in result.notes)


@pytest.mark.parametrize(
    ("rule", "table", "expected"),
    [
        (r"sub-\d+", None, r"fits none of 6 case names, which look like 'a_9999'"),
        (None, "case,patient\nother,1\n", r"none of 1 patients is of a case of this archive; expected case names such as 'a_9999'"),
        (None, "case,patient\ng_0300,1\ng_0300,2\n", "cases.csv: row 3: another patient"),
    ],
)
def test_rules_and_tables_that_fit_nothing_are_refused_without_names(tmp_path, rule, table, expected):
    source = nifti(tmp_path / "in", VISITS)
    if table:
        (source / "cases.csv").write_text(table)
    with pytest.raises(SourceError, match=expected) as caught:
        ingest(source, tmp_path / "data", settings(patient=rule))
    assert "g_03" not in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_a_rule_counts_for_patient_ids_but_labels_name_them_whole(tmp_path):
    write(tmp_path / "in", mr(1, "1.2.5", "T1-a") + mr(2, "1.2.6", "T1-b") + mr(3, "1.2.7", "T2-a") + mr(4, "1.2.8", ""))
    (tmp_path / "in" / "labels.csv").write_text("PatientID,label\nT1-a,0\nT1-b,1\nT2-a,1\n")
    result = ingest(tmp_path / "in", tmp_path / "data", settings(patient=r"^(T\d)"))
    assert len({s.patient for s in result.manifest.samples}) == 2
    assert sorted(s.label for s in result.manifest.samples) == [0, 1, 1]


# PatientIDs of several people


def header(name="", birth="", issuer="", patient="7"):
    return Header(Path("f"), Path(), "image", patient=patient, issuer=issuer, person_name=name, birth_date=birth)


@pytest.mark.parametrize(
    ("files", "differ"),
    [
        ([("DOE^JOHN", "", ""), ("Doe^John^^^", "", "")], ""),
        ([("DOE^JOHN", "", ""), ("Doe^J", "", ""), ("John Doe", "", ""), ("DOE^JOHN^MARIA^^", "", "")], ""),
        ([("Müller^Hans", "", ""), ("Mueller^Hans", "", ""), ("MULLER^HANS", "", ""), ("M\xc3\xbcller^Hans", "", "")], ""),
        ([("Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B", "", ""), ("Yamada^Tarou", "", "")], ""),
        ([("", "", ""), ("DOE^JOHN", "19500101", "A")], ""),
        ([("DOE^JOHN", "", ""), ("SMITH^JANE", "", "")], "names"),
        ([("SMITHSON^JOHN", "", ""), ("SMITHSON^JANE", "", "")], "names"),
        ([("DOE^JOHN", "19500101", ""), ("DOE^JOHN", "19510101", "")], "birth dates"),
        ([("", "", "A"), ("", "", "B")], "issuers"),
        ([("", "", "Clinic A"), ("", "", " clinic  a")], ""),
        ([("DOE^JOHN", "19500101", "A"), ("Doe^John", "19500101", "B")], ""),
        ([("DOE^JOHN", "", "A"), ("Doe^John", "", "B")], ""),
        ([("DOE^JOHN", "19500101", "A"), ("SMITH^JANE", "19600101", "B")], "names birth dates issuers"),
    ],
)
def test_patient_ids_of_several_people_are_told(files, differ):
    found = people.judge(header(*each) for each in files)
    assert bool(found.notes) == bool(differ)
    for what in ("names", "birth dates", "issuers"):
        assert (f"{what} differ" in " ".join(found.notes)) == (what in differ)
    assert bool(found.issuers) == ("issuers" in differ)


def test_other_issuers_are_other_patients_and_all_is_told_without_identifiers(tmp_path):
    slices = mr(1, "1.2.5", "77", IssuerOfPatientID="NORTH", PatientName="Roe^Ann", PatientBirthDate="19500101")
    slices += mr(2, "1.2.6", "77", IssuerOfPatientID="SOUTH", PatientName="Poe^Bob", PatientBirthDate="19600101")
    slices += mr(3, "1.2.7", "88", PatientName="Moe^Tim") + mr(4, "1.2.8", "88", PatientName="Lou^Kim")
    slices += mr(5, "1.2.9", "99", IssuerOfPatientID="NORTH")
    write(tmp_path / "in", slices)
    (tmp_path / "in" / "labels.csv").write_text("PatientID,label\n77,0\n88,1\n99,1\n")
    result = ingest(tmp_path / "in", tmp_path / "data", settings())
    key = load_or_make_key(tmp_path / "data.key")
    patients = {sample.patient for sample in result.manifest.samples}
    assert len(result.manifest.samples) == 5 and len(patients) == 4
    assert {pseudonym(key, "patient", "88"), pseudonym(key, "patient", "99")} < patients
    notes = " ".join(note.note for note in result.notes)
    assert "2 PatientIDs stand for several people (names differ in 2, birth dates differ in 1, issuers differ in 1)" in notes
    written = b"".join(path.read_bytes() for path in (tmp_path / "data").iterdir())
    for secret in (b"NORTH", b"Roe", b"1950", b"Poe"):
        assert secret not in written


# What is left out is counted


def test_left_out_volumes_of_a_layout_are_named(tmp_path):
    source = nifti(tmp_path / "in", ["a1", "b2", "c3"])
    (source / "imagesTs").mkdir()
    (source / "imagesVal").mkdir()
    for name in ("imagesTs/d4_0000", "imagesTs/e5_0000", "imagesVal/f6_0000", "labelsTr/g7"):
        shutil.copyfile(source / "imagesTr" / "a1_0000.nii.gz", source / f"{name}.nii.gz")
    result = ingest(source, tmp_path / "data", settings())
    assert len(result.manifest.samples) == 3
    assert sorted(item.reason for item in result.quarantined) == [
        "mask without an image of this name in imagesTr",
        "outside of the folders of dataset.json; ingest it apart",
    ]
    assert [note.note for note in result.notes if "left out" in note.note] == [
        "of imagesTs, whose labels are held back: left out (--task unlabelled takes it)"
    ] * 2
    assert len(ingest(source, tmp_path / "all", settings(), task="unlabelled").manifest.samples) == 5


def test_labels_that_the_task_does_not_use_are_told(tmp_path):
    slices = mr(1, count=4)
    write(tmp_path / "in", slices + mr(2, "1.2.7", "P2"))
    write_seg(tmp_path / "in" / "seg.dcm", slices, {"a": np.ones((4, 4, 6))})
    (tmp_path / "in" / "labels.csv").write_text("PatientID,label\nP1,0\nP2,1\n")
    assert "labels.csv is not used" in " ".join(catalog.scan(tmp_path / "in").notes)
    assert "1 masks are not used: the task is classification" in " ".join(catalog.scan(tmp_path / "in", task="classification").notes)


def test_equal_reasons_make_one_line_with_a_count():
    rows = [(f"file-{n:010x}", f"slices 1 and {n} of file-{n:010x} overlap by 0.{n} mm") for n in range(1000)]
    kinds = kinds_of([("x", "another reason"), *rows])
    assert [(text, len(paths)) for text, paths in kinds] == [(rows[0][1], 1000), ("another reason", 1)]
