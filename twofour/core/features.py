"""What each feature of a CPU gives here, in words: for doctor, and for who chooses a machine."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

_X86, _ARM = ("x86_64", "AMD64", "i686"), ("aarch64", "arm64")


@dataclass(frozen=True)
class Feature:
    """One or several features that kernels use together.

    Attributes:
        name: as people call it.
        needs: names as Linux spells them, without underscores.
        archs: machine architectures that have it.
        gives: what kernels do with it.
    """

    name: str
    needs: tuple[str, ...]
    archs: tuple[str, ...]
    gives: str

    def here(self, flags: Collection[str]) -> bool:
        """Whether a CPU with these flags has it."""
        return set(self.needs) <= set(flags)


FEATURES = (
    Feature(
        "AVX2, FMA",
        ("avx2", "fma"),
        _X86,
        "target avx2: float32, INT8 and INT8 2:4 in vectors of 32 bytes",
    ),
    Feature(
        "AVX-512",
        ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
        _X86,
        "with VNNI: float32 in vectors of 64 bytes, float32 2:4",
    ),
    Feature(
        "AVX-512 VNNI",
        ("avx512vnni",),
        _X86,
        "target avx512vnni: 64 INT8 multiply-adds an instruction, 128 with 2:4",
    ),
    Feature(
        "AVX-512 BF16",
        ("avx512bf16",),
        _X86,
        "build --bf16: twice the multiply-adds of float32, and its 2:4",
    ),
    Feature("AVX-VNNI", ("avxvnni",), _X86, "nothing yet: no kernel uses it"),
    Feature("AMX", ("amxtile", "amxint8"), _X86, "nothing yet: no kernel uses it"),
    Feature(
        "Advanced SIMD",
        ("asimd",),
        _ARM,
        "target vector: the portable kernels, in vectors of 16 bytes",
    ),
    Feature(
        "dot products",
        ("asimd", "asimddp"),
        _ARM,
        "target dotprod: 16 INT8 multiply-adds an instruction, 32 with 2:4",
    ),
    Feature("SVE", ("sve",), _ARM, "nothing yet: no kernel uses it"),
    Feature("I8MM", ("i8mm",), _ARM, "nothing yet: no kernel uses it"),
)


def features_of(arch: str) -> tuple[Feature, ...]:
    """Those that CPUs of an architecture may have; none for one that nothing is known of."""
    return tuple(feature for feature in FEATURES if arch in feature.archs)
