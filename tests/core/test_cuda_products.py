"""Settings of library calls: what is written is read again, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from twofour.core.cuda_products import (
    CUBLASLT,
    CUSPARSELT,
    WORKSPACE,
    Product,
    algorithm_bytes,
    algorithm_numbers,
    read_product,
)
from twofour.core.errors import EngineError

INT8 = Product(m=32, n=64, k=128, x="int8", y="int8", x_row=128, y_row=64)
FULL = replace(
    INT8,
    y_row=96,
    r_row=96,
    beta=0.5,
    by_channel=True,
    r_by_channel=True,
    bias="float32",
    activation="Relu",
    upper=6.0,
    workspace_bytes=4096,
    algorithm="3/-1/0/0",
    version=800,
)
FP8 = replace(INT8, x="float8e4m3fn", y="float8e4m3fn", scaled_result=True, bias="bfloat16")


def test_settings_are_read_as_they_were_written() -> None:
    assert read_product(FULL.to_json(), CUSPARSELT) == FULL
    assert read_product(FP8.to_json(), CUBLASLT) == FP8


def test_operands_come_in_one_order_with_the_bytes_that_are_touched() -> None:
    assert INT8.roles == ("w", "x", "y")
    assert FULL.roles == ("w", "x", "r", "scale", "r_scale", "bias", "y", "workspace")
    rows = 31 * 96 + 64
    assert FULL.sizes(5000) == (5000, 32 * 128, rows, 256, 256, 256, rows, 4096)
    by_row = replace(FP8, by_channel=True, by_row=True)
    assert by_row.roles == ("w", "x", "scale", "row_scale", "bias", "y_scale", "y")
    assert by_row.sizes(64 * 128) == (8192, 4096, 256, 128, 128, 4, 2048)


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"m": 0}, CUBLASLT, "m is 0"),
    ({"n": 2**31}, CUBLASLT, "n is 2147483648"),
    ({"k": -4}, CUBLASLT, "k is -4"),
    ({"m": 2**30, "y_row": 2**30}, CUBLASLT, "an operand has"),
    ({"x": "float64"}, CUBLASLT, "no product of float64"),
    ({"y": "float16"}, CUBLASLT, "no product of int8 gives float16"),
    ({"x_row": 64}, CUBLASLT, "rows overlap"),
    ({"y_row": 32}, CUBLASLT, "rows overlap"),
    ({"r_row": 64}, CUBLASLT, "r_row is 64 where beta is 0"),
    ({"beta": 1.0}, CUBLASLT, "r_row is 0 where beta is 1"),
    ({"beta": 1.0, "r_row": 32}, CUBLASLT, "r_row is 32"),
    ({"alpha": 1e31}, CUBLASLT, "alpha is 1e+31"),
    ({"activation": "Tanh"}, CUBLASLT, "no activation 'Tanh'"),
    ({"activation": "GeluTanh"}, CUSPARSELT, "no activation 'GeluTanh' of cusparselt"),
    ({"activation": "Relu", "upper": 6.0}, CUBLASLT, "upper is 6.0"),
    ({"upper": 6.0}, CUSPARSELT, "upper is 6.0"),
    ({"bias": "text"}, CUBLASLT, "no type 'text'"),
    ({"by_row": True}, CUBLASLT, "row_scale is for fp8"),
    ({"x": "float16", "y": "float16", "by_channel": True}, CUBLASLT, "scale is for int8"),
    ({"r_by_channel": True}, CUSPARSELT, "r_scale is for cuSPARSELt"),
    ({"by_channel": True, "beta": 1.0, "r_row": 64}, CUSPARSELT, "r_scale is for cuSPARSELt"),
    ({"scaled_result": True}, CUBLASLT, "y_scale is for an fp8 y"),
    ({"y": "int32", "bias": "float32"}, CUBLASLT, "sums of int32"),
    ({"workspace_bytes": WORKSPACE[CUBLASLT] + 1}, CUBLASLT, "workspace_bytes is"),
    ({"workspace_bytes": -1}, CUBLASLT, "workspace_bytes is -1"),
    ({"algorithm": "00" * 64}, CUBLASLT, "without the version"),
    ({"algorithm": "00" * 63, "version": 1}, CUBLASLT, "expected 64 bytes, got 63"),
    ({"algorithm": "0g" * 64, "version": 1}, CUBLASLT, "algorithm is"),
    ({"algorithm": "1/2", "version": 1}, CUSPARSELT, "expected id"),
    ({"algorithm": "-1", "version": 1}, CUSPARSELT, "expected no more than"),
    ({"algorithm": "1/4096/0/0", "version": 1}, CUSPARSELT, "expected no more than"),
    ({"version": -1}, CUBLASLT, "version is -1"),
    ({"n": 48}, CUSPARSELT, "n is 48; expected a multiple of 32"),
    ({"k": 120}, CUSPARSELT, "k is 120; expected a multiple of 32"),
    ({"m": 24}, CUSPARSELT, "m is 24; expected a multiple of 16"),
    ({"x_row": 136}, CUSPARSELT, "x_row is 136; expected a multiple of 16"),
    ({"beta": 1.0, "r_row": 96}, CUSPARSELT, "r_row is 96; expected that of y"),
]


@pytest.mark.parametrize(("changes", "library", "message"), WRONG)
def test_what_cannot_be_is_refused(changes: dict[str, Any], library: str, message: str) -> None:
    with pytest.raises(EngineError, match="settings of a call") as refused:
        read_product(replace(INT8, **changes).to_json(), library)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    ["", "[]", "{", '{"m": 1}', "[" * 4000, "x" * 5000, json.dumps({"m": "1"}), '{"m": NaN}'],
)
def test_what_is_no_product_is_refused(settings: str) -> None:
    with pytest.raises(EngineError, match="malformed"):
        read_product(settings, CUBLASLT)


def test_algorithms_are_read() -> None:
    assert algorithm_numbers(INT8) == ()
    assert algorithm_numbers(replace(INT8, algorithm="7")) == (7,)
    assert algorithm_numbers(FULL) == (3, -1, 0, 0)
    assert algorithm_bytes(replace(INT8, algorithm="0a" * 64)) == b"\n" * 64
