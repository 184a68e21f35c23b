"""Which cases are of one patient: by a rule, a table, or a proposal that does not cry wolf."""

from __future__ import annotations

import json
import re

import pytest

from hvd_imaging.errors import SourceError
from hvd_imaging.sources.patients import of_csv, of_description, propose, shape

GENIUS = [f"genius_{patient:02d}{visit:02d}" for patient in range(8, 16) for visit in range(3)]


@pytest.mark.parametrize(
    ("names", "rule", "groups"),
    [
        (GENIUS, r"(genius_\d\d)", 8),
        ([f"sub-{p:02d}/ses-{v}/anat/sub-{p:02d}_ses-{v}_T1w" for p in (1, 2, 3) for v in (1, 2)], r"(sub-\d\d)", 3),
        ([f"sub-{p:02d}_ses-{v}" for p in (1, 2) for v in (1, 2)], r"(sub-\d\d)", 2),
        ([f"P{p:03d}_visit{v}" for p in range(5) for v in (1, 2)], r"(P\d\d\d)", 5),
        (["P1_baseline", "P1_fu1", "P10_baseline", "P2_baseline", "P2_fu1"], r"(P\d+)", 3),
        ([f"{p:08d}_{v:03d}" for p in (13, 99, 1000, 20555) for v in range(p % 3 + 1)], r"(\d{8})", 4),
        ([f"patient{p:03d}_frame{f:02d}" for p in range(1, 31) for f in (1, p % 9 + 7)], r"(patient\d\d\d)", 30),
        ([f"OAS1_{p:04d}_MR{v}" for p in range(1, 40) for v in (1, 2) if v == 1 or p % 13 == 0], r"(OAS\d_\d{4})", 39),
        ([f"BraTS-GLI-{p:05d}-{v:03d}" for p in range(0, 60, 3) for v in range(1 + (p % 2))], r"(BraTS-GLI-\d{5})", 20),
        ([f"P{p:02d}_20{10 + p}0{p}15" for p in range(1, 6)] + ["P01_20190203"], r"(P\d\d)", 5),
        ([f"knee{p}_{side}" for p in range(1, 5) for side in ("left", "right")], r"(knee\d)", 4),
        ([f"P{p:02d}/{kind}" for p in range(4) for kind in ("t1", "t2", "flair")], r"(P\d\d)", 4),
        (["anna_1", "anna_2", "berta_1", "berta_2", "carl_1", "carl_2"], None, 3),
    ],
)
def test_names_that_share_stems_give_a_rule(names, rule, groups):
    found = propose(reversed(names))
    assert found is not None and len(found.sizes) == groups and sum(found.sizes) == len(names)
    assert rule is None or found.rule == rule
    assert len({re.search(found.rule, name)[1] for name in names}) == groups
    assert found.rule in found.text() and f"{len(names)} cases" in found.text()


def test_a_proposal_names_nobody():
    """Letters that differ from stem to stem may be names of patients: they are not written."""
    found = propose(["anna_1", "anna_2", "berta_1", "berta_2", "carl_1", "carl_2"])
    assert not re.search("anna|berta|carl", found.text())


@pytest.mark.parametrize(
    "names",
    [
        [f"hippocampus_{n:03d}" for n in range(1, 395) if n % 7 not in (2, 5)],
        [f"hippocampus_{n:03d}" for n in (1, 3, 4, 6, 7, 8, 10, 11, 14, 15, 17, 19, 20, 23)],
        [f"BRATS_{n:03d}" for n in range(1, 485)],
        [f"case_{n:05d}" for n in range(300)],
        [f"case_{n:05d}" for n in range(6)],
        [f"img{n:04d}" for n in range(1, 41)],
        [f"volume-{n}" for n in range(131)],
        [f"LIDC-IDRI-{n:04d}" for n in range(1, 100, 3)],
        [f"TCGA-{site:02d}-{n:04d}" for n, site in enumerate([2, 2, 2, 6, 6, 8, 8, 8, 12, 14, 14, 19])],
        [f"IXI{n:03d}-{'Guys' if n % 2 else 'HH'}-{1000 + n}-T1" for n in range(2, 90)],
        [f"{organ}_{n:03d}" for organ in ("liver", "spleen", "colon") for n in range(40)],
        [f"{site}_{n:03d}" for site in ("siteA1", "siteB2") for n in range(1, 60)],
        [f"scan_{n}" for n in range(12)],
        ["a", "b"],
        ["one_image"],
        [],
    ],
)
def test_names_of_different_patients_give_none(names):
    assert propose(names) is None


@pytest.mark.shared
def test_real_names_of_different_patients_give_none(shared_data):
    for folder in ("hippocampus", "lesions"):
        assert propose(path.name.partition(".")[0] for path in (shared_data / folder / "imagesTr").iterdir()) is None


def test_shape_shows_no_name():
    assert shape("Genius_08-x") == "aaaaaa_99-a"


def test_tables():
    assert of_csv("case,patient\na_1,7\na_2,7\n\n") == {"a_1": "7", "a_2": "7"}
    assert of_csv("Patient;age;Case\n7;30;a_1\n") == {"a_1": "7"}
    assert of_csv("id,name\n1,2\n") is None and of_csv("") is None
    for text, expected in (("case,patient\na,1\na,2\n", "row 3: another patient"), ("case,patient\na,\n", "row 2: expected a case")):
        with pytest.raises(SourceError, match=expected):
            of_csv(text)


def test_description():
    assert of_description({"patients": {"a_1": "7", "a_2": 7}}) == {"a_1": "7", "a_2": "7"}
    training = [{"image": "./imagesTr/a_1.nii.gz", "label": "./labelsTr/a_1.nii.gz", "patient": 7}, {"image": "./imagesTr/b.nii.gz"}]
    assert of_description({"training": training}) == {"a_1": "7"}
    assert of_description({"patients": 24, "training": 3}) == {} and of_description([]) == {}
    with pytest.raises(SourceError, match="expected"):
        of_description(json.loads('{"patients": {"a": ["x"]}}'))
