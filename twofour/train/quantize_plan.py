"""How a model is to be fake-quantized, and what was decided: plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from twofour.core.ranges import (
    Activation,
    Method,
    Range,
    RangeOptions,
    refused,
    require_choice,
)
from twofour.train.watch import Place, Site

AddInputs = Literal["shortcut", "both"]


@dataclass(frozen=True)
class QuantizerOptions:
    """How a model is fake-quantized.

    Attributes:
        method: how an activation's range is chosen from what calibration saw, see `RangeOptions`.
        activation: `uint8` is asymmetric, `int8` symmetric, as TensorRT wants it.
        percentile: for the method of this name, the share of values inside the range, in percent.
        add_inputs: which inputs of a residual sum are quantized: `shortcut` is all but the output
            of the convolution before it; `both` that output too.
        attention: the products within attention are quantized too. Then
            `scaled_dot_product_attention` is computed as two products and a softmax, which takes
            the memory of its weights. On, as for ONNX files: an engine's attention works on bytes.
        include: patterns, as in `fnmatch`, of the names of layers that are quantized; () for all.
        exclude: patterns of names that stay float: of layers, of modules with all they contain, or
            of single functions (`layer1.0/add`).
        learned_scales: scales are trained like weights (LSQ).
    """

    method: Method = "mse"
    activation: Activation = "uint8"
    percentile: float = 99.99
    add_inputs: AddInputs = "shortcut"
    attention: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    learned_scales: bool = False

    def __post_init__(self) -> None:
        """Refuses values that mean nothing. Raises InputError."""
        RangeOptions(self.method, self.activation, self.percentile)
        require_choice("add_inputs", self.add_inputs, AddInputs)
        for name in ("include", "exclude"):
            if isinstance(given := getattr(self, name), str):
                raise refused(name, f"a tuple of name patterns, such as ({given!r},)", given)

    @property
    def ranges(self) -> RangeOptions:
        """The part of it that says how a range is chosen."""
        return RangeOptions(self.method, self.activation, self.percentile)


@dataclass(frozen=True, eq=False)
class WeightPlace:
    """A weight that is rounded.

    Attributes:
        name: of its quantizer.
        axis: counts its output channels.
        shape: of the weight.
        layers: the names of the layers that read it.
    """

    name: str
    axis: int
    shape: tuple[int, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ScalePlace:
    """A scale of activations.

    Attributes:
        name: of its quantizer: where the first of its tensors is computed.
        origins: the tensors whose ranges together give it, by name.
        symmetric: it is int8 whatever the options say.
        known: the range, if that needs no calibration.
    """

    name: str
    origins: tuple[str, ...]
    symmetric: bool
    known: Range | None


@dataclass(frozen=True)
class Read:
    """An argument that is replaced by its rounded value.

    Attributes:
        place: of the argument.
        quantizer: its name.
        origin: the name of the tensor; "" for a weight.
    """

    place: Place
    quantizer: str
    origin: str = ""


@dataclass
class Places:
    """What is quantized, and where.

    Attributes:
        weights: by name of the quantizer.
        scales: likewise.
        reads: site -> the arguments that are replaced there.
        parameters: name of a parameter -> of its quantizer.
        changes: sites that change a replaced argument in place -> the place of it.
        quantized: names of layers -> the site of each.
        stay_float: name of a layer or sum that stays float -> why.
    """

    weights: dict[str, WeightPlace] = field(default_factory=dict)
    scales: dict[str, ScalePlace] = field(default_factory=dict)
    reads: dict[Site, tuple[Read, ...]] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    changes: dict[Site, tuple[Place, ...]] = field(default_factory=dict)
    quantized: dict[str, Site] = field(default_factory=dict)
    stay_float: dict[str, str] = field(default_factory=dict)
