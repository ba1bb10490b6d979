"""The table of norms, attention and experts on a GPU: what it would time, and its page."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.cuda_rows import Row, attentions, layers_of_experts, norms, page, sparse_attentions
from benchmarks.document import about


@pytest.mark.parametrize("make", [norms, attentions, sparse_attentions, layers_of_experts])
def test_there_are_kernels_of_ours(make) -> None:
    case = next(make(90))
    assert case.recipes
    assert case.theirs is not None


def test_the_page() -> None:
    rows = [
        Row("Attention", "a", 10.0, 25.0, 3.0, "64x64"),
        Row("Experts", "b", 4.0, None, None, ""),
    ]
    document = about("Kernels", "cuda_rows", ["--effort", "1"], ["a GPU"], ["numpy"])
    text = page(document, rows)
    assert "python -m benchmarks.cuda_rows --effort 1" in text
    assert "Run on: a GPU." in text
    assert "| Attention | a | 10.0 | 25.0 | 2.50 | 3 | 64x64 |" in text
    assert "| Experts | b | 4.0 |  |  |  |  |" in text


def test_it_says_that_there_is_no_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cuda_rows"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "there is no GPU here" in done.stderr
