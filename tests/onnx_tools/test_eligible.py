"""Which layers stay float, and why."""

from __future__ import annotations

import numpy as np

from tests.graphs import graph
from twofour.onnx_tools.eligible import float_layers

TEXT = """(float[1,16,4,9] x) => (float[n,c,h,w] y) {
    s = Softmax <axis = 1> (x) y = Conv (s, w) }"""


def test_the_expectation_of_a_softmax_stays_float() -> None:
    bins = np.arange(16, dtype=np.float32).reshape(1, 16, 1, 1)
    (layer,) = float_layers(graph(TEXT, w=bins))
    assert "expectation of a softmax" in layer.reason


def test_a_convolution_with_several_results_behind_a_softmax_is_quantized() -> None:
    weights = np.ones((2, 16, 1, 1), np.float32)
    assert float_layers(graph(TEXT, w=weights)) == ()
