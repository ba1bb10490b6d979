"""The fused operators, each with its meaning as an ONNX function of standard operators.

An operator type is a base and optional parts, in this order:

    QConv | QGemm     [Add | AddFloat] [Relu | ...] [F]     integer, in NCHW resp. [..., K]
    Conv  | Gemm      [Add] [Relu | ...]              float32
    RowGemm | TensorGemm  [Add] [Relu | ...]          float32, products of int8 (core/dynamic.py)
    [Q | B]Conv       Silu | ... [Add | AddFloat] [F]     the residual is added last
    QAdd              [Relu | ...]
    QMul, QMulFloat                                   equal shapes, or b a factor per channel
    QActivation       [Relu | ...]            [F]
    QGlobalAveragePool, QAveragePool          [F]
    QMaxPool, SlicePad
    Silu, Gelu, GeluTanh                              float32; standard ONNX has the other ones
    LayerNorm, QLayerNorm, LayerNormQ                 float32, quantized, or both (y, q)
    QAttention        [Mask | Causal]         [F]     on [batch, length, heads * channels]
    Attention         [Mask | Causal]                 float32
    Tokens                                            [N, C, H, W] -> [N, H * W, C]
    BConv | BGemm     [Add] [Relu | ...]      [F]     bfloat16
    BMaxPool, BSlicePad, BLayerNorm, LayerNormB       LayerNormB gives both (y, q)
    BRepeat                                           rows and columns of images
    BGlobalAveragePool                        [F]
    BAttention        [Mask | Causal]         [F]

The activation is Relu, Clip, HardSwish, HardSigmoid, Sigmoid, Silu, Gelu, GeluTanh or Tanh; Clip
has the attributes low and high. `Add` adds a residual before it: quantized for Q operators, float32
for the others; `AddFloat` adds a float32 residual to a Q operator. Of a convolution `Add` may stand
behind an activation that does more than clamp, and the residual is added there. `F` leaves the
output float32 instead of quantizing it. A B operator reads x, w and a residual in bfloat16 or
float32, as each of them is, computes in float32, and its output is bfloat16 unless `F` leaves it.
Only the bases stand in the table of bases.py; the variants are composed, and so are their inputs,
here of QConv and QGemm:

    x, x_scale, x_zero_point, w, w_scale, bias
    [res, res_scale, res_zero_point | res]       with Add | AddFloat
    [y_scale, y_zero_point]                      without F; of QGemm one number or one per channel

`Mask` adds a float32 mask to the scores of attention, `Causal` hides what comes after a query.

The functions are attached to a model that uses them (`attach_functions`), so every ONNX runtime
can execute a fused graph: that execution is the definition the kernels are compared with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx.parser
import onnx_ir as ir

from twofour.compiler import meanings
from twofour.compiler.bases import (
    ACTIVATIONS,
    ADDING_LAST,
    BASES,
    CLIP_ATTRIBUTES,
    QUANTIZED_RES,
    QUANTIZED_Y,
)
from twofour.core.functions import CLAMPS, Activation

DOMAIN = "twofour"
VERSION = 1

Attribute = int | float | tuple[int, ...]

_TYPE = re.compile(
    rf"({'|'.join(sorted(BASES, key=len, reverse=True))})(AddFloat|Add)?(Mask|Causal)?"
    rf"({'|'.join(ACTIVATIONS)})?(AddFloat|Add)?(F)?"
)


@dataclass(frozen=True)
class Variant:
    """A base and the parts that follow it; `str()` of it is the operator type."""

    base: str
    add: str = ""
    activation: str = ""
    float_out: bool = False
    mask: str = ""
    add_last: bool = False

    def __post_init__(self) -> None:
        """Refuses parts the base does not have."""
        allowed = ("", *BASES[self.base].parts)
        wanted = (self.add, self.mask, self.activation, "F" if self.float_out else "")
        if unknown := [part for part in wanted if part not in allowed]:
            raise ValueError(f"{self.base} has no variant {unknown[0]!r}")
        if self.add_last and not (self.add and may_add_last(self.base, self.activation)):
            raise ValueError(f"{self.base} has no variant {self.activation + self.add!r}")

    def __str__(self) -> str:
        """The operator type."""
        parts = [self.mask + self.activation, self.add]
        middle = "".join(parts if self.add_last else parts[::-1])
        return f"{self.base}{middle}{'F' * self.float_out}"

    @property
    def quantized_out(self) -> bool:
        """Whether the result is quantized with y_scale and y_zero_point."""
        return BASES[self.base].quantized and not self.float_out

    @property
    def rounded_out(self) -> bool:
        """Whether the result is bfloat16."""
        return BASES[self.base].rounded and not self.float_out

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of all inputs, in order."""
        names = BASES[self.base].inputs
        if self.add:
            quantized_res = self.add == "Add" and BASES[self.base].quantized
            names += QUANTIZED_RES if quantized_res else ("res",)
        names += ("mask",) if self.mask == "Mask" else ()
        return names + QUANTIZED_Y if self.quantized_out else names

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of all outputs, in order."""
        return BASES[self.base].outputs

    @property
    def attributes(self) -> tuple[str, ...]:
        """The names of all attributes."""
        own = BASES[self.base].attributes
        return (*own, *CLIP_ATTRIBUTES) if self.activation == "Clip" else own

    def function_text(self, opset: int) -> str:
        """The meaning in ONNX text form, for a model of that opset."""
        body = BASES[self.base].body.replace("MEAN", meanings.mean(opset))
        body = body.replace("HIGHEST", meanings.highest(opset))
        lines = [body.replace("MASK", meanings.MASKS[self.mask])]
        value = "acc"
        if self.add and not self.add_last:
            lines += self._sum(value)
            value = "sum"
        if self.activation:
            lines.append(meanings.ACTIVATIONS[self.activation].replace("VALUE", value))
            value = "act"
        if self.add_last:
            lines += self._sum(value)
            value = "sum"
        axis = BASES[self.base].axis
        along = "" if axis is None else f" <axis = {axis}>"
        last = f"QuantizeLinear{along} ({value}, y_scale, y_zero_point)"
        last = (
            last
            if self.quantized_out
            else f"{'Cast <to = 16>' if self.rounded_out else 'Identity'} ({value})"
        )
        lines.append(f"y = {last}")
        if "q" in self.outputs:
            quantized = "y_scale" in self.inputs
            narrow = (
                "QuantizeLinear (y, y_scale, y_zero_point)" if quantized else "Cast <to = 16> (y)"
            )
            lines.append(f"q = {narrow}")
        attributes = f"<{', '.join(self.attributes)}>" if self.attributes else ""
        body = "\n ".join(lines)
        return (
            f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">\n'
            f"{self} {attributes} ({', '.join(self.inputs)}) =>"
            f" ({', '.join(self.outputs)}) {{\n {body}\n}}"
        )

    def _sum(self, value: str) -> list[str]:
        """`sum`: a value and the residual."""
        if "res_scale" in self.inputs:
            real = ["res_f = DequantizeLinear (res, res_scale, res_zero_point)"]
        else:
            real = ["res_f = Cast <to = 1> (res)"] if BASES[self.base].rounded else []
        return [*real, f"sum = Add ({value}, {'res_f' if real else 'res'})"]


@dataclass(frozen=True)
class FusedOp:
    """A fused node, read.

    Attributes:
        name: of the node, in the source model's words.
        op_type: base and parts, for example "QConvAddRelu".
        base: as in the module's docstring.
        has_add: a residual `res` is added.
        add_is_float: that residual is float32.
        activation: what the results go through.
        float_out: the output is float32, though the operator is an integer one.
        inputs: values by name, as in the module's docstring.
        outputs: the results.
        attributes: numbers and tuples of ints by name; all that the base has.
        mask: "Mask", "Causal" or "".
        add_last: the residual is added behind the activation.
    """

    name: str
    op_type: str
    base: str
    has_add: bool
    add_is_float: bool
    activation: Activation
    float_out: bool
    inputs: Mapping[str, ir.Value]
    outputs: tuple[ir.Value, ...]
    attributes: Mapping[str, Attribute]
    mask: str = ""
    add_last: bool = False

    @property
    def output(self) -> ir.Value:
        """The first result."""
        return self.outputs[0]


def variants() -> list[Variant]:
    """Every fused operator."""
    return [
        Variant(base, add, activation, float_out, mask, add_last)
        for base, entry in BASES.items()
        for add in ("", *(part for part in entry.parts if part.startswith("Add")))
        for mask in ("", *(part for part in entry.parts if part in ("Mask", "Causal")))
        for activation in ("", *(part for part in entry.parts if part in ACTIVATIONS))
        for float_out in (False, True)[: 1 + ("F" in entry.parts)]
        for add_last in (False, True)[: 1 + (bool(add) and may_add_last(base, activation))]
    ]


def may_add_last(base: str, activation: str) -> bool:
    """Whether a residual can be added behind the activation of a base."""
    return base in ADDING_LAST and activation not in CLAMPS


def parse_type(op_type: str) -> Variant:
    """The base and parts of an operator type of domain "twofour".

    Raises:
        ValueError: there is no such operator.
    """
    match = _TYPE.fullmatch(op_type)
    if match is None or (match[2] and match[5]):
        raise ValueError(f"twofour has no operator {op_type!r}; its bases are {', '.join(BASES)}")
    base, first, mask, activation, last, float_out = match.groups()
    add = first or last or ""
    return Variant(base, add, activation or "", bool(float_out), mask or "", bool(last))


def is_fused(node: ir.Node) -> bool:
    """Whether the node is an operator of domain "twofour"."""
    return node.domain == DOMAIN


def parse_op(node: ir.Node) -> FusedOp:
    """Reads a fused node.

    Args:
        node: of domain "twofour", as the passes leave it.

    Raises:
        ValueError: the node is not a fused operator, or inputs or attributes do not fit its type.
    """
    if not is_fused(node):
        raise ValueError(f"{node.op_type} {node.name!r} is not an operator of domain {DOMAIN!r}")
    variant = parse_type(node.op_type)
    values = [value for value in node.inputs if value is not None]
    if len(values) != len(variant.inputs) or len(node.inputs) != len(values):
        raise ValueError(
            f"{node.op_type} {node.name!r}: expected the inputs {', '.join(variant.inputs)},"
            f" got {len(values)} of them"
        )
    if set(node.attributes) != set(variant.attributes):
        raise ValueError(
            f"{node.op_type} {node.name!r}: expected the attributes {list(variant.attributes)},"
            f" got {sorted(node.attributes)}"
        )
    return FusedOp(
        name=node.name or "",
        op_type=node.op_type,
        base=variant.base,
        has_add=bool(variant.add),
        add_is_float=bool(variant.add) and "res_scale" not in variant.inputs,
        activation=_activation(node, variant.activation),
        float_out=variant.float_out,
        inputs=dict(zip(variant.inputs, values, strict=True)),
        outputs=tuple(node.outputs),
        attributes={name: _attribute(node.attributes[name]) for name in variant.attributes},
        mask=variant.mask,
        add_last=variant.add_last,
    )


def _activation(node: ir.Node, name: str) -> Activation:
    """The activation part of a fused node."""
    if name != "Clip":
        return Activation(name)
    low, high = (node.attributes[key].as_float() for key in CLIP_ATTRIBUTES)
    return Activation(name, low, high)


def _attribute(attribute: ir.Attr) -> Attribute:
    """The value of an int, float or ints attribute."""
    if attribute.type == ir.AttributeType.FLOAT:
        return attribute.as_float()
    if attribute.type == ir.AttributeType.INT:
        return attribute.as_int()
    return tuple(attribute.as_ints())


def make_node(
    variant: Variant,
    inputs: Mapping[str, ir.Value],
    attributes: Mapping[str, int | float | Sequence[int]],
    source: ir.Node,
) -> ir.Node:
    """A fused node that carries the name of the source model's main node.

    Args:
        variant: which operator.
        inputs: by name; more than the variant needs are allowed, fewer are not.
        attributes: by name, likewise.
        source: the Conv, Gemm, Add, ... it stands for.
    """
    return ir.node(
        str(variant),
        [inputs[name] for name in variant.inputs],
        {name: attributes[name] for name in variant.attributes},
        domain=DOMAIN,
        name=source.name,
        num_outputs=len(variant.outputs),
    )


def attach_functions(model: ir.Model) -> None:
    """Gives the model the functions of the fused operators it uses, and takes away the others."""
    wanted = {node.op_identifier() for node in model.graph if is_fused(node)}
    for identifier in [key for key in model.functions if key[0] == DOMAIN and key not in wanted]:
        del model.functions[identifier]
    opset = model.graph.opset_imports[""]
    for identifier in sorted(wanted - set(model.functions)):
        text = parse_type(identifier[1]).function_text(opset)
        proto = onnx.parser.parse_function(text)
        model.functions[identifier] = ir.serde.deserialize_function(proto)
    if wanted:
        model.graph.opset_imports[DOMAIN] = VERSION
