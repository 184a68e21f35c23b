"""A folder of DICOM files -> a folder of de-identified ones, whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydicom.dataset import Dataset

from ..errors import DatasetError, SourceError
from ..files import atomic_folder, write_json
from ..inflate import dcmread
from . import pixels
from .deface import deface_series
from .deidentify import DIRECTORY, deidentify, patient_of
from .profile import RETAINABLE, Options, table
from .pseudonym import load_or_make_key, pseudonym
from .redact import Redactor

REPORT = "quarantine.json"
Progress = Callable[[Sequence[Path], str], Iterable[Path]]


@dataclass(frozen=True)
class SetAside:
    """A file that has no copy: its reference (the private list says which it is), and why."""

    file: str
    reason: str


@dataclass
class Outcome:
    """What was done; counts and references only.

    Attributes:
        written: files.
        blanked: of these, with writing blanked.
        defaced: of these, of a volume whose face was cut off.
        not_dicom: files without a copy because they are not DICOM images (or a DICOMDIR).
    """

    written: int = 0
    blanked: int = 0
    defaced: int = 0
    patients: int = 0
    not_dicom: int = 0
    set_aside: list[SetAside] = field(default_factory=list)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """No warnings and no log of pydicom: they quote values."""
    log = logging.getLogger("pydicom")
    before = log.disabled
    log.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


def run(
    src: str | Path,
    out: str | Path,
    options: Options,
    key_file: str | Path | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """De-identify all DICOM objects below ``src`` into the new folder ``out``.

    Files are ``<patient>/<study>/<series>/<instance>.dcm``, all names pseudonyms; `REPORT` lists by reference what was
    set aside. Beside the key, ``<out's name>.files.json`` (mode 600) says which file a reference stands for.

    Args:
        key_file: default ``<out>.key`` beside ``out``, made if it is missing.

    Raises:
        SourceError: no folder, or nothing in it can be used.
        DatasetError: ``out`` exists, lies in ``src`` or cannot be written.
        SetupError: the key or the table cannot be used.
    """
    src, out = Path(src), Path(out)
    table()
    key_path = _check(src, out, key_file)
    key = load_or_make_key(key_path)
    redactor = Redactor(key, src)
    outcome = Outcome()
    paths = [path for path in _walk(src) if path.resolve() != key_path.resolve()]
    show = progress or (lambda items, _: items)
    copies: dict[Path, tuple[Path, str]] = {}
    try:
        with silent(), atomic_folder(out) as building:
            for path in show(paths, "de-identifying"):
                try:
                    if not _is_dicom(path):
                        outcome.not_dicom += 1
                        continue
                    ds = _read(path)
                    if str(getattr(ds, "file_meta", {}).get("MediaStorageSOPClassUID", "")) == DIRECTORY:
                        outcome.not_dicom += 1
                        continue
                    target, done = _copy(ds, building, key, options)
                    copies[target] = path, done
                except SourceError as error:
                    outcome.set_aside.append(SetAside(redactor.reference(path), redactor.text(str(error), [path])))
            if options.deface:
                _deface(copies, outcome, redactor)
            outcome.written = len(copies)
            outcome.blanked = sum(done == "blanked" for _, done in copies.values())
            outcome.patients = len({target.relative_to(building).parts[0] for target in copies})
            redactor.save(key_path.with_name(f"{out.name}.files.json"))
            if not outcome.written:
                raise SourceError(_nothing(outcome))
            write_json(
                building / REPORT,
                {
                    "profile": "PS3.15 Annex E, basic profile",
                    "retained": [name for name in RETAINABLE if name in options.retain],
                    "burned_in": options.burned_in,
                    "faces": "cut off" if options.deface else "not looked for",
                    "quarantined": [asdict(item) for item in outcome.set_aside],
                },
            )
    except OSError as error:
        raise DatasetError(f"OUT cannot be written ({error.strerror}); check space and permissions") from None
    return outcome


def _nothing(outcome: Outcome) -> str:
    first = f"; {outcome.set_aside[0].file}: {outcome.set_aside[0].reason}" if outcome.set_aside else ""
    return (
        f"SRC: none of {len(outcome.set_aside)} DICOM objects can be used, {outcome.not_dicom} other files{first}; nothing was written"
    )


def _check(src: Path, out: Path, key_file: str | Path | None) -> Path:
    if not src.is_dir():
        raise SourceError("SRC: expected a folder with DICOM files, found none of this name")
    if not out.name:
        raise DatasetError("OUT: expected the name of a new folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError("OUT exists and is not an empty folder; give another name")
    source, target = src.resolve(), out.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise DatasetError("OUT and SRC lie in one another; give a folder elsewhere")
    key_path = Path(key_file) if key_file else out.with_name(out.name + ".key")
    if target in key_path.resolve().parents:
        raise DatasetError("the key file would lie in OUT, beside what it protects; give a place elsewhere with --key-file")
    return key_path


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder) / name
            if path.is_file():
                yield path


def _is_dicom(path: Path) -> bool:
    """By content: the prefix, or a data set that begins as one does without."""
    try:
        with open(path, "rb") as file:
            start = file.read(132)
    except OSError as error:
        raise SourceError(f"cannot be opened ({error.strerror})") from None
    if start[128:132] == b"DICM":
        return True
    return len(start) > 16 and start[:2] in (b"\x02\0", b"\x08\0") and start[3] == 0 and start[2] <= 0x70


def _read(path: Path) -> Dataset:
    try:
        return dcmread(path, force=True)
    except SourceError:
        raise
    except Exception as error:  # pydicom raises many kinds on damaged files; their text may quote values
        raise SourceError(f"damaged or truncated DICOM ({type(error).__name__})") from None


def _deface(copies: dict[Path, tuple[Path, str]], outcome: Outcome, redactor: Redactor) -> None:
    """Cut off faces, series by series; what cannot be looked at is taken out of the copies."""
    series: dict[Path, list[Path]] = {}
    for target in copies:
        series.setdefault(target.parent, []).append(target)
    for folder, files in series.items():
        try:
            outcome.defaced += len(deface_series(files))
        except OSError:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, SourceError) else f"--deface: cannot be searched ({type(error).__name__})"
            for target in files:
                outcome.set_aside.append(SetAside(redactor.reference(copies.pop(target)[0]), reason))
                target.unlink()
            for parent in (folder, folder.parent, folder.parent.parent):
                if not any(parent.iterdir()):
                    parent.rmdir()


def _copy(ds: Dataset, building: Path, key: bytes, options: Options) -> tuple[Path, str]:
    """Where the clean object was written, and what was done to its pixels."""
    try:
        clean = deidentify(ds, key, options)
        done = pixels.clean(clean, options, str(ds.get("BurnedInAnnotation", "") or ""))
        names = (
            pseudonym(key, "patient", patient_of(ds)),
            pseudonym(key, "study", str(ds.StudyInstanceUID)),
            pseudonym(key, "series", str(ds.SeriesInstanceUID)),
            pseudonym(key, "instance", str(ds.SOPInstanceUID)) + ".dcm",
        )
        target = building.joinpath(*names)
        if target.exists():
            raise SourceError("another file holds the same instance")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            clean.save_as(target, enforce_file_format=True)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    except (SourceError, OSError):
        raise
    except Exception as error:
        raise SourceError(f"cannot be de-identified ({type(error).__name__})") from None
    return target, done
