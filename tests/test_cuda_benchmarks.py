"""Benchmarks of GPUs, as far as they can be checked without one: what they compile and write."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'twofour[cuda]'")

from benchmarks import cuda_kernels
from benchmarks.cuda import roof
from benchmarks.cuda.own_products import random_records, weight_bytes
from benchmarks.cuda.products import Cell, Layer, random_bits
from benchmarks.document import about, write
from benchmarks.update_readme import section
from twofour.core.float8 import to_fp8
from twofour.kernels.cuda.conv_sparse import compressed_weight, pack
from twofour.kernels.cuda.conv_sparse_tiles import Tile
from twofour.kernels.cuda.nvrtc import cubin_of
from twofour.kernels.cuda.problem import ConvProblem, View
from twofour.kernels.cuda.sparse_fragments import record_bytes

SQUARE = Layer("square", "4096", 4096, 4096, 4096)


@pytest.mark.parametrize("kind", sorted(roof.KINDS))
@pytest.mark.parametrize("sparse", [False, True])
def test_the_roof_is_compiled_for_hopper(kind: str, sparse: bool) -> None:
    name = "wgmma.mma_async.sp" if sparse else "wgmma.mma_async.sync"
    assert name in roof.text(kind, sparse=sparse)
    assert cubin_of(roof.text(kind, sparse=sparse), roof.HOPPER)[:4] == b"\x7fELF"


@pytest.mark.parametrize("dtype", ["int8", "float16", "float8e4m3fn"])
def test_random_records_are_as_long_as_packed_ones(dtype: str) -> None:
    values = random_bits(dtype, sparse=False)
    n, k = 48, 200
    ends = [View.dense(kind, 1, 1, c) for kind, c in ((dtype, k), ("bfloat16", n))]
    problem = ConvProblem(64, 1, 1, k, n, *ends, pattern="2:4")
    w = np.tile(np.float32([3, 0, 0, -1]), n * k // 4).reshape(n, k, 1, 1)
    packed = pack(compressed_weight(problem, w), Tile(256, 128, 256, 4, wgmma=True))
    assert packed.shape[-1] == random_records(values).shape[-1]
    assert packed.shape[-1] == record_bytes(values.dtype.itemsize)
    assert packed.nbytes <= weight_bytes(n, k, dtype)


def test_random_metadata_names_two_places_of_each_four_in_order() -> None:
    records = random_records(to_fp8(np.ones(4, np.float32)))
    nibbles = np.unique(np.concatenate([records[:, 1024:] & 15, records[:, 1024:] >> 4]))
    assert all(nibble % 4 < nibble // 4 for nibble in nibbles.tolist())
    assert nibbles.size == 6


def test_a_page_shows_all_that_was_measured_and_what_was_not(tmp_path: Path) -> None:
    tiles = {"256x128": 44.0, "128x256": 39.0}
    measured = Cell(SQUARE, "INT8", 80.0, 50.0, 40.0, own="128x256", own_tiles=tiles)
    failed = Cell(SQUARE, "fp16", problem="it broke")
    document = about(cuda_kernels.TITLE, cuda_kernels.NAME, ["--sizes", "4096"], ["a GPU"], ())
    document |= {"time_s": 3, "cells": [measured.to_json(), failed.to_json()]}
    roofs = [roof.Roof("INT8", 1800.0, 2700.0)]
    page = cuda_kernels.report(document, [measured, failed], roofs)
    write(tmp_path, cuda_kernels.NAME, document, page)
    assert "80.0 / 50.0, **1.60x**" in page
    assert "40.0, **2.00x**" in page
    assert "- 4096, INT8: 128x256 39.0; 256x128 44.0\n" in page
    assert "| INT8 | 1800 | 2700 | 1.50x |" in page
    assert "it broke" in page
    held = json.loads((tmp_path / "cuda_kernels.json").read_text())
    assert held["cells"][1]["dense_us"] is None
    assert math.isclose(held["cells"][0]["own_us"], 40.0)
    shown = section(tmp_path / "cuda_kernels.json")
    assert "80.0 / 50.0" in shown
    assert "python -m benchmarks.cuda_kernels --sizes 4096" in shown


def test_tables_are_joined_and_what_was_not_reached_replaces_nothing(tmp_path: Path) -> None:
    other = Layer("square", "8192", 8192, 8192, 8192)
    tables = {
        "old": [Cell(SQUARE, "INT8", 80.0, 60.0), Cell(SQUARE, "fp16", 150.0, 120.0)],
        "new": [
            Cell(SQUARE, "INT8", 80.0, 50.0),
            Cell(SQUARE, "fp16", problem="the time was over"),
            Cell(other, "INT8", 640.0, 400.0),
        ],
    }
    document = about(cuda_kernels.TITLE, cuda_kernels.NAME, [], ["a GPU"], ()) | {"time_s": 3}
    for name, cells in tables.items():
        held = document | {"cells": [each.to_json() for each in cells]}
        (tmp_path / name).write_text(json.dumps(held))
        assert cuda_kernels.add(tmp_path / "made", tmp_path / name) == 0
    page = (tmp_path / "made" / "cuda_kernels.md").read_text()
    assert "| 4096 | 80.0 / 50.0, **1.60x** | 150.0 / 120.0, **1.25x** |" in page
    assert "640.0 / 400.0" in page
    assert "Measured in 6 s" in page
