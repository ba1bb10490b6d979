"""Routed experts and the masked MLP as PyTorch modules: core/experts.py has the definition.

Only what is chosen is computed, in training as well. The experts are made of `nn.Linear`, so that
all that prunes linear layers prunes them. `export_onnx` writes each module as one node with the
function that says what it means.

Source: Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2021, arXiv:2101.03961.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twofour.core.errors import InputError
from twofour.core.experts import DOMAIN, MASKED, MIXTURE, SWIGLU
from twofour.core.experts_text import name_of


class SwiGlu(nn.Module):
    """silu(a) * b, where a and b are the halves of the input's channels: [..., 2 n] to [..., n].

    Source: Shazeer 2020, arXiv:2002.05202.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        a, b = x.chunk(2, dim=-1)
        return F.silu(a) * b


ACTIVATIONS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "relu": ("Relu", nn.ReLU),
    "gelu": ("Gelu", nn.GELU),
    "gelu_tanh": ("GeluTanh", lambda: nn.GELU("tanh")),
    "silu": ("Silu", nn.SiLU),
    "swiglu": (SWIGLU, SwiGlu),
}
"""What may stand between the products of an expert."""
COUNT = "experts"
"""Attribute of an exported node until its weights are stacked: how many experts; 0 for an MLP."""


class Router(nn.Linear):
    """Says which experts a token prefers. It is never pruned: little work, and all depends on it.

    Args:
        hidden: channels of a token.
        experts: how many.
    """

    def __init__(self, hidden: int, experts: int) -> None:
        """As the class says."""
        super().__init__(hidden, experts, bias=False)


class Mlp(nn.Module):
    """Two linear layers, W2 activation(W1 x + b1) + b2: an expert.

    With "swiglu" the first one has twice as many outputs: what goes through silu, then what that is
    multiplied by.

    Args:
        hidden: channels of inputs and outputs.
        inner: channels between the layers.
        activation: a key of ACTIVATIONS.

    Raises:
        InputError: no such activation.
    """

    def __init__(self, hidden: int, inner: int, activation: str = "gelu") -> None:
        """As the class says."""
        super().__init__()
        if activation not in ACTIVATIONS:
            raise InputError(
                f"no activation {activation!r}", [f"expected one of {', '.join(ACTIVATIONS)}"]
            )
        self.operator, make = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(hidden, 2 * inner if self.operator == SWIGLU else inner)
        self.activation = make()
        self.fc2 = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same."""
        y: Tensor = self.fc2(self.activation(self.fc1(x)))
        return y


class MixtureOfExperts(nn.Module):
    """Experts of which every token runs the k that a linear router prefers.

        moe = MixtureOfExperts(768, 3072, experts=8, k=2)
        y = moe(x)
        loss = task_loss(y) + 0.01 * balance_loss(moe.logits(x), moe.k)

    Args:
        hidden: channels of inputs and outputs.
        inner: channels within an expert.
        experts: how many.
        k: experts a token, 1 ... experts.
        activation: a key of ACTIVATIONS.
        normalize: gates are the softmax of the chosen logits and add up to 1; else they are the
            chosen ones of the softmax of all.

    Raises:
        InputError: k is out of range, or there is no such activation.
    """

    def __init__(
        self,
        hidden: int,
        inner: int,
        experts: int,
        k: int = 2,
        *,
        activation: str = "gelu",
        normalize: bool = True,
    ) -> None:
        """As the class says."""
        super().__init__()
        if not 1 <= k <= experts:
            raise InputError(f"cannot choose {k} of {experts} experts", ["expected 1 <= k <= all"])
        self.k, self.normalize = k, normalize
        self.router = Router(hidden, experts)
        self.experts = nn.ModuleList(Mlp(hidden, inner, activation) for _ in range(experts))

    def logits(self, x: Tensor) -> Tensor:
        """What the router says: [..., hidden] to [..., experts]."""
        found: Tensor = self.router(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same."""
        logits = self.logits(x)
        if torch.onnx.is_in_onnx_export():
            return self._node(x, logits)
        rows = x.reshape(-1, x.shape[-1])
        experts, gates = route(logits.reshape(len(rows), -1), self.k, normalize=self.normalize)
        y = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            tokens, choices = (experts == index).nonzero(as_tuple=True)
            if len(tokens):
                found = expert(rows[tokens]) * gates[tokens, choices, None]
                y = y.index_add(0, tokens, found.to(y.dtype))
        return y.reshape(x.shape)

    def _node(self, x: Tensor, logits: Tensor) -> Tensor:
        """The exported node: its weights one expert after the other, see export_functions.py."""
        mlps = [mlp for mlp in self.experts if isinstance(mlp, Mlp)]
        weights = [
            value
            for layers in ([m.fc1 for m in mlps], [m.fc2 for m in mlps])
            for kind in ("weight", "bias")
            for value in (getattr(layer, kind) for layer in layers)
        ]
        attributes = {"k": self.k, "normalize": int(self.normalize), COUNT: len(mlps)}
        return _symbolic(MIXTURE, mlps[0], (x, logits, *weights), attributes)


class MaskedMlp(Mlp):
    """An MLP that runs for the tokens whose mask is set; the others give zeros.

    Args:
        hidden: channels of inputs and outputs.
        inner: channels between the layers.
        activation: a key of ACTIVATIONS.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[..., hidden] and bool [...] to [..., hidden]; without a mask all run."""
        if mask is None:
            return super().forward(x)
        if torch.onnx.is_in_onnx_export():
            weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
            return _symbolic(MASKED, self, (x, mask, *weights), {COUNT: 0})
        y = torch.zeros_like(x)
        found = super().forward(x[mask])
        return y.index_put((mask,), found.to(y.dtype))


def route(logits: Tensor, k: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """The k experts of each token, and their gates.

    Args:
        logits: [tokens, experts].
        k: experts a token.
        normalize: the gates of a token add up to 1.

    Returns:
        int64 and float [tokens, k], highest logit first; of equal ones the first.
    """
    top, experts = logits.sort(dim=-1, descending=True, stable=True)
    top, experts = top[:, :k], experts[:, :k]
    if normalize:
        return experts, top.softmax(-1)
    return experts, logits.softmax(-1).gather(-1, experts)


def balance_loss(logits: Tensor, k: int = 1) -> Tensor:
    """How unevenly tokens are spread: 1 where all experts get the same, up to their number.

    experts * sum over e of (share of the choices that are e) * (mean probability of e), of which
    the second has a gradient.

    Args:
        logits: [..., experts].
        k: experts a token.

    Source: Fedus et al. 2021, arXiv:2101.03961, equation 4.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    experts, _ = route(flat, k, normalize=True)
    counts = F.one_hot(experts, flat.shape[-1]).sum((0, 1)).to(flat.dtype)
    return flat.shape[-1] * (counts / counts.sum() * flat.softmax(-1).mean(0)).sum()


def _symbolic(
    base: str, mlp: Mlp, inputs: tuple[Tensor, ...], attributes: Mapping[str, int]
) -> Tensor:
    """A node of that operator in the exported graph."""
    x, name = inputs[0], name_of(base, mlp.operator, quantized=False)
    node: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, dict(attributes), dtype=x.dtype, shape=x.shape, version=1
    )
    return node
