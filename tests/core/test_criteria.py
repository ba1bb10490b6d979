"""The criteria are what their papers say, for arrays."""

import numpy as np

from twofour.core import criteria

W = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, -4.0]], np.float32)


def test_magnitude_is_the_square():
    np.testing.assert_array_equal(criteria.magnitude(W), [[1, 4, 0.25], [0, 9, 16]])
    assert criteria.magnitude(W).dtype == np.float32


def test_wanda_is_what_the_outputs_lose_when_inputs_do_not_depend_on_each_other():
    x = np.diag([1.0, 2.0, 3.0])  # samples, features
    energy = criteria.wanda(W, (x * x).sum(axis=0)[None])
    for k, c in np.ndindex(W.shape):
        without = W.copy()
        without[k, c] = 0
        assert energy[k, c] == ((x @ W.T - x @ without.T) ** 2).sum()


def test_wanda_takes_one_value_for_each_channel_and_tap_of_a_convolution():
    w = np.arange(24.0).reshape(2, 3, 2, 2)
    squares = np.arange(12.0).reshape(1, 3, 2, 2)
    energy = criteria.wanda(w, squares)
    assert energy[1, 2, 0, 1] == w[1, 2, 0, 1] ** 2 * squares[0, 2, 0, 1]


def test_taylor_is_the_squared_first_order_change_of_the_loss():
    grad = np.array([[2.0, 1.0, -4.0], [5.0, 0.0, 0.5]], np.float32)
    np.testing.assert_array_equal(criteria.taylor(W, grad), [[4, 4, 4], [0, 0, 4]])
