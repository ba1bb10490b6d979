"""TensorRT's calibration table: read, written, and refused where it is not one."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.onnx_tools.networks import option_a, samples
from twofour.core.errors import InputError
from twofour.core.ranges import Range, affine
from twofour.onnx_tools.calibrate import calibrate_with_report
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize, quantize_with_report
from twofour.onnx_tools.tensorrt_table import (
    is_table,
    ranges_of,
    read_table,
    scales_of,
    write_table,
)

NAMES = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1).filter(
    lambda name: name == name.strip() and len(name.splitlines()) == 1
)
SCALES = st.floats(0, 2.0**100, width=32)
MINMAX = QuantizeOptions(method="minmax", threads=1)


def refused(*parts: str) -> Any:
    return pytest.raises(InputError, match="(?s)" + ".*".join(parts))


@settings(deadline=None)
@given(st.dictionaries(NAMES, SCALES, max_size=6))
def test_written_then_read_are_the_same_scales(scales: dict[str, float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.cache"
        write_table(path, scales)
        assert read_table(path) == scales
        assert list(read_table(path)) == list(scales)


@settings(deadline=None)
@given(st.floats(2.0**-119, 2.0**100, width=32))
def test_the_range_of_a_scale_makes_that_scale_again(scale: float) -> None:
    assert affine(ranges_of({"x": scale}, "int8", "")["x"], "int8").scale == scale


def test_a_table_as_tensorrt_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "t.cache"
    path.write_text(
        "TRT-8205-EntropyCalibration2\ninput: 3c010a14\n(Unnamed Layer* 3) [Constant]_output: "
        "3f800000\na: b: 0\n"
    )
    assert is_table(path)
    assert read_table(path) == {
        "input": float(np.frombuffer(bytes.fromhex("3c010a14"), ">f4")[0]),
        "(Unnamed Layer* 3) [Constant]_output": 1.0,
        "a: b": 0.0,
    }


def test_the_text_of_a_table(tmp_path: Path) -> None:
    write_table(tmp_path / "t.cache", {"x": 1.0, "y/z:0": 2.0**-7}, "MinMaxCalibration")
    text = "TRT-8601-MinMaxCalibration\nx: 3f800000\ny/z:0: 3c000000\n"
    assert (tmp_path / "t.cache").read_text() == text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "line 1: expected TRT-"),
        (b"x: 3f800000\n", "line 1: expected TRT-"),
        (b"TRT-8601-EntropyCalibration2\nx 3f800000\n", "line 2: expected NAME: "),
        (b"TRT-8601-EntropyCalibration2\nx: 3f8000000\n", "line 2: expected NAME: "),
        (b"TRT-8601-EntropyCalibration2\nx: 7fc00000\n", "line 2: expected a scale of 0 or more"),
        (b"TRT-8601-EntropyCalibration2\n\nx: 7f800000\n", "line 3: expected a scale of 0"),
        (b"TRT-8601-EntropyCalibration2\nx: bf800000\n", "line 2: expected a scale of 0"),
        (b"TRT-8601-EntropyCalibration2\nx: 3f8\nx: 3f9\n", "line 3: 'x' has another scale"),
        (b"TRT-8601-EntropyCalibration2\n\xff: 3f8\n", "expected UTF-8"),
        (b"TRT-8601-EntropyCalibration2\n" + b"\0" * (1 << 26), "expected at most"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "t.cache").write_bytes(content)
    with refused("no calibration table of TensorRT", reason):
        read_table(tmp_path / "t.cache")


@pytest.mark.parametrize("name", ["", " x", "a\nb", "a\u2028b", "a\r"])
def test_names_that_no_line_can_hold(tmp_path: Path, name: str) -> None:
    with refused("cannot stand in a calibration table"):
        write_table(tmp_path / "t.cache", {name: 1.0})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", [-1.0, np.nan, np.inf])
def test_scales_that_are_none(tmp_path: Path, scale: float) -> None:
    with refused("expected 0 or more"):
        write_table(tmp_path / "t.cache", {"x": scale})


def test_a_quantized_model_gives_the_table_that_quantizes_it_again(tmp_path: Path) -> None:
    symmetric = replace(MINMAX, activation="int8")
    first = quantize_with_report(option_a(), {"x": samples()}, symmetric)
    scales = scales_of(first.model)
    assert scales["x"] == first.schemes["x"].scale
    assert set(scales) == set(first.schemes)
    table = tmp_path / "t.cache"
    write_table(table, scales)
    again = quantize_with_report(option_a(), None, MINMAX, None, table)  # its type is the table's
    assert again.options == symmetric
    assert again.schemes == first.schemes
    assert scales_of(again.model) == scales
    assert "TensorRT's table" in again.calibration
    assert "nothing was run" in again.calibration


def test_tensors_that_a_table_does_not_have(tmp_path: Path) -> None:
    table, x = tmp_path / "t.cache", samples()
    write_table(table, {"x": 0.5, "elsewhere": 1.0})
    with refused("does not have the ranges of 2 tensors", "missing: r1, y", "of the ONNX file"):
        calibrate_with_report(option_a(), ["x", "r1", "y"], None, MINMAX, None, table)
    found = calibrate_with_report(option_a(), ["x", "r1", "y"], {"x": x}, MINMAX, None, table)
    assert found.ranges["x"] == Range(-63.5, 63.5)
    symmetric = replace(MINMAX, activation="int8")
    alone = calibrate_with_report(option_a(), ["r1", "y"], {"x": x}, symmetric)
    assert {name: found.ranges[name] for name in ("r1", "y")} == alone.ranges
    assert list(found.ranges) == ["x", "r1", "y"]
    assert "those of 2 others from the data" in found.note


def test_asymmetric_activations_have_no_table(tmp_path: Path) -> None:
    table = tmp_path / "t.cache"
    write_table(table, {"x": 0.5})
    options = QuantizeOptions(activation="uint8")
    with refused("symmetric scales", "expected activation int8, got uint8"):
        calibrate_with_report(option_a(), ["x"], None, options, None, table)
    with refused("no calibration table can hold the scales of", "int8 with zero point 0"):
        scales_of(quantize(option_a(), {"x": samples()}, options))
    with refused("rounds no tensor"):
        scales_of(option_a())
