"""Which weights of a PyTorch model can be pruned, and why others never are.

Pruned are the matrices that a runtime multiplies with: those of linear layers, of convolutions, and
of `nn.MultiheadAttention`, of these classes and of those derived from them. They have their output
channels on axis 0 and their input channels (of one group) on axis 1. All other matrices of a model
are listed with the reason why they stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from twofour.train.experts import Router

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Prunable = nn.Linear | Convolution  # and nn.MultiheadAttention, which has several weights
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# What torch.compile, activation checkpoints and FSDP put into the names of modules.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_NEVER = (
    (nn.Embedding | nn.EmbeddingBag, "an embedding is a table of rows, nothing is multiplied"),
    (
        nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d,
        "a transposed convolution has its input channels on axis 0",
    ),
    (nn.RNNBase | nn.RNNCellBase, "recurrent layers have no sparse kernels"),
)


@dataclass(frozen=True, eq=False)
class WeightRef:
    """A weight that can be pruned, and where it is in its model.

    Args:
        name: that of the module if the weight is its `weight` (`layer1.0.conv1`), else the
            parameter's (`attn.in_proj_weight`).
        module: that owns it, the first of those that share it.
        attribute: of the module.
        groups: of a convolution, else 1; the shape has the input channels of one group.
        shared: the other names it goes by, if several modules share it.
    """

    name: str
    module: nn.Module
    attribute: str = "weight"
    groups: int = 1
    shared: tuple[str, ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now: [N, C, ...]."""
        return self.module.get_parameter(self.attribute)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole weight, also where this process holds a part of it."""
        return tuple(self.parameter.shape)

    @property
    def mask_name(self) -> str:
        """Of the buffer, in the same module, that is the weight's mask."""
        return f"{self.attribute}_mask"

    @property
    def mask(self) -> Tensor | None:
        """bool, the weight's shape, True where it is kept; None if it was not pruned."""
        return self.module._buffers.get(self.mask_name)

    @property
    def names(self) -> tuple[str, ...]:
        """All names it goes by."""
        return (self.name, *self.shared)


@dataclass(frozen=True)
class NeverPruned:
    """A matrix that no Sparsifier prunes.

    Args:
        name: as of a `WeightRef`.
        shape: () if it is not known yet.
        reason: in words.
        shared: the other names it goes by.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    shared: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names it goes by."""
        return (self.name, *self.shared)


@dataclass(frozen=True, eq=False)
class _Owner:
    """One place where a matrix is used."""

    name: str
    module: nn.Module
    attribute: str
    value: Tensor
    reason: str | None


def find_weights(model: nn.Module) -> list[WeightRef]:
    """The weights that can be pruned, in the model's order; each shared one once.

    Args:
        model: also wrapped for data parallel training or compiled: names are those of the model
            inside.
    """
    return [entry for entry in survey(model) if isinstance(entry, WeightRef)]


def survey(model: nn.Module) -> list[WeightRef | NeverPruned]:
    """All matrices of a model, in its order.

    Args:
        model: as for `find_weights`.
    """
    owners: dict[int, list[_Owner]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for owner in _matrices(plain_name(path, model), module):
            owners.setdefault(id(owner.value), []).append(owner)
    return [_entry(sharing) for sharing in owners.values()]


def plain_name(path: str, model: nn.Module) -> str:
    """The name of a module or tensor in the model inside the wrappers.

    Data parallel wrappers, averaged models and such are told by having one child called `module`.

    Args:
        path: its name in `model`.
        model: the outermost one.
    """
    parts = path.split(".")
    while list(model._modules) in (["module"], ["_orig_mod"]) and parts[0] in model._modules:
        inner = model._modules[parts.pop(0)]
        if inner is None or not parts:
            break
        model = inner
    return ".".join(part for part in parts if part not in _WRAPPERS)


def _matrices(path: str, module: nn.Module) -> Iterator[_Owner]:
    """What a module itself owns, not its children."""
    if isinstance(module, parametrize.ParametrizationList):
        return  # belongs to the module whose weight it computes
    computed = False
    for attribute in _weights_of(module):
        value = getattr(module, attribute)
        computed = computed or module._parameters.get(attribute) is None
        never = _never(module, attribute, value)
        yield _Owner(_name(path, attribute), module, attribute, value, never)
    if computed or isinstance(module, nn.MultiheadAttention):
        return  # what else it owns makes its weight, or is a bias
    if type(module).__module__.startswith("torch.ao.nn.quantized"):
        packed = getattr(module, "weight", None)
        if callable(packed):
            yield _Owner(path, module, "weight", packed(), "it is quantized already")
        return
    for attribute, value in module._parameters.items():
        if attribute not in (*_weights_of(module), "bias") and value is not None:
            uninitialized = isinstance(value, nn.UninitializedParameter)
            if uninitialized or value.ndim >= 2:
                foreign = _foreign(module, attribute)
                yield _Owner(_name(path, attribute), module, attribute, value, foreign)


def _name(path: str, attribute: str) -> str:
    return path if path and attribute == "weight" else f"{path}.{attribute}".lstrip(".")


def _weights_of(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, Prunable):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        return tuple(name for name in _ATTENTION if getattr(module, name, None) is not None)
    return ()


def _never(module: nn.Module, attribute: str, value: Tensor) -> str | None:
    """Why a weight of a class that is pruned is not, or None."""
    if isinstance(module, Router):
        return "it decides which experts run"
    if parametrize.is_parametrized(module, attribute):
        return "a parametrization computes it: torch.nn.utils.parametrize.remove_parametrizations"
    if not isinstance(value, nn.Parameter):
        return "it is no parameter but computed from others: remove weight_norm or prune first"
    if isinstance(value, nn.UninitializedParameter):
        return "it has no shape yet: run one batch through the model first"
    if value.is_meta:
        return "it is on the meta device and has no values"
    if type(value.data) not in (Tensor, DTensor):
        return f"it is a {type(value.data).__name__}, not a plain tensor"
    if value.dtype not in DTYPES:
        return f"its dtype is {value.dtype}"
    mask = getattr(module, f"{attribute}_mask", None)
    if mask is not None and getattr(mask, "dtype", None) is not torch.bool:
        return f"its module has another {attribute}_mask, the name that its mask would have"
    return None


def _foreign(module: nn.Module, attribute: str) -> str:
    """Why a matrix that is not the weight of a class that is pruned is not."""
    for kinds, reason in _NEVER:
        if isinstance(module, kinds):
            return reason
    if isinstance(module, Prunable):
        return f"{attribute} is not the weight of its layer"
    return f"{type(module).__name__} is no linear layer, convolution or attention"


def _entry(sharing: list[_Owner]) -> WeightRef | NeverPruned:
    first = sharing[0]
    names = tuple(dict.fromkeys(owner.name for owner in sharing))
    for owner in sharing:
        if owner.reason is not None:
            reason = owner.reason
            if len(names) > 1:
                reason = f"shared by {' and '.join(names)}: {reason}"
            uninitialized = isinstance(first.value, nn.UninitializedParameter)
            shape = () if uninitialized else tuple(first.value.shape)
            return NeverPruned(names[0], shape, reason, names[1:])
    groups = first.module.groups if isinstance(first.module, Convolution) else 1
    return WeightRef(names[0], first.module, first.attribute, groups, names[1:])
