"""What each version of TensorRT takes, and how it is told: the one place that knows versions.

    version      network         8 bits                     16 bits                       sparse
    8.6          weakly typed    Q/DQ, or calibration       flag FP16                     flag
    9, 10        weakly typed    Q/DQ, or calibration       flags FP16, BF16              flag
    11 and on    strongly typed  Q/DQ                       the graph is cast             flag
    for RTX      strongly typed  Q/DQ                       the graph is cast             flag

"Calibration" is implicit quantization: a float model, a flag, and a table of scales. A weakly typed
network computes in whatever its flags allow; a strongly typed one in the types of its graph.

Source: NVIDIA's guides for migration from 8.x to 10.x and from 10.x to 11.x.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from twofour.core.errors import UnsupportedError

OLDEST = (8, 6)
_FIRST_BF16 = 9
_FIRST_WITHOUT_BATCH_FLAG = 10
_FIRST_STRONG = 11
_NEW_NUMBERS = 10
RTX = "tensorrt_rtx"


@dataclass(frozen=True)
class Rules:
    """One version.

    Attributes:
        library: "tensorrt" or "tensorrt_rtx".
        version: as the library gives it.
        number: as headers of calibration tables have it: 8601, 100900.
        strongly_typed: types are those of the graph; there are no flags for them.
        batch_flag: networks say that their batch is a dimension.
        half_flags: type -> flag that lets a weakly typed network compute in it.
        calibrates: 8 bits can come from a float model and a table of scales.
        times_kernels: kernels are chosen at build, by time: a timing cache is of use.
        chooses_gpu: it builds for GPUs that are not here.
    """

    library: str
    version: str
    number: int
    strongly_typed: bool
    batch_flag: bool
    half_flags: dict[str, str]
    calibrates: bool
    times_kernels: bool
    chooses_gpu: bool


def rules_of(library: str, version: str) -> Rules:
    """The rules of a version.

    Args:
        library: "tensorrt" or "tensorrt_rtx".
        version: as it gives it: "10.9.0.34".

    Raises:
        UnsupportedError: it is older than 8.6.
    """
    numbers = [int(part) for part in re.findall(r"\d+", version)]
    major, minor, patch = (*numbers, 0, 0, 0)[:3]
    is_rtx = library == RTX
    if not is_rtx and (major, minor) < OLDEST:
        raise UnsupportedError(
            f"TensorRT {version} is too old",
            [f"expected {OLDEST[0]}.{OLDEST[1]} or newer"],
            "pip install --upgrade tensorrt",
        )
    strong = is_rtx or major >= _FIRST_STRONG
    weight = 10_000 if is_rtx or major >= _NEW_NUMBERS else 1000
    halves = {"float16": "FP16"} | ({"bfloat16": "BF16"} if major >= _FIRST_BF16 else {})
    return Rules(
        library,
        version,
        number=major * weight + minor * 100 + patch,
        strongly_typed=strong,
        batch_flag=not is_rtx and major < _FIRST_WITHOUT_BATCH_FLAG,
        half_flags={} if strong else halves,
        calibrates=not strong,
        times_kernels=not is_rtx,
        chooses_gpu=is_rtx,
    )
