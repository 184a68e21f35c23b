"""What an archive may be: a folder, a ZIP, a TAR, a DICOMDIR or a DICOMweb server. `opened` makes a folder of each.

Archives come from outside: nothing is written but plain files below the scratch folder, and what would fill the disk is
refused. A second start takes what stands there whole. Names of members can be names of patients: they never enter a message.
"""

from __future__ import annotations

import bz2
import calendar
import contextlib
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast

import pydicom

from ..errors import DatasetError, HvdImagingError, SourceError
from ..files import write_json
from ..inflate import dcmread
from ..texts import read_json
from .dicom import Rejected
from .elements import quiet

Kind = Literal["folder", "zip", "tar", "dicomdir", "web"]
Report = Callable[[int, int], None]
"""Told (done, total): bytes of an archive, instances of a server."""

ACCEPTED = "a folder, a ZIP, a TAR (also .gz, .bz2, .xz), a DICOMDIR file, or the address of a DICOMweb server (https://...)"

MOST_MEMBERS = 5_000_000
FEW_MEMBERS = 20_000
LEAST_MEMBER = 512
"""Bytes that members have on average, of more than `FEW_MEMBERS`: no image is smaller, and an empty file takes as long to make as an image."""
MOST_RATIO = 200
"""Unpacked to packed size. Of CT and MR it is below 10; of a bomb above 1000."""
FREELY = 1 << 30
"""Bytes that an archive may unpack to whatever its ratio is: small archives of empty images exist."""
SPARE = 512 << 20
"""Bytes of the disk that stay free."""
_HEADER = 64 << 20  # more than this is no header of a member
_PIECE = 1 << 20

_DICOMDIR = "1.2.840.10008.1.3.10"


@dataclass(frozen=True)
class Opened:
    """An archive as a folder.

    Attributes:
        folder: to scan; the archive itself if that is a folder.
        refused: members that were not taken, by their names in the archive, and why.
    """

    folder: Path
    refused: tuple[Rejected, ...] = field(default=(), repr=False)


def is_address(src: str | Path) -> bool:
    """True for http:// and https:// addresses."""
    return isinstance(src, str) and re.match(r"https?://", src, re.IGNORECASE) is not None


def kind_of(src: str | Path) -> Kind:
    """What ``src`` is, by its content and not by its name.

    Raises:
        SourceError: none of what is accepted.
    """
    if is_address(src):
        return "web"
    path = Path(src)
    if path.is_dir():
        return "folder"
    if not path.is_file():
        raise SourceError(f"{src}: expected {ACCEPTED}; found nothing here")
    try:
        with open(path, "rb") as file:
            start = file.read(132)
        if start[128:132] == b"DICM":
            if _is_dicomdir(path):
                return "dicomdir"
            raise SourceError(f"{src}: expected {ACCEPTED}; found a single DICOM file: give the folder that it lies in")
        if zipfile.is_zipfile(path):
            return "zip"
        if _is_tar(path):
            return "tar"
    except OSError as error:
        raise SourceError(f"{src}: cannot be read ({error.strerror}); expected {ACCEPTED}") from None
    raise SourceError(f"{src}: expected {ACCEPTED}; found a file that is none of them")


def opened(src: str | Path, scratch: Path, report: Report = lambda done, total: None) -> Opened:
    """The folder to scan for ``src``; archives are unpacked into ``scratch``, which outlives this call.

    Called again with the same archive it unpacks only what does not stand there whole; another archive starts anew.

    Args:
        scratch: a folder of one's own, private and lockable by the caller; made if missing.

    Raises:
        SourceError: not an archive, encrypted, damaged as a whole, or it would unpack to far more than it should.
        DatasetError: the disk is too small, or cannot be written.
    """
    kind = kind_of(src)
    if kind == "folder":
        return Opened(Path(src))
    try:
        store = _Store(scratch, _identity(src, kind))
        known = store.finished() if kind != "dicomdir" else None  # the files of that are not ours
        if known is not None:
            return known
        if kind == "web":
            from . import dicomweb

            return store.finish(dicomweb.fetch(str(src), store.folder, report=report).refused)
        act = {"zip": _unzip, "tar": _untar, "dicomdir": _dicomdir}[kind]
        act(Path(src), store, report)
        return store.finish()
    except OSError as error:
        raise DatasetError(f"{scratch}: {src} cannot be unpacked here ({error.strerror}); check space and permissions") from None


def shown(src: str | Path) -> str:
    """How messages name ``src``: of an address the host and the path, as a query can name patients."""
    if not is_address(src):
        return str(src)
    from . import dicomweb

    return dicomweb.shown(str(src))


def worth_keeping(scratch: Path) -> bool:
    """True if ``scratch`` holds what took long to come (from a server), so that the next start should find it."""
    state = _read(scratch / "state.json")
    return state.get("kind") == "web" and any((scratch / "files").glob("*"))


def member_place(name: str) -> PurePosixPath | None:
    """Where a member belongs, relative to the folder; None if it would leave the folder or cannot be a file. Pure."""
    name = name.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or "\0" in name or ".." in parts or not parts:
        return None
    if any(len(os.fsencode(part)) > 255 for part in parts) or len(parts) > 100:
        return None
    return PurePosixPath(*parts)


class _Store:
    """Plain files below ``scratch/files``, each written whole; ``scratch/state.json`` says of which archive."""

    def __init__(self, scratch: Path, identity: dict[str, Any]) -> None:
        self.scratch, self.folder, self._identity = scratch, scratch / "files", identity
        self.refused: list[Rejected] = []
        self._files: set[PurePosixPath] = set()
        self._folders: set[PurePosixPath] = set()
        if _read(scratch / "state.json").get("archive") != identity["archive"]:
            shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True, exist_ok=True)
        scratch.chmod(0o700)  # raw data of patients
        self.folder.mkdir(exist_ok=True)
        if not (scratch / "state.json").exists():
            write_json(scratch / "state.json", identity)

    def finished(self) -> Opened | None:
        """What an earlier start has finished."""
        state = _read(self.scratch / "state.json")
        if not state.get("whole"):
            return None
        return self._opened(tuple(Rejected(*item) for item in state["refused"]))

    def finish(self, refused: tuple[Rejected, ...] = ()) -> Opened:
        found = (*self.refused, *refused)
        state = {**self._identity, "whole": True, "refused": [[item.path, item.reason] for item in found]}
        write_json(self.scratch / "state.json", state)
        return self._opened(found)

    def _opened(self, refused: tuple[Rejected, ...]) -> Opened:
        """Archives often hold one folder that holds all: then that one is what was packed."""
        folder = self.folder
        while self._identity["kind"] in ("zip", "tar"):
            inner = [entry for entry in os.scandir(folder) if entry.name != "__MACOSX"]
            if len(inner) != 1 or not inner[0].is_dir(follow_symlinks=False):
                break
            folder = Path(inner[0].path)
        above = folder.relative_to(self.folder).as_posix() + "/"
        return Opened(folder, tuple(Rejected(item.path.removeprefix(above), item.reason) for item in refused))

    def refuse(self, name: str, reason: str) -> None:
        self.refused.append(Rejected(name.encode("utf-8", "backslashreplace").decode().replace("\0", "?"), reason))

    def claim(self, name: str) -> Path | None:
        """Where to write this member; None if it was refused."""
        place = member_place(name)
        if place is None:
            self.refuse(name, "a member of the archive whose name leads out of it, or is no file name")
            return None
        above = set(place.parents) - {PurePosixPath(".")}
        if place in self._files:
            self.refuse(name, "a second member of the same name in the archive; the first one was taken")
            return None
        if place in self._folders or above & self._files:
            self.refuse(name, "a member of the archive that is a file and a folder at once; the first one was taken")
            return None
        self._files.add(place)
        self._folders |= above
        return self.folder / place

    def write(self, path: Path, size: int, mtime_ns: int, pieces: Iterator[bytes]) -> None:
        """One file, whole or not at all; more than ``size`` bytes are an error."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part, written = self.scratch / "part", 0
        try:
            with open(part, "wb") as file:
                for piece in pieces:
                    written += len(piece)
                    if written > size:
                        break
                    file.write(piece)
            if written != size:
                raise _Damaged
            os.utime(part, ns=(mtime_ns, mtime_ns))
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


class _Damaged(Exception):
    """A member is not what the archive's directory says."""


def _unzip(path: Path, store: _Store, report: Report) -> None:
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # of many classes, for a damaged directory
        raise SourceError(f"{path}: damaged or not a whole ZIP ({type(error).__name__}); copy it again") from None
    with archive:
        members = [member for member in archive.infolist() if not member.filename.endswith("/")]
        if any(member.flag_bits & 1 for member in members):
            raise SourceError(f"{path}: holds encrypted members; unpack it with its password into a folder and give that")
        total, packed = sum(member.file_size for member in members), path.stat().st_size
        _check_members(path, len(members), total)
        _check_size(path, total, packed)
        _check_space(path, store, total - _size_below(store.folder))
        done = 0
        for member in members:
            report(done, total)
            done += member.file_size
            kind = stat.S_IFMT(member.external_attr >> 16) if member.create_system == 3 else 0
            if kind not in (0, stat.S_IFREG):
                store.refuse(member.filename, "a link or a device in the archive, not a file")
                continue
            target = store.claim(member.filename)
            if target is None:
                continue
            mtime = _zip_time(member.date_time)
            if _stands(target, member.file_size, mtime) and _crc(target) == member.CRC:
                continue
            try:
                store.write(target, member.file_size, mtime, _pieces(archive, member))
            except _Damaged:
                store.refuse(member.filename, f"damaged in the archive, or packed in a way that cannot be read here (ZIP method {member.compress_type})")


def _pieces(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    """The content. Whatever goes wrong is the member's fault: errors of writing come from elsewhere."""
    try:
        with archive.open(member) as file:
            while piece := file.read(_PIECE):
                yield piece
    except Exception:
        raise _Damaged from None


def _untar(path: Path, store: _Store, report: Report) -> None:
    packed, members, total = path.stat().st_size, 0, 0
    with open(path, "rb") as raw, contextlib.closing(_Limited(path, raw)) as source:
        try:
            with tarfile.open(fileobj=cast(IO[bytes], source), mode="r|", bufsize=_Limited.BLOCK) as archive:
                source.allow(_HEADER)
                for member in archive:
                    members += 1
                    total += member.size
                    _check_members(path, members, total)
                    report(raw.tell(), packed)
                    # A member that is not read is passed over by the next step.
                    source.allow(_HEADER + member.size)
                    _take(archive, member, path, store)
                    archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all it has seen
                end = source.at(archive.offset)
        except (HvdImagingError, OSError):
            raise
        except Exception as error:  # of many classes, for a damaged header or stream
            raise SourceError(f"{path}: damaged or cut off ({type(error).__name__}); copy it again") from None
        # tarfile takes a damaged header for the end.
        if len(end) < 512 or any(end):
            raise SourceError(f"{path}: damaged or cut off: no end mark after {members} members; copy it again")


def _take(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path, store: _Store) -> None:
    if member.isdir():
        return
    if not member.isreg() or member.issparse():
        store.refuse(member.name, "a link, a device or a sparse file in the archive, not a plain file")
        return
    target = store.claim(member.name)
    if target is None:
        return
    mtime = int(max(member.mtime, 0) * 1_000_000_000)
    if _stands(target, member.size, mtime):
        return
    _check_space(path, store, member.size)
    file = archive.extractfile(member)
    assert file is not None
    with file:
        store.write(target, member.size, mtime, iter(lambda: file.read(_PIECE), b""))


class _Limited:
    """Reads a TAR through its compression, and not more of it than what was allowed: a header has no gigabytes."""

    BLOCK = 64 * 512

    def __init__(self, path: Path, raw: IO[bytes]) -> None:
        self._path, self._raw = path, raw
        start = raw.read(6)
        raw.seek(0)
        self._file: IO[bytes]
        if start[:2] == b"\x1f\x8b":
            self._file = gzip.GzipFile(fileobj=raw)  # type: ignore[assignment]
        elif start[:3] == b"BZh":
            self._file = bz2.BZ2File(raw)
        elif start == b"\xfd7zXZ\0":
            self._file = lzma.LZMAFile(raw)  # noqa: SIM115
        else:
            self._file = raw
        self.count, self._most = 0, _HEADER
        self._tail: list[bytes] = []

    def allow(self, more: int) -> None:
        """What may be read from here until the next call."""
        self._most = self.count + more

    def read(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise SourceError(f"{self._path}: damaged or cut off ({type(error).__name__}); copy it again") from None
        self.count += len(data)
        self._tail = [*self._tail[-1:], data]
        if self.count > self._most + 4 * self.BLOCK:
            raise SourceError(f"{self._path}: a header of a member is larger than {_HEADER >> 20} MiB: this is no archive of images")
        _check_size(self._path, self.count, self._raw.tell())
        return data

    def at(self, offset: int) -> bytes:
        """The 512 bytes at ``offset``, which lies in what was read last."""
        data = b"".join(self._tail)
        start = offset - (self.count - len(data))
        return data[start : start + 512] if start >= 0 else b""

    def close(self) -> None:
        self._file.close()


def _dicomdir(path: Path, store: _Store, report: Report) -> None:
    """Links to the files that a DICOMDIR names (PS3.3 Annex F, PS3.10 8), each at its place below the folder of it."""
    try:
        with quiet():
            records = dcmread(path).get("DirectoryRecordSequence") or []
            named = [_file_id(record) for record in records if record.get("RecordInUseFlag", 0xFFFF) != 0]
    except Exception as error:  # the text may hold identifiers
        raise SourceError(f"{path}: the DICOMDIR cannot be read ({type(error).__name__}); give its folder instead") from None
    root = path.parent.resolve()
    wanted = list(dict.fromkeys(parts for parts in named if parts))
    if not wanted:
        raise SourceError(f"{path}: the DICOMDIR names no files; give its folder instead")
    listings: dict[Path, dict[str, str]] = {}
    for number, parts in enumerate(wanted):
        report(number, len(wanted))
        name = "/".join(parts)
        place = member_place(name)
        if place is None or any("/" in part for part in parts):
            store.refuse(name, "the DICOMDIR names a file outside of its folder; not read")
            continue
        found = _find(root, parts, listings)
        if found is None:
            store.refuse(name, "named by the DICOMDIR, but missing")
            continue
        if not found.resolve().is_relative_to(root):
            store.refuse(name, "a link that leads out of the folder of the DICOMDIR; not read")
            continue
        target = store.claim(name)
        if target is None:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            target.symlink_to(found.resolve())


def _file_id(record: Any) -> tuple[str, ...]:
    """Referenced File ID (0004,1500): the components of a path."""
    value = record.get("ReferencedFileID")
    if value is None or value == "":
        return ()
    return (value,) if isinstance(value, str) else tuple(str(part) for part in value)


def _find(root: Path, parts: tuple[str, ...], listings: dict[Path, dict[str, str]]) -> Path | None:
    """The file of these names; media are mounted with small letters, version numbers (``;1``) or a dot at the end."""
    place = root
    for part in parts:
        if place not in listings:
            try:
                names = os.listdir(place)
            except OSError:
                return None
            # The exact name wins over one that is alike.
            listings[place] = {**{_plain(name): name for name in sorted(names)}, **{name: name for name in names}}
        name = listings[place].get(part) or listings[place].get(_plain(part))
        if name is None:
            return None
        place = place / name
    return place if place.is_file() else None


def _plain(name: str) -> str:
    return name.lower().partition(";")[0].rstrip(". ")


def _is_tar(path: Path) -> bool:
    """By its first 512 bytes: tarfile's own test reads the whole first header, however large that says it is."""
    with open(path, "rb") as raw, contextlib.closing(_Limited(path, raw)) as source:
        try:
            tarfile.TarInfo.frombuf(source.read(512), "utf-8", "surrogateescape")
        except tarfile.TarError:
            return False
    return True


def _is_dicomdir(path: Path) -> bool:
    try:
        with quiet():
            return str(pydicom.filereader.read_file_meta_info(path).get("MediaStorageSOPClassUID", "")) == _DICOMDIR
    except Exception:
        return False


def _identity(src: str | Path, kind: Kind) -> dict[str, Any]:
    """Which archive this is, without saying it: its place, size and time, hashed."""
    if kind == "web":
        parts: list[Any] = [str(src)]
    else:
        status = os.stat(src)
        parts = [os.path.abspath(src), status.st_size, status.st_mtime_ns]
    return {"kind": kind, "archive": hashlib.sha256(json.dumps([kind, *parts]).encode()).hexdigest()}


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _check_members(path: Path, members: int, unpacked: int) -> None:
    if members > MOST_MEMBERS:
        raise SourceError(f"{path}: more than {MOST_MEMBERS} members; unpack it yourself into a folder if that is right")
    if members > FEW_MEMBERS and unpacked < LEAST_MEMBER * members:
        raise SourceError(
            f"{path}: {members} members of {unpacked // members} bytes on average: this is no archive of images; unpack it yourself into a folder "
            "if that is right"
        )


def _check_size(path: Path, unpacked: int, packed: int) -> None:
    if unpacked > FREELY and unpacked > MOST_RATIO * packed:
        raise SourceError(
            f"{path}: would unpack to more than {MOST_RATIO} times its packed size: medical images do not compress "
            "like this; unpack it yourself into a folder if that is right"
        )


def _check_space(path: Path, store: _Store, more: int) -> None:
    free = shutil.disk_usage(store.scratch).free
    if more + SPARE > free:
        raise DatasetError(
            f"{store.scratch.parent}: {path} needs {more / 1e6:.0f} MB here to be unpacked, found {free / 1e6:.0f} MB free: "
            "make space, or make the dataset on another disk"
        )


def _size_below(folder: Path) -> int:
    return sum(os.path.getsize(os.path.join(place, name)) for place, _, names in os.walk(folder) for name in names)


def _stands(path: Path, size: int, mtime_ns: int) -> bool:
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size and status.st_mtime_ns == mtime_ns


def _crc(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            value = zlib.crc32(piece, value)
    return value


def _zip_time(date_time: tuple[int, int, int, int, int, int]) -> int:
    """Taken as UTC: a ZIP has no zone, and the same archive must give the same times everywhere."""
    try:
        return max(calendar.timegm((*date_time, 0, 0, 0)), 0) * 1_000_000_000
    except (ValueError, OverflowError):
        return 0
