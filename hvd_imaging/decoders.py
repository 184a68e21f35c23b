"""Compressed frames as numbers, in a process of their own.

Native decoders meet whatever an archive holds, damaged and hostile files among it. So a child process decodes, with a
limit of memory and a deadline for each frame: a crash costs one file, not the run. `decode` runs in the child and needs
NumPy and imagecodecs only; `Decoder` is the parent's side.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import select
import struct
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from .errors import SetupError, SourceError
from .texts import parse_json

FRAME_SECONDS = 5.0
"""A frame takes some 10 ms; the largest mammogram in JPEG 2000 about a second."""
START_SECONDS = 120.0
"""Importing the decoders from a busy parallel filesystem may take long; it happens once a rank."""
CHILD_BYTES = 512 << 20
"""Memory of the child beside its libraries: more than any frame of 16-bit rows and columns in clinical use takes
twice, and with the rank's own below 1 GiB."""

JPEG = frozenset(f"1.2.840.10008.1.2.4.{tail}" for tail in ("50", "51", "57", "70"))
JPEG_LS = frozenset(("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"))
JPEG_2000 = frozenset(
    f"1.2.840.10008.1.2.4.{tail}" for tail in ("90", "91", "201", "202", "203")
)  # the last three: High-Throughput JPEG 2000
SYNTAXES = JPEG | JPEG_LS | JPEG_2000


@dataclass(frozen=True)
class Expected:
    """What the DICOM header says of a frame."""

    syntax: str
    rows: int
    columns: int
    samples: int
    photometric: str


class Wrong(Exception):
    """Why a frame cannot be decoded; the text is ours and quotes nothing of the file but sizes."""


def decode(data: bytes, expected: Expected) -> np.ndarray:
    """One frame, ``(H, W)`` or ``(H, W, 3)`` integers; colour comes as RGB where the coding transforms colour itself.

    Raises:
        Wrong: another size than the header's, or damaged.
    """
    import imagecodecs  # the child's only heavy import

    found = codestream_size(data)
    if found is None:
        raise Wrong("begins with no image of this coding")
    if found[:2] != (expected.rows, expected.columns) or found[2] != expected.samples:
        raise Wrong(
            f"says {found[0]} x {found[1]} pixels of {found[2]} sample(s), the header {expected.rows} x "
            f"{expected.columns} of {expected.samples}"
        )
    try:
        if expected.syntax in JPEG:
            space = jpeg_colour(data, expected.photometric) if expected.samples == 3 else None
            array = imagecodecs.jpeg8_decode(data, colorspace=space, outcolorspace=space and "RGB")
        elif expected.syntax in JPEG_LS:
            array = imagecodecs.jpegls_decode(data)
        else:
            array = imagecodecs.jpeg2k_decode(data)
    except MemoryError:
        raise Wrong("needs more memory than a frame may") from None
    except Exception as error:
        raise Wrong(f"is damaged ({type(error).__name__})") from None
    shape = (expected.rows, expected.columns) + ((expected.samples,) if expected.samples > 1 else ())
    if array.size != np.prod(shape) or array.dtype.kind not in "iu":
        raise Wrong(f"gives an array of shape {array.shape}, expected {shape}")
    return np.ascontiguousarray(array.reshape(shape))


def codestream_size(data: bytes) -> tuple[int, int, int] | None:
    """(rows, columns, samples) as a JPEG, JPEG-LS or JPEG 2000 codestream begins; None if it is none. Pure.

    Read before decoding, because a decoder allocates what the codestream says.
    """
    if data[:12] == b"\x00\x00\x00\x0cjP  \r\n\x87\n":  # a JP2 file around the codestream
        start = data.find(b"\xff\x4f\xff\x51", 0, 4096)
        data = data[start:] if start >= 0 else b""
    if data[:4] == b"\xff\x4f\xff\x51" and len(data) >= 42:
        right, bottom, left, top = struct.unpack(">4I", data[8:24])
        tile_w, tile_h = struct.unpack(">2I", data[24:32])
        samples = struct.unpack(">H", data[40:42])[0]
        if right <= left or bottom <= top or not tile_w or not tile_h:
            return None
        if (-(-right // tile_w)) * (-(-bottom // tile_h)) > 65535:
            return None
        return bottom - top, right - left, samples
    if data[:2] != b"\xff\xd8":
        return None
    pos = 2
    while pos + 4 <= len(data):
        if data[pos] != 0xFF:
            return None
        marker = data[pos + 1]
        if marker == 0xFF:
            pos += 1
            continue
        length = int.from_bytes(data[pos + 2 : pos + 4], "big")
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            if pos + 10 > len(data):
                return None
            return struct.unpack(">2H", data[pos + 5 : pos + 9]) + (data[pos + 9],)
        if marker in (0xD9, 0xDA) or length < 2:
            return None
        pos += 2 + length
    return None


def jpeg_colour(data: bytes, photometric: str) -> str:
    """How a JPEG's three components are meant: "RGB" or "YCBCR". Pure.

    The codestream's own marks (component names, Adobe, JFIF) count more than PhotometricInterpretation, which
    transcoders forget to change.
    """
    pos, jfif, adobe = 2, False, None
    while pos + 4 <= len(data) and data[pos] == 0xFF:
        marker = data[pos + 1]
        length = int.from_bytes(data[pos + 2 : pos + 4], "big")
        body = data[pos + 4 : pos + 2 + length]
        if marker == 0xE0 and body.startswith(b"JFIF"):
            jfif = True
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            adobe = body[11]
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            names = bytes(body[6 + 3 * index] for index in range(3)) if len(body) >= 15 else b""
            if names in (b"RGB", b"rgb"):
                return "RGB"
            if adobe is not None:
                return "YCBCR" if adobe else "RGB"
            if marker in (0xC3, 0xC7):  # lossless: no transform unless the header says so
                break
            return "YCBCR" if jfif or photometric.startswith("YBR") else "RGB"
        elif marker == 0xDA or length < 2:
            break
        pos += 2 + length
    return "YCBCR" if photometric.startswith("YBR") else "RGB"


def serve(reader: IO[bytes], writer: IO[bytes]) -> None:
    """The child's loop: requests in, arrays out, until the parent closes its end."""
    try:
        import imagecodecs

        imagecodecs.jpeg8_decode, imagecodecs.jpegls_decode, imagecodecs.jpeg2k_decode  # noqa: B018 (loads them)
    except ImportError:
        _send(writer, {"missing": "imagecodecs"}, b"")
        return
    with open("/proc/self/statm", "rb") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + CHILD_BYTES, used + CHILD_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _send(writer, {"ready": True}, b"")
    while True:
        request = _receive(reader)
        if request is None:
            return
        head, data = request
        try:
            array = decode(data, Expected(**head))
            _send(writer, {"dtype": array.dtype.str, "shape": array.shape}, array.tobytes())
        except Wrong as error:
            _send(writer, {"wrong": str(error)}, b"")
        except Exception as error:
            _send(writer, {"wrong": f"is damaged ({type(error).__name__})"}, b"")


def _send(writer: IO[bytes], head: dict[str, Any], data: bytes) -> None:
    text = json.dumps(head).encode()
    writer.write(struct.pack("<II", len(text), len(data)) + text)
    writer.write(data)
    writer.flush()


def _receive(reader: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    sizes = reader.read(8)
    if len(sizes) < 8:
        return None
    head, data = struct.unpack("<II", sizes)
    return parse_json(reader.read(head)), reader.read(data)


class Decoder:
    """The parent's side: one child, started at the first frame, replaced when it dies or is too slow."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def frame(self, data: bytes, expected: Expected) -> np.ndarray:
        """`decode` in the child.

        Raises:
            SourceError: the frame cannot be decoded; the message continues "compressed frame ...".
            SetupError: the decoders are not installed.
        """
        with self._lock:
            child = self._start()
            assert child.stdin is not None
            deadline = time.monotonic() + FRAME_SECONDS
            try:
                _send(child.stdin, asdict(expected), data)
                head, body = self._answer(child, deadline)
            except (_Late, _Died, OSError) as error:
                self.close()
                what = (
                    f"takes longer than {FRAME_SECONDS:g} s" if isinstance(error, _Late) else "makes its decoder crash"
                )
                raise SourceError(f"compressed frame {what}") from None
        if "wrong" in head:
            raise SourceError(f"compressed frame {head['wrong']}")
        return np.frombuffer(body, np.dtype(head["dtype"])).reshape(head["shape"])

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.close()
        root = str(Path(__file__).resolve().parents[1])
        code = (
            "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
            "from hvd_imaging.decoders import serve; serve(sys.stdin.buffer, sys.stdout.buffer)"
        )
        path = [root, *(entry for entry in sys.path if entry and entry != root)]
        keep = ("PATH", "LD_LIBRARY_PATH", "LANG", "TMPDIR")
        environment = {name: os.environ[name] for name in keep if name in os.environ}
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-c", code, json.dumps(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # native decoders write of what they meet there
            env={**environment, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        try:
            head, _ = self._answer(self._child, time.monotonic() + START_SECONDS)
        except (_Late, _Died, OSError):
            self.close()
            raise SetupError(
                "the process that decodes compressed images cannot be started; check memory and `ulimit -u` of this machine"
            ) from None
        if "missing" in head:
            self.close()
            raise SetupError(
                "compressed images (JPEG, JPEG-LS, JPEG 2000) need decoders that are not installed: "
                "pip install hvd_imaging[dicom]"
            )
        return self._child

    @staticmethod
    def _answer(child: subprocess.Popen[bytes], deadline: float) -> tuple[dict[str, Any], bytearray]:
        assert child.stdout is not None
        source = child.stdout.fileno()

        def take(count: int) -> bytearray:
            buffer = bytearray(count)
            view, got = memoryview(buffer), 0
            while got < count:
                ready, _, _ = select.select([source], [], [], max(deadline - time.monotonic(), 0))
                if not ready:
                    raise _Late
                more = os.readv(source, [view[got:]])
                if not more:
                    raise _Died
                got += more
            return buffer

        head, data = struct.unpack("<II", take(8))
        return json.loads(take(head)), take(data)  # noqa: TID251 - from the process that started this one


class _Late(Exception):
    pass


class _Died(Exception):
    pass


DECODER = Decoder()
"""One a process."""
atexit.register(DECODER.close)
