"""Brings the compiled inner loops (`inner_loop`, `inner_pack`) and what a thread needs for them, where the machine can run them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import frames

ENOUGH = 1 << 24  # bytes: below, loading Numba takes longer than what it saves


class Unavailable(Exception):
    """The fast reader cannot run here; the text says why."""


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
                raise Unavailable("the library of the package blosc2 cannot be loaded") from error
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


def inner_pack() -> Any:
    """The module `inner_pack`, likewise.

    Raises:
        Unavailable: Numba or Blosc2 is missing.
    """
    inner_loop()
    from . import inner_pack as module

    return module


class _EncodeParameters(ctypes.Structure):
    """blosc2_cparams of blosc2.h."""

    _fields_ = (
        ("compcode", ctypes.c_uint8),
        ("compcode_meta", ctypes.c_uint8),
        ("clevel", ctypes.c_uint8),
        ("use_dict", ctypes.c_int),
        ("typesize", ctypes.c_int32),
        ("nthreads", ctypes.c_int16),
        ("blocksize", ctypes.c_int32),
        ("splitmode", ctypes.c_int32),
        ("schunk", ctypes.c_void_p),
        ("filters", ctypes.c_uint8 * 6),
        ("filters_meta", ctypes.c_uint8 * 6),
        ("prefilter", ctypes.c_void_p),
        ("preparams", ctypes.c_void_p),
        ("tuner_params", ctypes.c_void_p),
        ("tuner_id", ctypes.c_int),
        ("instr_codec", ctypes.c_bool),
        ("codec_params", ctypes.c_void_p),
        ("filter_params", ctypes.c_void_p * 6),
    )


_SPLIT_FORWARD = 4
_BITSHUFFLE = 2


@contextlib.contextmanager
def compressor(compression: str, typesize: int, blocksize: int) -> Iterator[int]:
    """A Blosc2 context that compresses as `frames` does; 0 for "none".

    Raises:
        Unavailable: this release of Blosc2 has other parameters.
    """
    if compression == "none":
        yield 0
        return
    _, library = _library()
    library.blosc2_get_blosc2_cparams_defaults.restype = _EncodeParameters
    library.blosc2_create_cctx.restype = ctypes.c_void_p
    library.blosc2_create_cctx.argtypes = [_EncodeParameters]
    parameters = library.blosc2_get_blosc2_cparams_defaults()
    # What the defaults are known to be, so that a changed structure is noticed.
    if (parameters.typesize, parameters.nthreads, parameters.splitmode, list(parameters.filters)) != (8, 1, _SPLIT_FORWARD, [0] * 5 + [1]):
        raise Unavailable("this release of Blosc2 has other parameters")
    parameters.compcode = {"lz4": 1, "zstd": 5}[compression]
    parameters.clevel, parameters.typesize, parameters.blocksize = frames.LEVEL[compression], typesize, blocksize
    parameters.filters[:] = [_BITSHUFFLE, 0, 0, 0, 0, 0]
    context = library.blosc2_create_cctx(parameters)
    if not context:
        raise Unavailable("Blosc2 made no compressor")
    try:
        yield context
    finally:
        library.blosc2_free_ctx(context)
