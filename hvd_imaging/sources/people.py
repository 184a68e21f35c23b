"""Whether a PatientID stands for one person. Pure; what it looks at is raw: for memory only, never written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from .headers import Header

_LIKE = 0.75
"""Words so alike are spellings of one name."""


@dataclass(frozen=True)
class Judged:
    """What an archive's PatientIDs are.

    Attributes:
        issuers: (PatientID, issuer) -> the issuer under which that person counts, for those whose issuers tell people apart.
        notes: on the archive as a whole.
        examples: path of one file of each PatientID that stands for several people, and in what they differ.
    """

    issuers: dict[tuple[str, str], str] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    examples: tuple[tuple[str, str], ...] = ()


@dataclass
class _Told:
    """What the files of one PatientID and one issuer say."""

    names: set[str] = field(default_factory=set)
    births: set[str] = field(default_factory=set)


def judge(headers: Iterable[Header]) -> Judged:
    """Look for PatientIDs whose files differ in PatientName, PatientBirthDate or IssuerOfPatientID.

    A PatientID is unique for its issuer only (PS3.3 C.7.1.1), so other issuers are other patients, unless name or birth date
    say that it is one person. Other differences are told and part nobody: one person in two splits is a leak, two persons
    under one pseudonym are none.
    """
    told: dict[str, dict[str, _Told]] = {}
    first: dict[str, str] = {}
    for header in headers:
        if header.patient:
            found = told.setdefault(header.patient, {}).setdefault(plain_issuer(header.issuer), _Told())
            found.names |= {header.person_name} - {""}
            found.births |= {header.birth_date} - {""}
            first[header.patient] = min(first.get(header.patient, header.name), header.name)
    issuers: dict[tuple[str, str], str] = {}
    counts = dict.fromkeys(("names", "birth dates", "issuers"), 0)
    examples = []
    for patient, by_issuer in sorted(told.items()):
        groups = _persons({issuer: each for issuer, each in by_issuer.items() if issuer})
        apart = len(groups) > 1
        if apart:
            issuers |= {(patient, issuer): group[0] for group in groups for issuer in group}
        differ = [
            what
            for what, found in (
                ("names", not _one_name({name for each in by_issuer.values() for name in each.names})),
                ("birth dates", len({birth for each in by_issuer.values() for birth in each.births}) > 1),
                ("issuers", apart),
            )
            if found
        ]
        for what in differ:
            counts[what] += 1
        if differ:
            examples.append((first[patient], f"its PatientID stands for several people: different {' and '.join(differ)}"))
    if not examples:
        return Judged()
    what = ", ".join(f"{name} differ in {count}" for name, count in counts.items() if count)
    many = len(examples) > 1
    note = (
        f"{len(examples)} PatientID{'s stand' if many else ' stands'} for several people ({what}): those of different issuers count as "
        "patients of their own, all others as one patient; look at them in the archive"
    )
    return Judged(issuers, (note,), tuple(examples))


def plain_issuer(text: str) -> str:
    """As issuers are compared."""
    return " ".join(text.casefold().split())


def _persons(by_issuer: dict[str, _Told]) -> list[list[str]]:
    """Issuers whose files are of one person together."""
    groups: list[list[str]] = []
    for issuer in sorted(by_issuer):
        for group in groups:
            if any(_same_person(by_issuer[issuer], by_issuer[other]) for other in group):
                group.append(issuer)
                break
        else:
            groups.append([issuer])
    return groups


def _same_person(one: _Told, two: _Told) -> bool:
    """Name or birth date say so, and the other one does not deny it."""
    births = bool(one.births & two.births) if one.births and two.births else None
    named = {word for name in one.names for word in _words(name)} and {word for name in two.names for word in _words(name)}
    names = _one_name(one.names | two.names) if named else None
    return (births, names) in ((True, True), (True, None), (None, True))


def _one_name(names: Iterable[str]) -> bool:
    spelled = sorted({words for name in names if (words := _words(name))}, key=lambda words: (-len(words), words))
    return all(_alike(spelled[0], other) for other in spelled[1:])


def _words(name: str) -> tuple[str, ...]:
    """The words of a PatientName's first component group (PS3.5 6.2.1.1), its Latin letters only.

    Other letters are left out: files of one patient may have them in several codings.
    """
    group = name.partition("=")[0]
    if "\x1b" in group:
        return ()
    return tuple(sorted(re.findall(r"[A-Z]+", re.sub(r"[^\x20-\x7e]", "", group).upper())))


def _alike(long: tuple[str, ...], short: tuple[str, ...]) -> bool:
    """Each word of the shorter name has its partner: equal, an initial, or another spelling."""
    left = list(long)
    for word in sorted(short, key=len, reverse=True):
        fit = max(left, key=lambda other: _likeness(word, other), default="")
        if not fit or _likeness(word, fit) < _LIKE:
            return False
        left.remove(fit)
    return True


def _likeness(one: str, two: str) -> float:
    if one.startswith(two) or two.startswith(one):
        return 1.0
    return SequenceMatcher(None, one, two).ratio()
