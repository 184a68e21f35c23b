"""DICOMweb (PS3.18): find series (QIDO-RS), fetch their instances (WADO-RS), store instances (STOW-RS).

Built on `dicomweb_client`, with what a hospital's network asks for around it: credentials stay with one host and do not
travel in the open, nothing waits for ever, what failed for the moment is tried again, and no message carries an identifier
or an address' query. One instance is in memory at a time.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import pydicom

from ..errors import ConfigError, SetupError, SourceError
from ..files import atomic_path
from ..inflate import dcmread
from .dicom import Rejected
from .elements import looks_like_dicom, quiet, walk

T = TypeVar("T")
Query = tuple[tuple[str, str], ...]
Report = Callable[[int, int], None]

ATTEMPTS = 5
WAIT_S = 0.5
"""Pause before the second attempt; doubled each time."""
TIMEOUT_S = (10.0, 120.0)
"""For a connection, and for the next bytes of an answer."""
PAGE = 500
MOST_PAGES = 10_000
"""Of one search; a server that has always more has no end."""
LARGEST_ANSWER = 4 << 30
"""Bytes of an instance."""
LARGEST_PAGE = 32 << 20
"""Bytes of a page of a search, of which an item has some KB."""
PATIENCE_S = 120.0
LEAST_RATE = 10_000.0
"""Bytes/s that come on average after `PATIENCE_S`: a server that sends a byte a minute is never late for the next one."""
GIVE_UP = 3
"""So many instances in a row that the server cannot give are its own trouble, not theirs."""

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_RETRIED = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Access:
    """Who asks. All fields but ``ca_file`` are secret or personal and never shown.

    Attributes:
        user, password: HTTP basic authentication.
        token: sent as ``Authorization: Bearer``.
        ca_file: PEM of the authority that signed the server's certificate, where the system does not know it.
    """

    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    ca_file: str = ""

    @property
    def secret(self) -> bool:
        return bool(self.user or self.token)


def access(user: str | None, password_file: str | None, token_file: str | None, ca_file: str | None) -> Access:
    """Credentials from files: on a command line everybody on the machine could read them.

    Raises:
        ConfigError: they contradict each other.
        SetupError: a file cannot be read, or is empty.
    """
    if bool(user) != bool(password_file):
        raise ConfigError("--user and --password-file: expected both or none of them")
    if user and token_file:
        raise ConfigError("--token-file: expected this or --user with --password-file, found both")
    if ca_file and not Path(ca_file).is_file():
        raise SetupError(f"--ca-file: {ca_file}: expected a PEM file, found nothing")
    password, token = (_secret(name, path) for name, path in (("--password-file", password_file), ("--token-file", token_file)))
    return Access(user or "", password, token, ca_file or "")


def _secret(name: str, path: str | None) -> str:
    if not path:
        return ""
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{name}: {path}: cannot be read ({type(error).__name__})") from None
    if not text or "\n" in text:
        raise SetupError(f"{name}: {path}: expected one line, found {'several' if text else 'nothing'}")
    return text


@dataclass(frozen=True)
class Address:
    """Of a DICOMweb service. ``query`` stands behind ``?`` and chooses series.

    Attributes:
        base: scheme, host, port and path: what messages may show.
    """

    base: str
    loopback: bool
    encrypted: bool
    query: Query = field(default=(), repr=False)


def parse(url: str) -> Address:
    """Pure.

    Raises:
        ConfigError: no http(s) address, or one with credentials in it.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if not host or parts.scheme.lower() not in ("http", "https"):
        raise ConfigError("URL: expected the address of a DICOMweb server, as https://pacs.example/dicom-web")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("URL: holds a name or a password, which others can see: use --user with --password-file, or --token-file")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host.lower() == "localhost"
    shown_host = f"[{host}]" if ":" in host else host
    base = f"{parts.scheme.lower()}://{shown_host}{f':{port}' if port else ''}{parts.path.rstrip('/')}"
    return Address(base, loopback, parts.scheme.lower() == "https", tuple(parse_qsl(parts.query)))


def shown(url: str) -> str:
    """The address without its query, which can name patients."""
    return parse(url).base


def parse_query(pairs: Sequence[str]) -> Query:
    """``("Modality=CT",)`` as pairs of keyword and value. Pure.

    Raises:
        ConfigError: not KEY=VALUE, or no keyword or tag of DICOM. The value is not repeated: it may be a patient's.
    """
    found = []
    for number, pair in enumerate(pairs, 1):
        key, equals, value = pair.partition("=")
        if not equals or not value:
            raise ConfigError(f"--query number {number}: expected KEY=VALUE, as Modality=CT")
        found.append((key.strip(), value.strip()))
    return check_query(found)


def check_query(pairs: Sequence[tuple[str, str]]) -> Query:
    """Raises:
    ConfigError: a key that is no keyword or tag of DICOM, or stands there twice.
    """
    if len({key for key, _ in pairs}) < len(pairs):
        raise ConfigError("query: expected each keyword once, found one twice; ask twice into the same folder")
    for number, (key, _) in enumerate(pairs, 1):
        known = key != "" and pydicom.datadict.tag_for_keyword(key) is not None
        if not known and re.fullmatch(r"[0-9A-Fa-f]{8}", key) is None:
            raise ConfigError(f"query, condition {number}: expected a keyword of DICOM (PatientID, StudyDate, Modality) or a tag of 8 digits")
    return tuple(pairs)


class Server:
    """One DICOMweb service.

    Args:
        pause: waits between attempts; takes seconds.

    Raises:
        ConfigError: credentials would travel unencrypted.
        SetupError: dicomweb-client is missing.
    """

    def __init__(
        self, address: Address, access: Access = Access(), attempts: int = ATTEMPTS, pause: Callable[[float], None] = time.sleep
    ) -> None:
        try:
            from dicomweb_client import DICOMwebClient
        except ImportError as error:
            raise SetupError("DICOMweb needs the package dicomweb-client: pip install hvd_imaging[dicom]") from error
        if access.secret and not address.encrypted and not address.loopback:
            raise ConfigError(
                f"{address.base}: credentials over plain http could be read by everybody on the way: use https, or a tunnel to loopback"
            )
        self.address, self._attempts, self._pause = address, attempts, pause
        self._client = DICOMwebClient(
            address.base, session=_session(address, access), permissive_uid=True, timeout=TIMEOUT_S, chunk_size=1 << 24
        )
        self._client.set_http_retry_params(retry=False)  # ours knows lost connections too

    def series(self, query: Query) -> list[tuple[str, str]]:
        """(study, series) of all series that fit, sorted."""
        return self._search(lambda **page: self._client.search_for_series(search_filters=_filters(query), **page), ("0020000D", "0020000E"))

    def instances(self, study: str, series: str) -> list[str]:
        """SOPInstanceUIDs of a series, sorted."""
        found = self._search(lambda **page: self._client.search_for_instances(study, series, **page), ("00080018",))
        return [name for (name,) in found]

    def _search(self, ask: Callable[..., list[dict[str, Any]]], tags: tuple[str, ...]) -> list[Any]:
        """All pages: until one brings nothing new, as servers have limits of their own, and some know no offset."""
        found: set[tuple[str, ...]] = set()
        offset = 0
        for _ in range(MOST_PAGES):
            page = self._try(lambda offset=offset: ask(limit=PAGE, offset=offset))  # type: ignore[misc]
            names = {tuple(_value(item, tag) for tag in tags) for item in page}
            if names <= found:
                return sorted(found)
            found |= names
            offset += len(page)
        raise SourceError(f"{self.address.base}: the search has no end: {len(found)} found on {MOST_PAGES} pages, and more; ask for less (--query)")

    def fetch(self, study: str, series: str, instance: str, path: Path) -> None:
        """One instance into a file, in the transfer syntax in which the server keeps it.

        Raises:
            SourceError: the server cannot be used any more.
            Refused: this instance cannot be had.
        """

        def get() -> None:
            dataset = self._client.retrieve_instance(study, series, instance, media_types=(("application/dicom", "*"),))
            if str(dataset.get("SOPInstanceUID", "")) != instance:
                raise Refused("the server sent another instance than it was asked for")
            with atomic_path(path) as part:
                pydicom.dcmwrite(part, dataset)

        self._try(get)

    def store(self, path: Path) -> None:
        """One DICOM file to the server.

        Raises:
            SourceError: the server cannot be used any more.
            Refused: it does not take this file.
        """

        def put() -> None:
            with quiet():
                try:
                    dataset = dcmread(path)
                except Exception as error:
                    raise Refused(f"no DICOM file, or a damaged one ({type(error).__name__})") from None
                answer = self._client.store_instances([dataset])
            failed = answer.get("FailedSOPSequence") or []
            if len(failed):
                code = failed[0].get("FailureReason")
                raise Refused(f"the server does not take it (failure reason {f'{int(code):04X}H' if code is not None else 'not told'})")
            if not answer.get("ReferencedSOPSequence"):
                raise Refused("the server did not say that it has stored it")

        self._try(put)

    def _try(self, act: Callable[[], T]) -> T:
        """``act``, again with growing pauses while the trouble may pass.

        Raises:
            SourceError: for the whole server.
            Refused: for this request only.
        """
        import requests

        base, last = self.address.base, ""
        for attempt in range(self._attempts):
            if attempt:
                self._pause(WAIT_S * 2 ** (attempt - 1))
            try:
                with _silent(), quiet():
                    return act()
            except (Refused, SourceError):
                raise
            except requests.exceptions.SSLError:
                raise SourceError(
                    f"{base}: its certificate is not trusted; --ca-file (for ingest: HVD_DICOMWEB_CA_FILE) names the authority "
                    "that signed it, if it is your hospital's own"
                ) from None
            except requests.exceptions.HTTPError as error:
                status = error.response.status_code if error.response is not None else 0
                if status in (401, 403):
                    raise SourceError(
                        f"{base}: access refused ({status}); check --user with --password-file, or --token-file (for ingest: HVD_DICOMWEB_USER, "
                        "_PASSWORD_FILE, _TOKEN_FILE), and what they may do"
                    ) from None
                if status not in _RETRIED:
                    raise Refused(f"the server answers {status}", status) from None
                last = f"it answers {status}"
            except (requests.exceptions.ConnectionError, requests.exceptions.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                last = f"no whole answer ({type(error).__name__})"
            except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL, requests.exceptions.TooManyRedirects) as error:
                raise SourceError(f"{base}: leads to an address that is not followed ({type(error).__name__}); ask for the right one") from None
            except requests.exceptions.RequestException as error:  # an OSError that is none of this machine
                raise Refused(f"no answer that can be used ({type(error).__name__})") from None
            except (OSError, MemoryError):
                raise
            except Exception as error:  # the text may hold identifiers
                raise Refused(f"it cannot be encoded for the way, or understood ({type(error).__name__})") from None
        if last.startswith("it answers"):
            raise Refused(f"{last}, after {self._attempts} attempts", 500)
        raise SourceError(
            f"{base}: {last} after {self._attempts} attempts; what was fetched or stored stays: start the same command again "
            "when the server is back, to go on"
        )


class Refused(Exception):
    """One request failed, the server may be well. The text carries no identifiers."""

    def __init__(self, reason: str, status: int = 0) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Fetched:
    """What `fetch` did.

    Attributes:
        series: that fit the query.
        fetched, there: instances that came, and that stood there before.
        bytes: that came.
        refused: what could not be had: its path below the folder, which holds UIDs, and why.
    """

    series: int
    fetched: int
    there: int
    bytes: int
    refused: tuple[Rejected, ...] = field(default=(), repr=False)


def fetch(
    url: str,
    out: Path,
    query: Query = (),
    access: Access | None = None,
    series_limit: int | None = None,
    report: Report = lambda done, total: None,
    server: Server | None = None,
) -> Fetched:
    """All instances of the series that fit into ``out/<study>/<series>/<instance>.dcm``; those that stand there are not fetched.

    Args:
        url: its own query is joined to ``query``.
        access: None: from the environment (`environment_access`).
        series_limit: only the first so many series, in the order of their UIDs.
        report: told (done, total) instances.

    Raises:
        ConfigError: of the address, the query or the credentials.
        SourceError: no series fits, or the server cannot be used; what was fetched stays.
        SetupError: dicomweb-client is missing.
        OSError: ``out`` cannot be written.
    """
    address = parse(url)
    asked = check_query((*address.query, *query))
    server = server or Server(address, access if access is not None else environment_access())
    with _whole(address, "search"):
        found = server.series(asked)
    if not found:
        raise SourceError(f"{address.base}: no series fits the query; ask for less (--query), or check what these credentials may see")
    for left in out.rglob(".*.part.dcm"):  # of a killed one
        left.unlink()
    refused: list[Rejected] = []
    wanted: list[tuple[str, str, str]] = []
    for study, series in found[:series_limit]:
        if not (_is_uid(study) and _is_uid(series)):
            refused.append(Rejected("a series without valid UIDs", "the server names a series by what are no UIDs"))
            continue
        with _whole(address, "search"):
            wanted += [(study, series, instance) for instance in server.instances(study, series)]
    in_a_row = there = fetched = size = 0
    for number, (study, series, instance) in enumerate(wanted):
        report(number, len(wanted))
        name = f"{study}/{series}/{instance}.dcm"
        if not _is_uid(instance):
            refused.append(Rejected(f"{study}/{series}", "the server names an instance by what is no UID"))
            continue
        if (out / name).is_file():
            there += 1
            continue
        try:
            server.fetch(study, series, instance, out / name)
            in_a_row, fetched, size = 0, fetched + 1, size + (out / name).stat().st_size
        except Refused as error:
            in_a_row += 1
            if in_a_row >= GIVE_UP:
                raise SourceError(
                    f"{address.base}: {GIVE_UP} instances in a row could not be had, the last one because {error}; what was fetched "
                    "stays: start the same command again to go on"
                ) from None
            refused.append(Rejected(name, str(error)))
    report(len(wanted), len(wanted))
    return Fetched(len(found[:series_limit]), fetched, there, size, tuple(refused))


def storable(src: Path) -> tuple[list[Path], int]:
    """The DICOM objects at or below ``src``, and how many other files there are; a DICOMDIR is none of an archive's objects."""
    files = list(walk(src)) if src.is_dir() else [src]
    found = []
    for path in files:
        try:
            with open(path, "rb") as file:
                start = file.read(132)
        except OSError:
            start = b""
        if looks_like_dicom(start) and path.name.upper() != "DICOMDIR":
            found.append(path)
    return found, len(files) - len(found)


def store(server: Server, files: Sequence[Path], report: Report = lambda done, total: None) -> tuple[tuple[Path, str], ...]:
    """Send files one by one; storing an instance that the server has does no harm.

    Returns:
        The files that were not taken, and why.

    Raises:
        SourceError: the server cannot be used, or takes nothing at all.
    """
    refused: list[tuple[Path, str]] = []
    for number, path in enumerate(files):
        report(number, len(files))
        try:
            server.store(path)
        except Refused as error:
            if error.status == 404 and len(refused) == number:
                raise SourceError(f"{server.address.base}: no DICOMweb service at this path that stores (404); check the address") from None
            refused.append((path, str(error)))
    report(len(files), len(files))
    return tuple(refused)


def environment_access() -> Access:
    """Credentials of ``HVD_DICOMWEB_USER``, ``_PASSWORD_FILE``, ``_TOKEN_FILE``, ``_CA_FILE``, where no options can be given."""
    import os

    names = ("USER", "PASSWORD_FILE", "TOKEN_FILE", "CA_FILE")
    return access(*(os.environ.get(f"HVD_DICOMWEB_{name}") for name in names))


@contextlib.contextmanager
def _whole(address: Address, what: str) -> Iterator[None]:
    """A refused search is the end of the command."""
    try:
        yield
    except Refused as error:
        raise SourceError(f"{address.base}: the {what} failed: {error}; check that a DICOMweb service (QIDO-RS) is at this path") from None


def _filters(query: Query) -> dict[str, str]:
    return dict(query)


def _value(item: Any, tag: str) -> str:
    """The text of an element of DICOM JSON (PS3.18 F.2); "" for whatever else a server may send."""
    element = item.get(tag) if isinstance(item, dict) else None
    values = element.get("Value") if isinstance(element, dict) else None
    first = values[0] if isinstance(values, list) and values else ""
    return first if isinstance(first, str) else ""


def _is_uid(text: str) -> bool:
    return len(text) <= 64 and _UID.fullmatch(text) is not None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No logs and warnings of the libraries: they quote UIDs and whole addresses."""
    logs = [logging.getLogger(name) for name in ("dicomweb_client", "dicomweb_client.web", "urllib3", "urllib3.connectionpool", "urllib3.connection")]
    before = [log.disabled for log in logs]
    try:
        for log in logs:
            log.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, was in zip(logs, before, strict=True):
            log.disabled = was


def _session(address: Address, access: Access) -> Any:
    import requests
    from requests.auth import AuthBase, _basic_auth_str

    class Only(AuthBase):
        """These credentials or none: not those that happen to stand in ~/.netrc."""

        def __call__(self, request: Any) -> Any:
            if access.token:
                request.headers["Authorization"] = f"Bearer {access.token}"
            elif access.user:
                request.headers["Authorization"] = _basic_auth_str(access.user.encode(), access.password.encode())
            return request

    class Session(requests.Session):
        def request(self, method: Any, url: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            headers = dict(kwargs.pop("headers", None) or {})
            headers.pop("Host", None)  # the client leaves out the port, and it would go along with a redirect
            if str(method).upper() == "POST":
                kwargs["allow_redirects"] = False  # it would become a GET
            response = super().request(method, url, headers=headers, **kwargs)
            if response.is_redirect:
                raise Refused("the server wants this sent to another address; use that one")
            _check_end(response)
            return response

        def rebuild_auth(self, prepared_request: Any, response: Any) -> None:
            old, new = urlsplit(response.request.url), urlsplit(prepared_request.url)
            if old.scheme == "https" and new.scheme != "https":
                raise SourceError(f"{address.base}: leads from https to plain http; refused, as patients' data would be readable on the way")
            if (old.scheme, old.hostname, old.port) != (new.scheme, new.hostname, new.port):
                prepared_request.headers.pop("Authorization", None)

    class Bounded(requests.adapters.HTTPAdapter):
        """Answers are read whole here, also those of redirects, and no more of them than an answer can have."""

        def send(self, request: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            kwargs["stream"] = True
            most = LARGEST_PAGE if "json" in str(request.headers.get("Accept", "")) else LARGEST_ANSWER
            received = _Received(most)
            request.body = received.counted(request.body)
            found = _in_time(lambda: received.of(super(Bounded, self).send(request, **kwargs)), received, address.base)
            found._content, found._content_consumed = bytes(received.data), True
            return found

    session = Session()
    session.mount("https://", Bounded())
    session.mount("http://", Bounded())
    session.auth = Only()
    if address.loopback:
        session.trust_env = False  # no proxy
    if access.ca_file:
        session.verify = access.ca_file
    return session


class _Received:
    """The body of an answer, as it comes, and how much of the question has gone."""

    def __init__(self, most: int) -> None:
        self.most, self.data, self.sent = most, bytearray(), 0

    def counted(self, body: Any) -> Any:
        """What is sent, which takes its time too."""
        if not hasattr(body, "__next__"):
            self.sent = len(body or b"")
            return body

        def pieces() -> Iterator[bytes]:
            for piece in body:
                self.sent += len(piece)
                yield piece

        return pieces()

    def of(self, response: Any) -> Any:
        import requests
        import urllib3

        with response.raw as raw:
            try:
                if int(response.headers.get("Content-Length") or 0) > self.most:
                    self._refuse()
                while piece := raw.read(1 << 16, decode_content=True):
                    self.data += piece
                    if len(self.data) > self.most:
                        self._refuse()
            except (urllib3.exceptions.HTTPError, ValueError) as error:
                raise requests.exceptions.ChunkedEncodingError(type(error).__name__) from None
        return response

    def _refuse(self) -> None:
        raise Refused(f"the answer is larger than {self.most >> 20} MiB")


def _in_time(act: Callable[[], T], received: _Received, base: str) -> T:
    """``act`` in a thread, which is left behind if hardly anything comes: neither a head nor a name's address has a time limit of its own.

    Raises:
        SourceError: too slow.
    """
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append((act(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True, name="dicomweb")
    begin = time.monotonic()
    thread.start()
    while not outcome:
        thread.join(min(1.0, PATIENCE_S / 4))
        if not outcome and time.monotonic() - begin > PATIENCE_S + (len(received.data) + received.sent) / LEAST_RATE:
            received.most = 0  # what still comes ends the thread
            raise SourceError(
                f"{base}: sends or takes less than {LEAST_RATE / 1000:g} kB/s; what was fetched or stored stays: start the same command again when the "
                "server is well, to go on"
            )
    found, error = outcome[0]
    if error is not None:
        raise error
    return found


def _check_end(response: Any) -> None:
    """The end mark of a multipart answer: without it the last instance would be taken although it was cut off."""
    import requests

    kind, _, rest = response.headers.get("Content-Type", "").partition(";")
    boundary = re.search(r'boundary="?([^";]+)', rest)
    if response.ok and kind.strip().lower() == "multipart/related" and boundary:
        mark = b"--" + boundary[1].strip().encode() + b"--"
        if mark not in response.content[-len(mark) - 64 :]:
            raise requests.exceptions.ChunkedEncodingError("cut off")
