"""What this processor can do, by the names that the kernel gives: integers of 8 bit are several times as fast with some of them.

A figure of time holds for the instruction sets that it was measured on, so whatever records a time records these too.
"""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Sequence
from pathlib import Path

NAMES = (
    "sse4_1", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "avx_vnni_int8",
    "amx_tile", "amx_bf16", "amx_int8", "neon", "asimd", "asimddp", "i8mm", "sve", "sve2", "sme",
)  # fmt: skip
"""The instruction sets that numeric kernels are chosen by, as ``/proc/cpuinfo`` spells them (x86, then Arm)."""

_INTEGERS = (
    ("amx_int8", "AMX"),
    ("avx512_vnni", "AVX-512 VNNI"),
    ("avx_vnni", "AVX VNNI"),
    ("i8mm", "Arm i8mm"),
    ("asimddp", "Arm dot product"),
)
_PLAIN = (("avx512bw", "AVX-512 without VNNI"), ("avx2", "AVX2 without VNNI"), ("asimd", "NEON"), ("neon", "NEON"))


def parse(cpuinfo: str) -> tuple[str, ...]:
    """Those of `NAMES` that every processor of a ``/proc/cpuinfo`` has, in their order. Pure.

    x86 lists them under ``flags``, Arm under ``Features``; cores of several kinds count by what they have in common.
    """
    lines = re.findall(r"^(?:flags|Features)[ \t]*:(.*)$", cpuinfo, re.MULTILINE)
    common = set.intersection(*(set(line.split()) for line in lines)) if lines else set()
    return tuple(name for name in NAMES if name in common)


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """`parse` of this machine; empty if it cannot be read."""
    try:
        return parse(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ()


def architecture() -> str:
    """Such as x86_64 or aarch64."""
    return platform.machine() or "unknown"


def has_integers(sets: Sequence[str]) -> bool:
    """True where sums of products of 8 bit have instructions of their own (VNNI, AMX, Arm's dot product). Pure."""
    return any(name in sets for name, _ in _INTEGERS)


def kind(sets: Sequence[str]) -> str:
    """What decides the speed of 8-bit integers, in a few words: such as "AVX-512 VNNI" or "AVX2 without VNNI". Pure."""
    found = [text for name, text in _INTEGERS if name in sets and not (name == "avx_vnni" and "avx512_vnni" in sets)]
    if found:
        return " and ".join(reversed(found))
    return next((text for name, text in _PLAIN if name in sets), "unknown instruction sets")
