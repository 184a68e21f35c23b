"""Brings the compiled inner loop of reading (`inner_loop`) and what a thread needs for it, where the machine can run it."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import threading
from typing import Any

import numpy as np

from . import frames

_ENOUGH = 1 << 24  # bytes: below, loading Numba takes longer than what it saves


class Unavailable(Exception):
    """The fast reader can not run here; the text says why."""


class _DecodeParameters(ctypes.Structure):
    """blosc2_dparams of blosc2.h."""

    _fields_ = (
        ("nthreads", ctypes.c_int),
        ("schunk", ctypes.c_void_p),
        ("postfilter", ctypes.c_void_p),
        ("postparams", ctypes.c_void_p),
        ("typesize", ctypes.c_int32),
    )


@functools.cache
def _library() -> tuple[str, ctypes.CDLL]:
    """The shared library inside the package blosc2, without the import of the package."""
    try:
        files = importlib.metadata.files("blosc2") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise Unavailable("the package blosc2 is not installed") from error
    for file in files:
        if file.name == "libblosc2.so":
            path = str(file.locate())
            try:
                library = ctypes.CDLL(path)
            except OSError as error:
                raise Unavailable("the library of the package blosc2 can not be loaded") from error
            library.blosc2_init()
            library.blosc2_create_dctx.restype = ctypes.c_void_p
            library.blosc2_create_dctx.argtypes = [_DecodeParameters]
            library.blosc2_free_ctx.argtypes = [ctypes.c_void_p]
            return path, library
    raise Unavailable("the package blosc2 has no shared library on this platform")


class Scratch(threading.local):
    """Buffers and a decoder of one thread."""

    def __init__(self) -> None:
        _, library = _library()
        self._library = library
        self.context = int(library.blosc2_create_dctx(_DecodeParameters(1, None, None, None, 1)) or 0)
        if not self.context:
            raise MemoryError("no Blosc2 decoder")
        self.source = np.empty(0, np.uint8)
        self.block = np.empty(0, np.uint8)

    def __del__(self) -> None:
        if getattr(self, "context", 0):
            self._library.blosc2_free_ctx(self.context)

    def fit(self, source: int, block: int) -> None:
        """Make room for so many bytes of a chunk and of a decoded block."""
        if self.source.size < source:
            self.source = np.empty(source, np.uint8)
        if self.block.size < block:
            self.block = np.empty(block, np.uint8)


@functools.cache
def inner_loop() -> Any:
    """The module `inner_loop`, compiled at its first use and kept in Numba's cache.

    Raises:
        Unavailable: Numba or Blosc2 is missing.
    """
    path, _ = _library()
    try:
        import llvmlite.binding

        llvmlite.binding.load_library_permanently(path)
        from . import inner_loop as module
    except ImportError as error:
        raise Unavailable("the package numba is not installed") from error
    return module


def checks_for(size: int) -> frames.Checks:
    """What computes the check sums of blocks of an array of ``size`` bytes: compiled, where that is worth its loading."""
    if size < _ENOUGH:
        return frames.block_checks
    try:
        compiled = inner_loop().check_sums
    except Unavailable:
        return frames.block_checks
    return lambda data, start: compiled(np.frombuffer(data, np.uint8), start)
