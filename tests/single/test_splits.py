"""Splits: by patient, site and date, stratified, in folds, with a test split that stays."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from datasets import make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli_dataset import run

from hvd_imaging import errors
from hvd_imaging.cli.dataset import command as dataset_command
from hvd_imaging.config import IngestConfig, SplitConfig, check
from hvd_imaging.shards import manifest as manifests
from hvd_imaging.shards.split import Patient, assign, patients_of, read_frozen, resplit

SITES = st.frozensets(st.sampled_from(["", "north", "south", "east", "west"]), max_size=2).map(lambda s: s - {""})
PEOPLE = st.lists(
    st.tuples(st.frozensets(st.integers(0, 3), max_size=3), SITES, st.sampled_from(["", "20200101", "20210615", "20220301"])),
    max_size=40,
).map(lambda rows: [Patient(f"{index:04x}", *row) for index, row in enumerate(rows)])
SHARES = st.tuples(st.floats(0, 0.5), st.floats(0, 0.5), st.integers(0, 99))


def config_of(shares, **other):
    return SplitConfig(val=shares[0], test=shares[1], seed=shares[2], **other)


def wanted(share, count):
    return max(round(share * count), 1 if share > 0 and count >= 3 else 0)


@settings(max_examples=150, deadline=None)
@given(PEOPLE, SHARES, st.booleans(), st.randoms())
def test_shares_hold_and_order_does_not_matter(people, shares, stratify, order):
    config = config_of(shares, stratify=stratify)
    result = assign(people, config)
    assert result.keys() == {p.id for p in people}
    counts, test = Counter(result.values()), wanted(config.test, len(people))
    assert counts["test"] == test and counts["val"] == min(wanted(config.val, len(people)), len(people) - test)
    order.shuffle(people)
    assert assign(people, config) == result


@settings(max_examples=100, deadline=None)
@given(PEOPLE, SHARES, st.integers(0, 99))
def test_every_stratum_gives_its_part(people, shares, seed):
    config = config_of(shares, stratify=True)
    result = assign(people, config)
    count = Counter(index for p in people for index in p.classes)
    strata = {}
    for p in people:
        strata.setdefault(min(p.classes, key=lambda i: (count[i], i), default=-1), []).append(result[p.id])
    tests = sum(split == "test" for split in result.values())
    for members in strata.values():
        assert abs(members.count("test") - tests * len(members) / len(people)) < 1


def test_a_rare_class_is_in_each_split():
    people = [Patient(f"{i:04x}", frozenset({1, 2} if i % 10 == 0 else {1})) for i in range(100)]
    for seed in range(5):
        result = assign(people, SplitConfig(val=0.2, test=0.2, seed=seed, stratify=True))
        assert Counter(result[p.id] for p in people if 2 in p.classes) == {"train": 6, "val": 2, "test": 2}


@settings(max_examples=150, deadline=None)
@given(PEOPLE, SHARES)
def test_sites_stay_whole(people, shares):
    result = assign(people, config_of(shares, by="site"))
    split_of = {}
    for p in people:
        for site in p.sites:
            assert split_of.setdefault(site, result[p.id]) == result[p.id]
    if people:
        assert "train" in result.values() or shares[0] + shares[1] > 0.9


def test_shares_of_sites_are_as_good_as_they_can_be():
    people = [Patient(f"{i:04x}", sites=frozenset({f"s{i % 20}"})) for i in range(200)]
    for seed in range(5):
        counts = Counter(assign(people, SplitConfig(val=0.2, test=0.2, seed=seed, by="site")).values())
        assert counts == {"train": 120, "val": 40, "test": 40}


@settings(max_examples=80, deadline=None)
@given(PEOPLE.filter(lambda people: any(p.last for p in people)), SHARES)
def test_by_date_the_newest_are_tested(people, shares):
    result = assign(people, config_of(shares, by="date"))
    last = {name: [p.last for p in people if result[p.id] == name] for name in ("train", "val", "test")}
    for old, new in (("train", "val"), ("val", "test"), ("train", "test")):
        if last[old] and last[new]:
            assert max(last[old]) <= min(last[new])


def test_by_date_needs_dates():
    with pytest.raises(errors.ConfigError, match="shifted by patient"):
        assign([Patient("a")], SplitConfig(by="date"))


@settings(max_examples=80, deadline=None)
@given(PEOPLE, st.integers(2, 6), st.booleans(), st.integers(0, 9), st.sampled_from(["patient", "site"]))
def test_folds_are_a_partition(people, folds, stratify, seed, by):
    stratify = stratify and by == "patient"
    results = [
        assign(people, SplitConfig(test=0.2, seed=seed, folds=folds, fold=fold, stratify=stratify, by=by)) for fold in range(folds)
    ]
    test = {id for id, split in results[0].items() if split == "test"}
    for result in results:
        assert {id for id, split in result.items() if split == "test"} == test
    times = Counter(id for result in results for id, split in result.items() if split == "val")
    assert times == dict.fromkeys((p.id for p in people if p.id not in test), 1)
    if by == "patient":
        sizes = [sum(split == "val" for split in result.values()) for result in results]
        assert max(sizes) - min(sizes) <= 1


@settings(max_examples=150, deadline=None)
@given(PEOPLE, st.integers(0, 40), SHARES, st.sampled_from(["patient", "site"]), st.sampled_from([0, 3]))
def test_a_next_version_moves_nobody(people, known, shares, by, folds):
    config = config_of(shares, by=by, folds=folds)
    before = assign(people[:known], config)
    test = {id for id, split in before.items() if split == "test"}
    after = assign(people, config, test, before)
    assert {id: after[id] for id in before} == before
    tested = {id for id, split in after.items() if split == "test"}
    if by == "patient":
        assert tested == test, "new patients are never test"
    else:  # but of a test site, which stays whole
        sites = {site for p in people if p.id in tested for site in p.sites}
        assert all(after[p.id] == "test" for p in people if p.id not in before and p.sites & sites)
    # Another rule for training and validation leaves the test patients too.
    other = assign(people, config_of((0.3, 0.3, 5)), test)
    if test:
        assert {id for id, split in other.items() if split == "test"} == test


def test_new_patients_of_a_known_site_follow_it():
    people = [Patient(f"{i:04x}", sites=frozenset({f"s{i % 4}"})) for i in range(40)]
    config = SplitConfig(val=0.25, test=0, by="site")
    before = assign(people[:20], config)
    after = assign(people, config, (), before)
    for i in range(40):
        assert after[f"{i:04x}"] == before[f"{i % 4:04x}"]


@settings(max_examples=50, deadline=None)
@given(PEOPLE, SHARES, st.sets(st.integers(0, 50)))
def test_frozen_patients_and_nobody_else_are_test(people, shares, numbers):
    frozen = {f"{number:04x}" for number in numbers}
    result = assign(people, config_of(shares), frozen)
    sites = {site for p in people if p.id in frozen for site in p.sites}
    assert all(result[p.id] == "test" for p in people if p.id in frozen)
    by_site = assign(people, config_of(shares, by="site"), frozen)
    assert all(by_site[p.id] == "test" for p in people if p.sites & sites or p.id in frozen)
    there = frozen & result.keys()
    if there:
        assert {id for id, split in result.items() if split == "test"} == there


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"folds": 1}, "two folds"),
        ({"folds": 3, "fold": 3}, "below their number"),
        ({"fold": 1}, "without folds"),
        ({"stratify": True, "by": "site"}, "by=patient"),
        ({"folds": 3, "by": "date"}, "no order in time"),
        ({"by": "scanner"}, "patient"),
    ],
)
def test_impossible_rules_are_refused(values, words):
    with pytest.raises(errors.ConfigError, match=words):
        check(IngestConfig, {"split": values}, "test")


def test_a_list_of_test_patients(tmp_path):
    path = tmp_path / "frozen"
    path.write_text("0a1b  # the first\n\n# none\nff\n")
    assert read_frozen(path) == {"0a1b", "ff"}
    path.write_text("0a1b\nDoe^Jane\n")
    with pytest.raises(errors.ConfigError, match="line 2") as caught:
        read_frozen(path)
    assert "Doe" not in str(caught.value)
    with pytest.raises(errors.ConfigError, match="cannot be read"):
        read_frozen(tmp_path / "nowhere")


def test_what_a_split_sees_of_samples(tmp_path):
    manifest = make_dataset(tmp_path / "data", samples=4)
    samples = [s.model_copy(update={"patient": "p", "site": f"s{i % 2}"}) for i, s in enumerate(manifest.samples)]
    (patient,) = patients_of(samples, {"p": "20200101"})
    assert patient == Patient("p", frozenset({1}), frozenset({"s0", "s1"}), "20200101")


def test_split_command(tmp_path):
    make_dataset(tmp_path / "data", "classification", samples=20, shape=(1, 8, 8))
    old = manifests.load(tmp_path / "data")
    test = {s.patient for s in old.of_split("test")}
    seen = []
    for fold in range(4):
        out = tmp_path / f"fold{fold}"
        result = run(dataset_command, "split", tmp_path / "data", "--out", out, "--folds", 4, "--fold", fold, "--stratify")
        assert result.exit_code == 0, result.output
        new = manifests.load(out)
        assert {s.patient for s in new.of_split("test")} == test, "the test patients stay"
        seen += [s.patient for s in new.of_split("val")]
        assert {sum(s.label == label for s in new.of_split("val")) for label in (0, 1)} <= {1, 2, 3}
    assert sorted(seen) == sorted(s.patient for s in old.samples if s.patient not in test)
    frozen = tmp_path / "test.txt"
    chosen = sorted({s.patient for s in old.samples} - test)[:3]
    frozen.write_text("\n".join(chosen))
    frozen.with_name("strange").write_text("abcdef")
    result = run(dataset_command, "split", tmp_path / "fold0", "--out", tmp_path / "other", "--frozen", frozen.with_name("strange"))
    assert isinstance(result.exception, errors.ConfigError) and "another key" in str(result.exception)
    assert run(dataset_command, "split", tmp_path / "fold0", "--out", tmp_path / "other", "--frozen", frozen, "--folds", 0).exit_code == 0
    other = manifests.load(tmp_path / "other")
    assert {s.patient for s in other.of_split("test")} == set(chosen)
    assert other.split.folds == 0 and other.split.frozen is None and str(tmp_path) not in json.dumps(other.model_dump(mode="json"))
    result = run(dataset_command, "split", tmp_path / "data", "--out", tmp_path / "sites", "--by", "site")
    assert isinstance(result.exception, errors.ConfigError) and "--test" in str(result.exception)
    assert run(dataset_command, "split", tmp_path / "data", "--out", tmp_path / "sites", "--by", "site", "--test", 0.2).exit_code == 0
    result = run(dataset_command, "split", tmp_path / "data", "--out", tmp_path / "fold0")
    assert isinstance(result.exception, errors.DatasetError) and "choose another DATASET" in str(result.exception)


def test_resplit_with_another_seed_is_another_split(tmp_path):
    manifest = make_dataset(tmp_path / "data", samples=30, shape=(2, 4, 4))
    results = {json.dumps([s.split for s in resplit(manifest, SplitConfig(seed=seed)).samples]) for seed in range(4)}
    assert len(results) == 4


def test_dates_for_the_order_come_from_the_source_and_are_not_stored():
    from types import SimpleNamespace as Any

    from hvd_imaging.ingest.plan import Staged, _last_dates

    cases = [Any(image=Any(study_date=date)) for date in ("20200101", "20220301 ", "", "2021", "20210615")] + [Any(image=Any())]
    sample = lambda patient: Any(patient=patient)  # noqa: E731
    staged = [Staged(i, "", "", sample=sample(p)) for i, p in enumerate("aabbcc")] + [Staged(0, "", "", reason="bad")]
    assert _last_dates(staged, Any(cases=cases)) == {"a": "20220301", "c": "20210615"}
