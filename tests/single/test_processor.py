"""Instruction sets, as the kernel lists them."""

import pytest

from hvd_imaging import processor

HASWELL = "processor\t: 0\nflags\t\t: fpu sse4_1 avx f16c fma avx2 bmi2\n"
SAPPHIRE = "processor\t: 0\nflags\t\t: fpu avx2 fma avx512f avx512bw avx512_vnni avx_vnni amx_tile amx_int8\nvmx flags\t: avx2\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp\n\nprocessor\t: 1\nFeatures\t: fp asimd\n"


@pytest.mark.parametrize(
    ("text", "sets", "kind", "integers"),
    [
        (HASWELL, ("sse4_1", "avx", "f16c", "fma", "avx2"), "AVX2 without VNNI", False),
        (SAPPHIRE, ("fma", "avx2", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "amx_tile", "amx_int8"), "AVX-512 VNNI and AMX", True),
        (HASWELL + SAPPHIRE, ("fma", "avx2"), "AVX2 without VNNI", False),  # what all cores have
        (HASWELL.replace("bmi2", "avx_vnni"), ("sse4_1", "avx", "f16c", "fma", "avx2", "avx_vnni"), "AVX VNNI", True),
        (HASWELL.replace("bmi2", "avx512f avx512bw"), ("sse4_1", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw"),
         "AVX-512 without VNNI", False),
        (ARM, ("asimd",), "NEON", False),
        (ARM.split("\n\n")[0], ("asimd", "asimddp"), "Arm dot product", True),
        ("Features\t: neon vfpv4\n", ("neon",), "NEON", False),
        ("flags : avx2", ("avx2",), "AVX2 without VNNI", False),
        ("cpu family\t: 6\n", (), "unknown instruction sets", False),
        ("", (), "unknown instruction sets", False),
    ],
)  # fmt: skip
def test_what_the_kernel_lists(text, sets, kind, integers):
    found = processor.parse(text)
    assert found == sets and processor.kind(found) == kind and processor.has_integers(found) is integers


def test_this_machine_is_read_without_an_error():
    assert set(processor.instruction_sets()) <= set(processor.NAMES) and processor.architecture()
