"""TensorRT's calibration table: the scale of each tensor, as text.

    TRT-8601-EntropyCalibration2
    input: 3c8954be
    conv1_output: 3d2f1b00

The first line has TensorRT's version (8.6.1) and the calibrator. Every other line is the name of a
tensor of the ONNX file, a colon, a blank, and the float32 scale, its bits as 8 hexadecimal digits,
the highest first. Scales are symmetric: scale = amax / 127, so the range is -127 to 127 scales.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from twofour.core.errors import InputError
from twofour.core.ranges import Activation, Range
from twofour.core.writing import write_whole
from twofour.onnx_tools.edit import constant, is_standard, operand

MAX_BYTES = 1 << 26
"""Of a file that is read."""
HEADER = "TRT-8601-{}"
_START = b"TRT-"
_FIRST = re.compile(r"TRT-\d+-\w+")
_LINE = re.compile(r"(?P<name>.+): (?P<bits>[0-9a-fA-F]{1,8})")


def is_table(path: str | os.PathLike[str]) -> bool:
    """Whether a file is such a table, by its first bytes; False where there is no file.

    A pipe is none, and is not waited for.
    """
    if not Path(path).is_file():
        return False
    try:
        with Path(path).open("rb") as file:
            return file.read(len(_START)) == _START
    except OSError:
        return False


def read_table(path: str | os.PathLike[str]) -> dict[str, float]:
    """The scales of a table.

    Args:
        path: of the file.

    Returns:
        Tensor -> scale, a float32 number, >= 0; 0 is that of a tensor of zeros.

    Raises:
        InputError: it cannot be read, or a line is not as it should be.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise _bad(path, f"expected at most {MAX_BYTES} bytes, got more")
        lines = content.decode().splitlines()
    except OSError as error:
        raise InputError(f"cannot read {path}", [str(error)], "name a readable file") from error
    except UnicodeDecodeError as error:
        raise _bad(path, f"expected UTF-8 text: {error}") from error
    if not lines or not _FIRST.fullmatch(lines[0].strip()):
        got = lines[0][:60] if lines else ""
        raise _bad(path, f"line 1: expected TRT-<version>-<calibrator>, got {got!r}")
    scales: dict[str, float] = {}
    for number, line in enumerate(lines[1:], 2):
        if line.strip():
            name, scale = _entry(path, number, line)
            if scales.setdefault(name, scale) != scale:
                raise _bad(path, f"line {number}: {name!r} has another scale before")
    return scales


def _entry(path: str | os.PathLike[str], number: int, line: str) -> tuple[str, float]:
    match = _LINE.fullmatch(line.rstrip())
    if match is None:
        raise _bad(path, f"line {number}: expected NAME: <8 hexadecimal digits>, got {line[:60]!r}")
    (scale,) = struct.unpack(">f", bytes.fromhex(match["bits"].zfill(8)))
    if not (math.isfinite(scale) and scale >= 0):
        raise _bad(path, f"line {number}: expected a scale of 0 or more, got {scale}")
    return match["name"], scale


def ranges_of(
    scales: Mapping[str, float], activation: Activation, path: str | os.PathLike[str]
) -> dict[str, Range]:
    """The ranges whose scales `affine` makes these again, bit for bit.

    Raises:
        InputError: activations are not to be symmetric.
    """
    if activation != "int8":
        raise InputError(
            f"{path} holds symmetric scales, for int8 activations",
            [f"expected activation int8, got {activation}"],
            "choose int8, or calibrate on data",
        )
    return {name: Range(-127 * scale, 127 * scale) for name, scale in scales.items()}


def scales_of(model: ir.Model) -> dict[str, float]:
    """The scale of each tensor that a quantized model rounds.

    Args:
        model: with Q/DQ pairs, as `quantize` makes it.

    Returns:
        Tensor -> scale, a float32 number, in the order of the graph.

    Raises:
        InputError: a zero point is not 0 of int8, which a table cannot say; or no tensor is
            rounded.
    """
    scales: dict[str, float] = {}
    skewed = []
    for node in model.graph:
        value, scale = operand(node, 0), constant(operand(node, 1))
        if not is_standard(node, "QuantizeLinear") or value is None or scale is None:
            continue
        if constant(value) is not None or scale.size != 1:
            continue
        point = constant(operand(node, 2))
        if point is None or point.dtype != "int8" or point.any():
            skewed.append(str(value.name))
        scales[str(value.name)] = float(scale.reshape(()))
    if skewed:
        raise InputError(
            f"no calibration table can hold the scales of {len(skewed)} tensors",
            [f"expected int8 with zero point 0; others: {', '.join(skewed[:8])}"],
            "quantize with int8 activations",
        )
    if not scales:
        raise InputError("the model rounds no tensor", [], "quantize it first")
    return scales


def write_table(
    path: str | os.PathLike[str],
    scales: Mapping[str, float],
    calibrator: str = "EntropyCalibration2",
) -> None:
    """Writes a table.

    Args:
        path: of the file; replaced whole.
        scales: tensor -> scale.
        calibrator: which TensorRT shall take it for: `EntropyCalibration2` or `MinMaxCalibration`.

    Raises:
        InputError: a name cannot stand in a line, a scale is not that of a table, or the file
            cannot be written.
    """
    lines = [HEADER.format(calibrator)]
    for name, scale in scales.items():
        if not name or len(name.splitlines()) != 1 or name != name.strip():
            raise InputError(
                f"the tensor name {name!r} cannot stand in a calibration table",
                ["expected one line without blanks around it"],
                "rename the tensor",
            )
        if not (math.isfinite(scale) and scale >= 0):
            raise InputError(f"the scale of {name!r} is {scale}", ["expected 0 or more"])
        lines.append(f"{name}: {struct.pack('>f', scale).hex()}")
    try:
        write_whole(path, ("\n".join(lines) + "\n").encode())
    except OSError as error:
        raise InputError(
            f"cannot write {path}", [str(error)], "name a file in an existing folder"
        ) from error


def _bad(path: str | os.PathLike[str], reason: str) -> InputError:
    return InputError(
        f"{path} is no calibration table of TensorRT, or a damaged one",
        [reason],
        "write it with TensorRT or twofour quantize",
    )
