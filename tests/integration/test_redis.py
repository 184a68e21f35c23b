"""The cache of chunks against a real Redis server."""

import contextlib
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest
from redis_server import Server, free_port

from hvd_imaging.errors import ConfigError, SetupError
from hvd_imaging.pipeline import redis_chunks
from hvd_imaging.pipeline.redis_chunks import RedisChunks, connect, masked, parse, reason

PASSWORD = "s3cret-word"


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(*options, tls=False):
        servers.append(Server(tmp_path, *options, tls=tls))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def told():
    return []


@pytest.fixture
def cache(told):
    """Makes a cache that is closed at the end."""
    pytest.importorskip("redis")
    with contextlib.ExitStack() as stack:

        def make(url, prefix="hvd:", password_file=None, ca_file=None, ttl_s=None, **more):
            made = connect(url, prefix, password_file, ca_file, ttl_s, told.append, **more)
            stack.callback(made.close)
            return made

        yield make


def test_values_come_back(serve, cache, told):
    server = serve()
    chunks = cache(f"redis://127.0.0.1:{server.port}")
    assert chunks.get([]) == [] and chunks.get(["a", "b"]) == [None, None]
    chunks.put({})
    chunks.put({"a": b"\x00\xff" * 500_000, "b": b""})
    assert chunks.get(["b", "a", "c"], [0, 1_000_000, 7]) == [b"", b"\x00\xff" * 500_000, None]
    other = cache(f"redis://127.0.0.1:{server.port}/1")
    assert other.get(["a"]) == [None] and told == []
    assert cache(f"redis://localhost:{server.port}/0", prefix="").get(["hvd:b"]) == [b""]
    with pytest.raises(ValueError, match="2 keys with 1 sizes"):
        chunks.get(["a", "b"], [1])


def test_a_value_of_another_size_or_type_is_nothing(serve, cache, told):
    chunks = cache(f"redis://127.0.0.1:{serve().port}", prefix="")
    chunks.put({"a": b"12345", "b": b"123"})
    chunks._client.rpush("list", "1")
    assert chunks.get(["a", "b", "list"], [4, 3, 1]) == [None, b"123", None]
    chunks.put({"list": b"x", "a": b"1234"})
    assert chunks.get(["a", "list"], [4, 1]) == [b"1234", b"x"] and told == []


def test_values_expire(serve, cache):
    chunks = cache(f"redis://127.0.0.1:{serve().port}", prefix="", ttl_s=100)
    chunks.put({"a": b"1"})
    assert 0 < chunks._client.ttl("a") <= 100


@pytest.mark.parametrize("way", ["file", "url", "environment"])
def test_a_password(serve, cache, told, tmp_path, way, monkeypatch):
    server, file = serve("--requirepass", PASSWORD), tmp_path / "password"
    file.write_text(PASSWORD + "\n")
    file.chmod(0o600)
    host = f"127.0.0.1:{server.port}"
    if way == "environment":
        monkeypatch.setenv("HVD_IMAGING_REDIS_PASSWORD", PASSWORD)
    chunks = cache(f"redis://:{PASSWORD}@{host}" if way == "url" else f"redis://{host}", password_file=file if way == "file" else None)
    chunks.put({"a": b"1"})
    assert chunks.get(["a"]) == [b"1"] and told == []


@pytest.mark.parametrize("login", ["", ":wrong-but-s3cret@", "someone:wrong-but-s3cret@"])
def test_a_wrong_password_is_said_once_and_never_shown(serve, cache, told, login):
    chunks = cache(f"redis://{login}127.0.0.1:{serve('--requirepass', PASSWORD).port}")
    chunks.put({"patient": b"voxels"})
    assert chunks.get(["patient"] * 3) == [None] * 3
    assert len(told) == 1 and "refuses the password, or wants one" in told[0] and "127.0.0.1" in told[0]
    assert not any(word in told[0] for word in ("s3cret", "someone", "patient", "voxels"))


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture
def certificates(tmp_path):
    """ca.crt, and key.pem with cert.pem for localhost signed by it; other.crt is another CA."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on PATH")
    new_key = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    for name in ("ca", "other"):
        usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
        ca = ("-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.crt", "-subj", f"/CN=test {name}")
        openssl(*new_key, "-x509", *usage, *ca)
    request = tmp_path / "request.pem"
    openssl(*new_key[:-2], "-keyout", tmp_path / "key.pem", "-out", request, "-subj", "/CN=localhost")
    (tmp_path / "names").write_text("subjectAltName=DNS:localhost\n")
    sign = ("x509", "-req", "-in", request, "-CA", tmp_path / "ca.crt", "-CAkey", tmp_path / "ca.key")
    openssl(*sign, "-CAcreateserial", "-days", "2", "-extfile", tmp_path / "names", "-out", tmp_path / "cert.pem")
    return tmp_path


@pytest.fixture
def tls_server(serve, certificates):
    files = ("--tls-cert-file", certificates / "cert.pem", "--tls-key-file", certificates / "key.pem")
    more = ("--tls-ca-cert-file", certificates / "ca.crt", "--tls-auth-clients", "no", "--requirepass", PASSWORD)
    return serve(*map(str, files + more), tls=True)


def test_tls(tls_server, certificates, cache, told):
    chunks = cache(f"rediss://:{PASSWORD}@localhost:{tls_server.port}", ca_file=certificates / "ca.crt")
    chunks.put({"a": b"1"})
    assert chunks.get(["a"]) == [b"1"] and told == []


@pytest.mark.parametrize(
    "host, ca, expected",
    [
        ("localhost", "other.crt", "its certificate is refused"),
        ("localhost", None, "its certificate is refused"),
        ("127.0.0.1", "ca.crt", "its certificate is refused (IP address mismatch"),
    ],
)
def test_tls_with_a_certificate_that_proves_nothing(tls_server, certificates, cache, told, host, ca, expected):
    chunks = cache(f"rediss://:{PASSWORD}@{host}:{tls_server.port}", ca_file=ca and certificates / ca)
    assert chunks.get(["a"]) == [None]
    assert len(told) == 1 and expected in told[0] and PASSWORD not in told[0]


def test_tls_against_a_server_without_it_and_the_other_way_round(serve, tls_server, certificates, cache, told):
    assert cache(f"rediss://localhost:{serve().port}", ca_file=certificates / "ca.crt").get(["a"]) == [None]
    assert cache(f"redis://:{PASSWORD}@localhost:{tls_server.port}").get(["a"]) == [None]
    with babbler(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        assert cache(f"rediss://:{PASSWORD}@localhost:{port}").get(["a"]) == [None]
    assert "no answer within 2 s" in told[0] and "no connection" in told[1] and "TLS fails" in told[2]
    assert len(told) == 3 and PASSWORD not in "".join(told)


def test_a_server_that_dies_and_returns(serve, cache, told):
    server = serve()
    chunks = cache(f"redis://127.0.0.1:{server.port}", retry_after=0.3)
    errors, stop, hits = [], threading.Event(), []

    def train():
        try:
            while not stop.is_set():
                found = chunks.get(["a", "b"], [1000, 1000])
                hits.append(found.count(None) == 0)
                if None in found:
                    chunks.put({"a": b"a" * 1000, "b": b"b" * 1000})
                time.sleep(0.001)
        except BaseException as error:
            errors.append(error)

    def until(done):
        deadline = time.monotonic() + 20
        while not done():
            assert time.monotonic() < deadline and not errors
            time.sleep(0.01)

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: True in hits)
        server.kill()
        until(lambda: told)
        count = len(hits)
        until(lambda: len(hits) > count + 50)  # training goes on meanwhile
        assert hits[-1] is False
        time.sleep(0.8)  # some quiet tries
        server.start()
        until(lambda: len(told) > 1)
        count = len(hits)
        until(lambda: len(hits) > count + 50 and hits[-1])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors and len(told) == 2
    assert "the cache of chunks is off: " in told[0] and "tried again every 0.3 s" in told[0]
    assert told[1] == f"redis://127.0.0.1:{server.port}/0: the cache of chunks is back"


class Scripted:
    """A client whose calls end as the script says: each step is called, then raised or returned."""

    def __init__(self, *steps):
        self.steps = list(steps)

    def mget(self, keys):
        answer = self.steps.pop(0)()
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize("late", [[b"1"], ValueError()])
def test_a_call_from_before_the_failure_changes_nothing(told, late):
    def overtaken():
        assert chunks.get(["a"]) == [None] and len(told) == 1  # another thread's call fails meanwhile
        return late

    client = Scripted(overtaken, ValueError, lambda: [b"2"])
    chunks = RedisChunks(client, "here", "", None, told.append)
    assert chunks.get(["a"]) == [None if isinstance(late, Exception) else b"1"]
    assert chunks.get(["a"]) == [None] and len(told) == 1 and len(client.steps) == 1  # still off


def test_a_failure_from_before_the_return_does_not_switch_off_again(told):
    def overtaken():
        assert chunks.get(["a"]) == [None] and chunks.get(["a"]) == [b"2"] and len(told) == 2
        return ValueError()

    chunks = RedisChunks(Scripted(overtaken, ValueError, *2 * [lambda: [b"2"]]), "here", "", None, told.append, 0.0)
    assert chunks.get(["a"]) == [None] and chunks.get(["a"]) == [b"2"]
    assert [line.partition(";")[0] for line in told][1:] == ["here: the cache of chunks is back"]


def test_a_restart_between_two_calls_is_not_even_noticed(serve, cache, told):
    server = serve()
    chunks = cache(f"redis://127.0.0.1:{server.port}")
    chunks.put({"a": b"1"})
    server.kill()
    server.start()
    assert chunks.get(["a"]) == [None] and told == []


def test_while_it_is_off_nobody_waits(cache, told):
    chunks = cache(f"redis://127.0.0.1:{free_port()}")
    assert chunks.get(["a"]) == [None] and "no connection (Connection refused)" in told[0]
    begin = time.monotonic()
    for _ in range(1000):
        assert chunks.get(["a"]) == [None]
        chunks.put({"a": b"1"})
    assert time.monotonic() - begin < 1 and len(told) == 1


def test_a_full_server_still_gives_what_it_has(serve, cache, told):
    chunks = cache(f"redis://127.0.0.1:{serve('--maxmemory', '4mb', '--maxmemory-policy', 'noeviction').port}")
    for number in range(20):
        chunks.put({str(number): b"x" * 500_000})
    assert chunks.get(["0", "19"]) == [b"x" * 500_000, None]
    assert len(told) == 1 and "no memory left" in told[0] and "maxmemory" in told[0]


def test_a_user_without_rights(serve, cache, told):
    host = f"127.0.0.1:{serve().port}"
    cache(f"redis://{host}")._client.execute_command("ACL", "SETUSER", "low", "on", ">word", "~*", "+get")
    chunks = cache(f"redis://low:word@{host}")
    assert chunks.get(["a"]) == [None]
    assert len(told) == 1 and "access rules forbid" in told[0] and "word" not in told[0]


@contextlib.contextmanager
def babbler(answer):
    """A port of a server that answers everything with ``answer``; None: never."""
    stop = threading.Event()

    def talk(connection):
        connection.settimeout(0.1)
        with connection:
            while not stop.is_set():
                try:
                    heard = connection.recv(65536)
                    if not heard:
                        return
                    if answer is not None:
                        connection.sendall(answer.replace(b"ECHO", heard.replace(b"\r\n", b" ")))
                except TimeoutError:
                    continue
                except OSError:
                    return

    def listen():
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                talkers.append(threading.Thread(target=talk, args=(listener.accept()[0],)))
                talkers[-1].start()

    talkers = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            stop.set()
            for each in [thread, *talkers]:
                each.join()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"+OK\r\n",
        b":1\r\n",
        b"*x\r\n",
        b"$x\r\n",
        b"*1\r\n:5\r\n",
        b"*3\r\n$1\r\na\r\n$1\r\nb\r\n$1\r\nc\r\n",
        b"*-1\r\n",
        b"$-1\r\n",
        b"*1\r\n" * 3000,
        b"\xff\xfe\r\n",
        b"-\xff\xfe\r\n",
        b"-ERR ECHO\r\n",
        b"-WRONGPASS ECHO\r\n",
        b"-OOM ECHO\r\n",
        b"-MOVED 1 ECHO\r\n",
    ],
    ids=lambda answer: repr(answer[:12]),
)
@pytest.mark.parametrize("login", ["", f":{PASSWORD}@"])
def test_rubbish_costs_one_line(cache, told, answer, login):
    with babbler(answer) as port:
        chunks = cache(f"redis://{login}127.0.0.1:{port}", prefix="")
        assert chunks.get(["name", "other"]) == [None, None]
        chunks.put({"name": b"voxels"})
        assert chunks.get(["name"]) == [None]
        chunks.close()
    assert 1 <= len(told) <= 2 and "127.0.0.1" in told[0]
    assert not any(word in line for line in told for word in (PASSWORD, "voxels", "name"))


def test_a_silent_server_costs_one_wait(cache, told, monkeypatch):
    monkeypatch.setattr(redis_chunks, "TIMEOUT_S", 0.3)
    with babbler(None) as port:
        chunks = cache(f"redis://127.0.0.1:{port}")
        begin = time.monotonic()
        assert chunks.get(["a"]) == chunks.get(["a"]) == [None]
        assert time.monotonic() - begin < 2
        chunks.close()
    assert len(told) == 1 and "no answer within 0.3 s" in told[0]


# --- addresses and files, without a server


@pytest.mark.parametrize(
    "url, expected",
    [
        ("redis://host", ("host", 6379, 0, False, None, None)),
        ("rediss://host:1/2", ("host", 1, 2, True, None, None)),
        ("redis://:a%2Fb%40@[::1]:7", ("::1", 7, 0, False, None, "a/b@")),
        ("redis://me:word@host/", ("host", 6379, 0, False, "me", "word")),
        ("redis://:p@ss@host", ("host", 6379, 0, False, None, "p@ss")),
    ],
)
def test_an_address(url, expected):
    found = parse(url)
    shown = (found.host, found.port, found.database, found.tls, found.username, found.password)
    assert shown == expected
    assert found.password is None or found.password not in str(found) + repr(found)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "s3cret@host",
        "http://:s3cret@host",
        "redis://",
        "redis://:s3cret@",
        "redis://:s3cret@host:port",
        "redis://:s3cret@host:70000",
        "redis://:s3cret@host/x",
        "redis://:s3cret@host/-1",
        "redis://:pa/s3cret@host:6379",
        "redis://:pa#s3cret@host:6379",
        "redis://:pa?s3cret@host:6379",
        "redis://:[s3cret@host:6379",
        "rediss://host?ssl_cert_reqs=none",
        "redis://host?password=s3cret",
        "redis://host#s3cret",
        "unix://:s3cret@/run/redis.sock",
    ],
)
def test_an_address_that_can_not_be_used_is_shown_without_the_password(url):
    with pytest.raises(ConfigError, match="expected redis") as caught:
        parse(url)
    assert "s3cret" not in str(caught.value) and "s3cret" not in masked(url)
    assert caught.value.__cause__ is None and caught.value.__context__ is None


def test_files_and_contradictions(cache, told, tmp_path):
    file = tmp_path / "password"
    file.write_text("s3cret\n")
    with pytest.raises(ConfigError, match="a password file; remove"):
        cache("redis://:s3cret@localhost", password_file=file)
    with pytest.raises(ConfigError, match="expected rediss://, or no CA file"):
        cache("redis://localhost", ca_file=file)
    with pytest.raises(SetupError, match=r"none: the CA file of Redis cannot be read \(No such file"):
        cache("rediss://localhost", ca_file=tmp_path / "none")
    with pytest.raises(SetupError, match=r"none: the password file of Redis cannot be read \(No such file"):
        cache("redis://localhost", password_file=tmp_path / "none")
    for text in ("", "\n", "s3cret\ns3cret"):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(ConfigError, match="in one line") as caught:
            cache("redis://localhost", password_file=tmp_path / "bad")
        assert "s3cret" not in str(caught.value)
    assert told == []
    file.chmod(0o644)
    cache("redis://localhost", password_file=file)
    assert len(told) == 1 and "chmod 600" in told[0] and "s3cret" not in told[0]


def test_an_open_way_to_another_machine_is_said(cache, told):
    cache("rediss://far.example")
    assert told == []
    cache("redis://:s3cret@far.example")
    assert len(told) == 1 and "unencrypted" in told[0] and "s3cret" not in told[0]


def test_without_the_package_the_next_step_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(SetupError, match=r"pip install hvd_imaging\[redis\]"):
        connect("redis://localhost", "", None, None, None, print)


def test_the_module_does_not_load_the_package():
    code = "import sys, hvd_imaging.pipeline.redis_chunks; sys.exit('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "error, expected",
    [
        (ssl.SSLError(1, "secret"), "TLS fails"),
        (socket.gaierror(-2, "secret"), "host name is unknown"),
        (ConnectionRefusedError(111, "secret"), "no connection (Connection refused)"),
        (OSError("secret"), "not what Redis would say (OSError)"),
        (ValueError("secret"), "not what Redis would say (ValueError)"),
    ],
)
def test_reasons_are_in_our_own_words(error, expected):
    assert expected in reason(error) and "secret" not in reason(error)
