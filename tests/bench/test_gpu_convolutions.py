"""The table of convolutions on a GPU: what it would time, what it refuses, and its page."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks.cuda_convolutions import BATCHES, LAYERS, Case, Row, cases, check, page, problem_of
from benchmarks.document import about
from twofour.kernels.cuda.reference import conv_reference


def test_all_layers_have_their_ways() -> None:
    """Dense and 2:4 kernels each; staged ones where the window steps by one, of short products."""
    found = list(cases(90, BATCHES))
    assert len({case.name for case in found}) == len(found) > len(BATCHES) * len(LAYERS)
    for case in found[: len(LAYERS)]:
        offered = {way for way, recipes in case.recipes.items() if recipes}
        window = case.problem.window
        staged = window.stride == (1, 1) and (
            window.kernel == (3, 3) or case.problem.channels <= 512
        )
        also = {"dense staged", "2:4 staged"} if staged else set()
        assert offered == {"dense", "2:4"} | also, case.name


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_results_fill_their_type(dtype: str) -> None:
    """Neither all at the ends of int8 nor near zero: a wrong sum would be seen."""
    case = Case(problem_of(dtype, 1, LAYERS[3]), 90)
    p, held = case.problem, case.recipes["2:4"][0].constants
    x = np.maximum(np.random.default_rng(0).integers(-100, 100, (1, 28, 28, 128)), 0)
    values = x if dtype == "int8" else (x / 64).astype(np.float32)
    given = {"scale": held["scale"], "bias": held["bias"], "w": case.weight, "x": values}
    y = conv_reference(p, given)
    assert (y == 127).mean() < 0.05
    assert y.std() > 10
    assert 0.01 < (y <= 0).mean() < 0.7


def test_wrong_results_end_it() -> None:
    right = torch.tensor([100, -50, 3], dtype=torch.int8)
    check("a", "int8", right + 1, right)
    with pytest.raises(SystemExit, match="a: its results are 2 away"):
        check("a", "int8", right + 2, right)
    real = torch.tensor([100.0, 1.0])
    check("b", "float16", real + 1, real)
    with pytest.raises(SystemExit, match="b: its results are 3 away"):
        check("b", "float16", real + 3, real)
    with pytest.raises(SystemExit, match="nan away"):
        check("b", "float16", real * float("nan"), real)


def test_the_page() -> None:
    """Each type and batch has a table, the largest batch of int8 the first one."""
    staged = {"dense": 30.0, "dense staged": 20.0, "2:4 staged": 16.0}
    rows = [
        Row("int8, batch 2, a, 1x1", {"dense": 30.0, "2:4": 40.0}, {"2:4": "v"}, None),
        Row("int8, batch 32, a, 1x1", {"dense": 30.0, "2:4": 20.0, "2:4 staged": 15.0}, {}, 60.0),
        Row("float16, batch 32, b", {"dense": 30.0}, {}, None),
        Row("int8, batch 32, d", staged, {"2:4 staged": "u"}, 50.0),
    ]
    rows[1].configs["2:4 staged"] = "w"
    document = about("Convolutions", "cuda_convolutions", ["--only", "int8"], ["a GPU"], ["numpy"])
    text = page(document, rows)
    assert "python -m benchmarks.cuda_convolutions --only int8" in text
    lines = [line for line in text.splitlines() if line.startswith("| ") or "batch" in line]
    header = "| layer | dense | dense staged | 2:4 | 2:4 staged | gain | cuDNN, float16 |"
    assert lines[lines.index("int8, batch 32:") :] == [
        "int8, batch 32:",
        header,
        "| a, 1x1 | 30.0 |  | 20.0 | 15.0 | 2.00 | 60.0 |",
        "| d | 30.0 | 20.0 |  | 16.0 | 1.25 | 50.0 |",
        "int8, batch 2:",
        header,
        "| a, 1x1 | 30.0 |  | 40.0 |  | 0.75 |  |",
        "float16, batch 32:",
        header,
        "| b | 30.0 |  |  |  |  |  |",
        "| the fastest 2:4 kernel of | |",
        "| int8, batch 2, a, 1x1 | v |",
        "| int8, batch 32, a, 1x1 | w |",
        "| int8, batch 32, d | u |",
    ]


def test_it_says_that_there_is_no_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cuda_convolutions"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "there is no GPU here" in done.stderr
