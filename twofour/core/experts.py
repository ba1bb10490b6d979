"""The definition of routed experts and of a masked MLP: in numpy, and as ONNX functions.

    mixture   of E experts, each token runs the k that its router gives the highest logits:
              y = sum over the chosen of gate * mlp(x; expert)
    masked    tokens whose mask is set run the one MLP there is, the others give zeros

where mlp(x) = W2 activation(W1 x + b1) + b2. SwiGlu takes two halves, a and b, of twice as many
channels: silu(a) * b. Of equal logits the expert with the lower index comes
first. Gates are the softmax of the chosen logits (`normalize` = 1), or the chosen of the softmax of
all (0).

The numpy form computes what is chosen, in the order of the kernels: sums of integers and all that
is made of them are equal bit for bit. The ONNX form is for whoever has no such kernel: it computes
every expert for every token and multiplies most of it by zero.

With weights in int8, one scale an output channel, x and the activations of an expert are quantized
row by row while running (core/dynamic.py).

Source: Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2021, arXiv:2101.03961; SwiGlu: Shazeer
2020, arXiv:2002.05202.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.dynamic import ROW_ZERO, quantize_rows
from twofour.core.functions import Activation, exp, silu
from twofour.core.numerics import Epilogue, integer_matmul, requantize

Array = NDArray[Any]

DOMAIN = "twofour.plugins"
OPSET = 18
"""Of the functions' bodies."""
SWIGLU = "SwiGlu"
ACTIVATIONS = ("Relu", "Gelu", "GeluTanh", "Silu", SWIGLU)
"""What an expert may have between its products: the end of its operator's name."""
MIXTURE, MASKED = "MixtureOfExperts", "MaskedMlp"
FLOAT_WEIGHTS = ("w1", "b1", "w2", "b2")
INTEGER_WEIGHTS = ("w1", "w1_scale", "b1", "w2", "w2_scale", "b2")


@dataclass(frozen=True)
class Experts:
    """The weights of E experts.

    Attributes:
        w1: [E, inner, hidden], float32 or int8; twice as many rows for SwiGlu.
        b1: float32 [E, rows of w1].
        w2: [E, hidden, inner], of the same type.
        b2: float32 [E, hidden].
        activation: a name of ACTIVATIONS.
        w1_scale: float32 [E, rows of w1] of int8; None of floats.
        w2_scale: float32 [E, hidden] of int8; None of floats.
    """

    w1: Array
    b1: Array
    w2: Array
    b2: Array
    activation: str
    w1_scale: Array | None = None
    w2_scale: Array | None = None

    def mlp(self, x: Array, expert: int) -> Array:
        """One expert on rows: float32 [rows, hidden] to the same."""
        gated = self.activation == SWIGLU
        inner = _product(
            x,
            self.w1[expert],
            self.b1[expert],
            _row(self.w1_scale, expert),
            "" if gated else self.activation,
        )
        if gated:
            a, b = np.split(inner, 2, axis=1)
            inner = silu(a) * b
        return _product(inner, self.w2[expert], self.b2[expert], _row(self.w2_scale, expert), "")


@dataclass(frozen=True)
class Routing:
    """Who computes what.

    Attributes:
        experts: int64 [tokens, k], highest logit first.
        gates: float32 [tokens, k].
    """

    experts: Array
    gates: Array


def route(logits: Array, k: int, *, normalize: bool) -> Routing:
    """The k experts of each token and the weights of their results.

    Args:
        logits: float32 [tokens, experts].
        k: experts a token, 1 ... experts.
        normalize: the gates of a token add up to 1.
    """
    logits = np.asarray(logits, np.float32)
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(logits, chosen, axis=1)
    parts = exp(values - values[:, :1])
    total = np.zeros(len(logits), np.float32)
    for part in (parts if normalize else exp(logits - values[:, :1])).T:
        total = total + part
    return Routing(chosen, parts / total[:, None])


def mixture(x: Array, logits: Array, experts: Experts, k: int, *, normalize: bool = True) -> Array:
    """Routed experts.

    Args:
        x: float32 [..., hidden].
        logits: float32 [..., experts], the router's.
        experts: their weights.
        k: experts a token.
        normalize: see `route`.

    Returns:
        float32, the shape of `x`; each token's experts are added highest logit first.
    """
    rows = np.asarray(x, np.float32).reshape(-1, x.shape[-1])
    routing = route(logits.reshape(len(rows), -1), k, normalize=normalize)
    y = np.zeros_like(rows)
    for choice in range(k):
        found = np.zeros_like(rows)
        for expert in np.unique(routing.experts[:, choice]):
            here = routing.experts[:, choice] == expert
            found[here] = experts.mlp(rows[here], int(expert))
        part = found * routing.gates[:, choice, None]
        y = part if choice == 0 else y + part
    return y.reshape(x.shape)


def masked(x: Array, mask: Array, experts: Experts) -> Array:
    """The MLP of the only expert, where `mask` is set; zeros elsewhere.

    Args:
        x: float32 [..., hidden].
        mask: bool [...].
        experts: one.

    Returns:
        float32, the shape of `x`.
    """
    rows = np.asarray(x, np.float32).reshape(-1, x.shape[-1])
    here, y = mask.reshape(-1), np.zeros_like(rows)
    y[here] = experts.mlp(rows[here], 0)
    return y.reshape(x.shape)


def _row(scale: Array | None, expert: int) -> Array | None:
    return None if scale is None else scale[expert]


def _product(x: Array, w: Array, bias: Array, scale: Array | None, activation: str) -> Array:
    """activation(x w.T + bias), with rows quantized if there is a scale."""
    kind = Activation(activation)
    if scale is None:
        sums: Array = (x.astype(np.float64) @ w.T.astype(np.float64)).astype(np.float32)
        return requantize(sums, Epilogue(np.ones_like(bias), bias, activation=kind))
    found = quantize_rows(x)
    acc = integer_matmul(found.bytes, w, ROW_ZERO)
    return requantize(acc, Epilogue(scale, bias, activation=kind), row_scale=found.scale)
