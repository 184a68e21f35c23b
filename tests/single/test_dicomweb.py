"""Habits of DICOMweb servers, good and bad, played on loopback."""

from __future__ import annotations

import contextlib
import json
import shutil
import ssl
import subprocess
import threading
import time
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pydicom
import pytest

from hvd_imaging.errors import ConfigError, SetupError, SourceError
from hvd_imaging.sources import dicomweb
from hvd_imaging.sources.dicomweb import Access, Refused
from hvd_imaging.sources.phantom import make_large_series

pytest.importorskip("dicomweb_client", reason="needs the extra 'dicom'")
SECRET = Access(user="me", password="secret word")


class Fake:
    """A small DICOMweb server that keeps files, and misbehaves as ``habits`` say (tried in order, each may answer)."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], bytes] = {}
        self.habits: list[Callable[[BaseHTTPRequestHandler], bool]] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.page, self.knows_offset, self.received = 500, True, b""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # headers and body in one packet

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                fake.requests.append(("GET", self.path, self.headers["Authorization"]))
                if not any(habit(self) for habit in fake.habits):
                    fake.get(self)

            def do_POST(self) -> None:
                fake.requests.append(("POST", self.path, self.headers["Authorization"]))
                size, fake.received = self.headers["Content-Length"], b""
                if size:
                    fake.received = self.rfile.read(int(size))
                else:
                    while length := int(self.rfile.readline(), 16):
                        fake.received += self.rfile.read(length)
                        self.rfile.readline()
                    self.rfile.readline()
                if not any(habit(self) for habit in fake.habits):
                    answer(self, 200, {"00081199": {"vr": "SQ", "Value": [{}]}})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.port = self.server.server_port
        self.url = f"http://localhost:{self.port}/dicom-web"

    def get(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        names, query = parts.path.split("/")[2:], parse_qs(parts.query)
        if len(names) == 6:
            data = self.objects.get((names[1], names[3], names[5]))
            if data is None:
                answer(request, 404, [])
            else:
                multipart(request, data)
            return
        if names[0] == "series":
            found = sorted({key[:2] for key in self.objects})
        else:
            found = sorted({key for key in self.objects if key[:2] == (names[1], names[3])})
        start = int(query.get("offset", ["0"])[0]) if self.knows_offset else 0
        tags = ("0020000D", "0020000E", "00080018")
        rows = [{tag: {"vr": "UI", "Value": [name]} for tag, name in zip(tags, key, strict=False)} for key in found]
        answer(request, 200, rows[start : start + self.page])

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def answer(request: BaseHTTPRequestHandler, status: int, value: object, **headers: str) -> bool:
    body = json.dumps(value).encode()
    request.send_response(status)
    for name, text in {"Content-Type": "application/dicom+json", "Content-Length": str(len(body)), **headers}.items():
        request.send_header(name, text)
    request.end_headers()
    request.wfile.write(body)
    return True


def multipart(request: BaseHTTPRequestHandler, data: bytes, end: bytes = b"\r\n--mark--\r\n", claimed: int = 0) -> bool:
    body = b"--mark\r\nContent-Type: application/dicom\r\n\r\n" + data + end
    request.send_response(200)
    request.send_header("Content-Type", 'multipart/related; type="application/dicom"; boundary=mark')
    request.send_header("Content-Length", str(claimed or len(body)))
    request.end_headers()
    request.wfile.write(body)
    if claimed:
        request.close_connection = True
    return True


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("files")
    for index in range(2):
        make_large_series(root, index, (5, 16, 16))
    return sorted(root.rglob("*.dcm"))


@pytest.fixture
def fake(files):
    fake = Fake()
    for path in files:
        dataset = pydicom.dcmread(path)
        fake.objects[str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID), str(dataset.SOPInstanceUID)] = path.read_bytes()
    yield fake
    fake.close()


def server_of(fake: Fake, access: Access = SECRET, attempts: int = 3) -> dicomweb.Server:
    return dicomweb.Server(dicomweb.parse(fake.url), access, attempts, pause=lambda seconds: None)


def fetch(fake: Fake, out: Path, **options) -> dicomweb.Fetched:
    return dicomweb.fetch(fake.url, out, server=server_of(fake), **options)


def times(count: int, act: Callable[[BaseHTTPRequestHandler], bool]) -> Callable[[BaseHTTPRequestHandler], bool]:
    """A habit that is shown ``count`` times."""
    left = [count]

    def habit(request: BaseHTTPRequestHandler) -> bool:
        left[0] -= 1
        return left[0] >= 0 and act(request)

    return habit


def of_instances(act: Callable[[BaseHTTPRequestHandler], bool]) -> Callable[[BaseHTTPRequestHandler], bool]:
    return lambda request: request.path.count("/") >= 7 and act(request)


def test_fetched_byte_for_byte_and_once(fake, files, tmp_path, caplog, recwarn):
    found = fetch(fake, tmp_path)
    assert {path.read_bytes() for path in tmp_path.rglob("*.dcm")} == {path.read_bytes() for path in files}
    assert (found.series, found.fetched, found.there) == (2, 10, 0) and found.bytes == sum(len(data) for data in fake.objects.values())
    next(tmp_path.rglob("*.dcm")).unlink()
    left = next(tmp_path.rglob("*.dcm"))
    left.with_name(f".{left.name}.abc.part.dcm").write_bytes(b"of a killed one")
    again = fetch(fake, tmp_path)
    assert (again.fetched, again.there) == (1, 9) and not list(tmp_path.rglob(".*.part.dcm"))
    assert not caplog.records and not recwarn.list


@pytest.mark.parametrize("knows_offset", [True, False])
def test_pages_of_any_length_end(fake, tmp_path, knows_offset):
    fake.page, fake.knows_offset = 3, knows_offset
    found = fetch(fake, tmp_path)
    assert found.fetched == (10 if knows_offset else 6)


def test_trouble_that_passes(fake, tmp_path):
    fake.habits = [
        times(2, lambda request: answer(request, 503, {})),
        of_instances(times(1, lambda request: multipart(request, b"DICM cut", end=b""))),
        of_instances(times(1, lambda request: multipart(request, b"DICM cut", claimed=5000))),
    ]
    assert fetch(fake, tmp_path).fetched == 10


def test_trouble_that_stays(fake, tmp_path):
    fake.habits = [lambda request: answer(request, 503, {})]
    with pytest.raises(SourceError, match="the search failed: it answers 503, after 3 attempts"):
        fetch(fake, tmp_path)
    assert len(fake.requests) == 3
    fake.habits = [of_instances(lambda request: multipart(request, b"cut", end=b""))]
    with pytest.raises(SourceError, match="after 3 attempts; what was fetched"):
        fetch(fake, tmp_path)
    assert not list(tmp_path.rglob("*.dcm"))


def test_single_instances_are_set_aside_a_row_of_them_ends_it(fake, tmp_path):
    keys = sorted(fake.objects)
    wrong, swapped = fake.objects[keys[2]], fake.objects[keys[4]]
    fake.objects[keys[2]] = wrong[:130]  # no DICOM any more
    fake.objects[keys[4]] = fake.objects[keys[5]]
    found = fetch(fake, tmp_path)
    assert found.fetched == 8
    assert {item.path for item in found.refused} == {"/".join(key) + ".dcm" for key in (keys[2], keys[4])}
    assert not any(uid in item.reason for item in found.refused for key in keys for uid in key)
    fake.objects[keys[2]], fake.objects[keys[4]] = wrong, swapped
    fake.habits = [of_instances(lambda request: answer(request, 404, {}))]
    with pytest.raises(SourceError, match="3 instances in a row") as caught:
        fetch(fake, tmp_path / "other")
    assert not any(uid in str(caught.value) for key in keys for uid in key)


def test_a_server_can_not_write_elsewhere(fake, tmp_path):
    (study, series, _), data = next(iter(fake.objects.items()))
    fake.objects = {(study, series, "../../../up"): data, ("..", series, "1.2"): data, (study, series, "1.2.3" * 20): data}
    found = fetch(fake, tmp_path / "deep" / "out")
    assert not found.fetched and len(found.refused) == 3
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_credentials_stay_with_their_host(fake, tmp_path, monkeypatch):
    other = Fake()
    other.objects = fake.objects
    try:
        fake.habits = [lambda request: answer(request, 307, {}, Location=f"http://localhost:{other.port}{request.path}")]
        assert fetch(fake, tmp_path).fetched == 10
        assert {sent for _, _, sent in other.requests} == {None}
        assert all(sent and sent.startswith("Basic ") for _, _, sent in fake.requests)
        with pytest.raises(Refused, match="another address"):
            server_of(fake).store(next(tmp_path.rglob("*.dcm")))
        assert not [1 for method, _, _ in other.requests if method == "POST"]
    finally:
        other.close()
    fake.habits, fake.requests = [], []
    (tmp_path / "netrc").write_text("machine localhost login other password word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server_of(fake, Access()).series(())
    server_of(fake, Access(token="abc")).series(())
    assert {sent for _, _, sent in fake.requests} == {None, "Bearer abc"}


def test_credentials_do_not_travel_in_the_open(tmp_path):
    plain = dicomweb.parse("http://pacs.example/dicom-web")
    with pytest.raises(ConfigError, match="plain http") as caught:
        dicomweb.Server(plain, SECRET)
    assert "secret" not in str(caught.value) + repr(SECRET)
    dicomweb.Server(plain)
    for url in ("https://me:secret@pacs.example/x", "https://me@pacs.example", "ftp://pacs.example", "https://", "https://[", "https://a:b"):
        with pytest.raises(ConfigError) as caught:
            dicomweb.parse(url)
        assert "secret" not in str(caught.value)
    address = dicomweb.parse("HTTPS://Pacs.Example:8443/dicom-web/?PatientID=Doe&Modality=CT")
    assert address.base == "https://pacs.example:8443/dicom-web" and address.query == (("PatientID", "Doe"), ("Modality", "CT"))
    assert "Doe" not in repr(address) + dicomweb.shown("https://pacs.example/x?PatientID=Doe")


def test_queries_and_files_of_secrets_are_checked(tmp_path):
    assert dicomweb.parse_query(["Modality=CT", "00080020=2020"]) == (("Modality", "CT"), ("00080020", "2020"))
    for wrong in (["Modality"], ["Modality="], ["Patient=Doe"], ["=Doe"], ["PatientID=Doe", "PatientID=Roe"]):
        with pytest.raises(ConfigError) as caught:
            dicomweb.parse_query(wrong)
        assert "Doe" not in str(caught.value)
    secret = tmp_path / "secret"
    secret.write_text("word\n")
    assert dicomweb.access("me", str(secret), None, None) == Access("me", "word")
    assert dicomweb.access(None, None, str(secret), None).token == "word"
    for arguments, kind in (
        (("me", None, None, None), ConfigError),
        (("me", str(secret), str(secret), None), ConfigError),
        (("me", str(tmp_path / "no"), None, None), SetupError),
        ((None, None, None, str(tmp_path / "no")), SetupError),
    ):
        with pytest.raises(kind):
            dicomweb.access(*arguments)
    secret.write_text("two\nlines")
    with pytest.raises(SetupError, match="one line") as caught:
        dicomweb.access("me", str(secret), None, None)
    assert "two" not in str(caught.value)


def test_store_tells_what_was_not_taken(fake, files, tmp_path):
    failed = {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [0xA700]}}]}}
    fake.habits = [times(1, lambda request: answer(request, 202, failed)), times(1, lambda request: answer(request, 200, {}))]
    (tmp_path / "text").write_text("x")
    refused = dict(dicomweb.store(server_of(fake), [*files[:3], tmp_path / "text"]))
    assert set(refused) == {files[0], files[1], tmp_path / "text"}
    assert "A700H" in refused[files[0]] and "did not say" in refused[files[1]] and "no DICOM" in refused[tmp_path / "text"]
    fake.habits = [lambda request: answer(request, 404, {})]
    with pytest.raises(SourceError, match="no DICOMweb service at this path"):
        dicomweb.store(server_of(fake), files)
    assert dicomweb.storable(files[0].parent)[1] == 0 and dicomweb.storable(tmp_path) == ([], 1)


def test_a_large_object_is_sent_in_pieces(fake, files, monkeypatch):
    server = server_of(fake)
    monkeypatch.setattr(server._client, "_chunk_size", 256)
    server.store(files[0])
    assert fake.received.count(b"DICM") == 1 and len(fake.received) > files[0].stat().st_size


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_certificates_are_checked(fake, files, tmp_path, monkeypatch):
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*command.split(), "-keyout", tmp_path / "k", "-out", tmp_path / "c"], check=True, capture_output=True, timeout=30)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "c", tmp_path / "k")
    fake.server.socket = context.wrap_socket(fake.server.socket, server_side=True)
    monkeypatch.setattr(fake.server, "handle_error", lambda *args: None)  # a refused handshake
    address = dicomweb.parse(fake.url.replace("http:", "https:"))
    with pytest.raises(SourceError, match="certificate is not trusted; --ca-file"):
        dicomweb.Server(address, SECRET, 2).series(())
    trusted = dicomweb.Server(address, Access("me", "word", ca_file=str(tmp_path / "c")), 2)
    assert len(trusted.series(())) == 2
    # Nothing goes from https to http.
    fake.habits = [lambda request: answer(request, 307, {}, Location=f"http://localhost:1{request.path}")]
    with pytest.raises(SourceError, match="from https to plain http"):
        trusted.series(())


# Servers that mean harm, or are broken for good


def endless(kind: str):
    """A body without an end: of bytes, of chunks, of packed zeros; ends when the client goes."""

    def act(request: BaseHTTPRequestHandler) -> bool:
        request.send_response(200)
        request.send_header("Content-Type", "application/dicom+json" if "/instances/" not in request.path else "multipart/related; boundary=mark")
        if kind == "chunks":
            request.send_header("Transfer-Encoding", "chunked")
        if kind == "packed":
            request.send_header("Content-Encoding", "gzip")
        if kind == "claimed":
            request.send_header("Content-Length", str(1 << 50))
        request.end_headers()
        request.close_connection = True
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        piece = b"[" + b" " * (1 << 16)
        with contextlib.suppress(OSError):
            for _ in range(1 << 20):
                data = packer.compress(bytes(1 << 20)) if kind == "packed" else piece
                request.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if kind == "chunks" else data)
        return True

    return act


@pytest.mark.parametrize("kind", ["bytes", "chunks", "packed", "claimed"])
@pytest.mark.parametrize("what", ["search", "instance"])
def test_an_endless_body_is_cut_off(fake, tmp_path, monkeypatch, kind, what):
    monkeypatch.setattr(dicomweb, "LARGEST_PAGE", 4 << 20)
    monkeypatch.setattr(dicomweb, "LARGEST_ANSWER", 8 << 20)
    act = endless(kind)
    fake.habits = [act if what == "search" else of_instances(act)]
    with pytest.raises(SourceError, match=f"larger than {4 if what == 'search' else 8} MiB"):
        fetch(fake, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("where", ["head", "body", "redirect"])
def test_a_trickle_is_left(fake, tmp_path, monkeypatch, where):
    monkeypatch.setattr(dicomweb, "PATIENCE_S", 1.0)

    def act(request: BaseHTTPRequestHandler) -> bool:
        request.close_connection = True
        with contextlib.suppress(OSError):
            if where == "head":
                request.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            else:
                request.send_response(302 if where == "redirect" else 200)
                request.send_header("Location", fake.url + "/series")
                request.end_headers()
            for _ in range(3000):
                request.wfile.write(b" ")
                request.wfile.flush()
                time.sleep(0.1)
        return True

    fake.habits = [act]
    begin = time.monotonic()
    with pytest.raises(SourceError, match="less than 10 kB/s"):
        fetch(fake, tmp_path)
    assert time.monotonic() - begin < 150  # of 300 s that the trickle lasts


def test_a_search_without_an_end_is_left(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(dicomweb, "MOST_PAGES", 7)
    count = iter(range(10**6))
    fake.habits = [lambda request: answer(request, 200, [{"0020000D": {"Value": [f"1.2.{next(count)}"]}, "0020000E": {"Value": ["1.2"]}}])]
    with pytest.raises(SourceError, match="the search has no end: 7 found on 7 pages"):
        fetch(fake, tmp_path)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://localhost/x", "gopher://x", "http://[broken", "http://localhost:99999/x", "//"])
def test_a_redirect_to_another_kind_of_address_is_told_as_one(fake, tmp_path, target):
    fake.habits = [lambda request: answer(request, 302, {}, Location=target)]
    with pytest.raises(SourceError, match="leads to an address that is not followed|no answer that can be used|no whole answer|cannot be encoded") as caught:
        fetch(fake, tmp_path)
    assert "passwd" not in str(caught.value) and "space" not in str(caught.value)


def test_redirects_in_a_circle_end(fake, tmp_path):
    fake.habits = [lambda request: answer(request, 302, {}, Location=request.path)]
    with pytest.raises(SourceError, match="leads to an address that is not followed"):
        fetch(fake, tmp_path)


def test_deep_and_odd_json_is_refused(fake, tmp_path):
    for body in (b"[" * 200_000, b'[{"0020000D": {"Value": [' + b"9" * 5000 + b"]}}]", b'{"a": 1}', b"[[]]", b"[null]", b'[{"0020000D": []}]', b'[{"0020000D": {"Value": {}}}]', b"\xff"):

        def act(request: BaseHTTPRequestHandler, body: bytes = body) -> bool:
            request.send_response(200)
            request.send_header("Content-Type", "application/dicom+json")
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body)
            return True

        fake.habits = [act]
        try:
            found = fetch(fake, tmp_path)
        except SourceError:
            continue
        assert found.fetched == 0 and len(found.refused) == 1
