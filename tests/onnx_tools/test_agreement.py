"""How near the outputs of two models are."""

import math

import numpy as np
import pytest

from tests.graphs import graph
from tests.onnx_tools.networks import option_a, samples
from tests.onnx_tools.test_quantize import quantized
from twofour.core.errors import InputError
from twofour.onnx_tools.agreement import LEAST_COSINE, SAMPLES, agreement


def two_outputs(factor: float, shift: float = 0.0):
    return graph(
        f"""(float[n,3] x) => (float[n,3] y, float[n,3] z, int64[n,3] i) <float f = {{{factor}}},
        float s = {{{shift}}}> {{ y = Mul (x, f) m = Mul (x, f) z = Add (m, s)
        i = Cast <to = 7> (y) }}"""
    )


def test_equal_models():
    found = agreement(option_a(), option_a(), {"x": samples(40)}, 1)
    assert found.samples == SAMPLES
    (y,) = found.outputs
    assert (y.name, y.sqnr_db) == ("y", math.inf)
    assert y.cosine == pytest.approx(1)
    assert found.below(0.9999) == ()


def test_a_quantized_model():
    (y,) = agreement(option_a(), quantized(option_a()), {"x": samples()}, 1).outputs
    assert LEAST_COSINE < y.worst_cosine < y.cosine < 1
    assert 17 < y.sqnr_db < 60


def test_figures_by_hand():
    x = np.array([[3.0, 4.0, 0.0], [1.0, 0.0, 0.0]], np.float32)
    y, z = agreement(two_outputs(1), two_outputs(2, 1.0), {"x": x}, 1).outputs
    assert y.cosine == pytest.approx(1)
    assert y.sqnr_db == pytest.approx(0)  # the difference is the signal itself
    got = np.array([[7.0, 9.0, 1.0], [3.0, 1.0, 1.0]])
    cosines = (x * got).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(got, axis=1)
    assert z.cosine == pytest.approx(cosines.mean())
    assert z.worst_cosine == pytest.approx(cosines.min())
    assert z.sqnr_db == pytest.approx(10 * math.log10(26 / np.square(got - x).sum()))


def test_outputs_below_a_bound_worst_first():
    found = agreement(two_outputs(1), two_outputs(-1, 1.0), {"x": np.ones((3, 3), np.float32)}, 1)
    assert [each.name for each in found.below(0.99)] == ["y", "z"]
    assert found.outputs[0].cosine == pytest.approx(-1)
    assert found.outputs[1].cosine == 0  # of zeros with what is not


def test_what_is_not_finite_is_far():
    inf = two_outputs(3e38, 3e38)
    y, z = agreement(two_outputs(1), inf, {"x": np.full((2, 3), 9.0, np.float32)}, 1).outputs
    assert y.cosine == z.cosine == 0
    assert y.sqnr_db == -math.inf


def test_data_that_does_not_fit():
    with pytest.raises(InputError):
        agreement(option_a(), option_a(), {"x": samples(4, (4, 7, 8))}, 1)
