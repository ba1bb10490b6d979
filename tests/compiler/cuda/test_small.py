"""Small operators through the compiler for GPUs, in the interpreter, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from tests.compiler.cuda.execute import run
from tests.compiler.engines import reference
from tests.compiler.test_native_nd import GROUPS, Group, feeds, model_of
from twofour.compiler.cuda.graphs import network_of
from twofour.compiler.cuda.types import Types

SLACK = 6e-6
"""Functions of a GPU, and sums in another order."""


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_equal_to_onnxruntime(group: Group) -> None:
    model = model_of(group)
    want = reference(model, feeds())
    network = network_of(model, {}, Types("float32"), forced=False, dump=None)
    got = run(network, feeds())
    for i, line in enumerate(group.lines):
        a, b = got[f"y{i}"], want[f"y{i}"]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), line
        if b.dtype.kind != "f":
            np.testing.assert_array_equal(a, b, line)
            continue
        size = np.abs(b[np.isfinite(b)]).max(initial=1.0)
        assert np.allclose(a, b, rtol=SLACK, atol=SLACK * size, equal_nan=True), line
