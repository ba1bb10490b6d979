"""How much each weight matters: the energy that a mask keeps as much of as it can.

Each criterion is one line of operators, so it takes numpy arrays and torch tensors alike and gives
back what it was given, in its precision. Convert half precision to float32 first: the square of a
float16 below 2e-4 is nothing.

An energy is not negative, and its unit does not matter: masks compare energies within a group.
"""

from __future__ import annotations

from typing import Any, TypeVar

Values = TypeVar("Values", bound=Any)


def magnitude(w: Values) -> Values:
    """w^2: what the weight adds to the norm of its layer.

    Args:
        w: float [N, C, ...], array or tensor.

    Returns:
        The energy of each weight, the shape and precision of `w`.

    Source: Mishra et al. 2021, arXiv:2104.08378, section 4.
    """
    energy: Values = w * w
    return energy


def wanda(w: Values, squares: Values) -> Values:
    """w^2 * sum(x^2): what the weight adds to the layer's outputs, on the inputs x it has seen.

    The square of the paper's |w| * norm(x), so it ranks alike; a sum over a pair or a tile is then
    the change of the outputs' squares, as far as inputs do not depend on each other.

    Args:
        w: float [N, C, ...], array or tensor.
        squares: sum over all samples of the square of each weight's input, broadcast to `w`:
            [C] as [1, C] of a Gemm, one value for each channel and tap as [1, C, kh, kw] of a Conv.

    Returns:
        The energy of each weight, the shape of `w`.

    Source: Sun et al. 2023, arXiv:2306.11695, eq. 1.
    """
    energy: Values = w * w * squares
    return energy


def taylor(w: Values, grad: Values) -> Values:
    """(w * grad)^2: how far the loss moves, to first order, when the weight becomes zero.

    Args:
        w: float [N, C, ...], array or tensor.
        grad: of the loss by `w`, its shape.

    Returns:
        The energy of each weight, the shape of `w`.

    Source: Molchanov et al. 2019, arXiv:1906.10771, the first-order criterion.
    """
    moved: Values = w * grad
    return magnitude(moved)
