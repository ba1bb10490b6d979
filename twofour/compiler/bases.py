"""The table of fused operators without their variants; ops.py composes these."""

from __future__ import annotations

from dataclasses import dataclass

from twofour.compiler import meanings

_QUANTIZED_X = ("x", "x_scale", "x_zero_point")
QUANTIZED_RES = ("res", "res_scale", "res_zero_point")
QUANTIZED_Y = ("y_scale", "y_zero_point")
_CONV_ATTRIBUTES = ("strides", "pads", "dilations", "group")
_DEQUANTIZE_X = "x_f = DequantizeLinear (x, x_scale, x_zero_point)"
_DEQUANTIZE_AB = (
    "a_f = DequantizeLinear (a, a_scale, a_zero_point)\n"
    " b_f = DequantizeLinear (b, b_scale, b_zero_point)"
)
_DEQUANTIZE_W = "w_f = DequantizeLinear <axis = 0> (w, w_scale)"
_MAX_ATTRIBUTES = ("kernel_shape", "strides", "pads")
ACTIVATIONS = tuple(meanings.ACTIVATIONS)
DYNAMIC = ("RowGemm", "TensorGemm")
"""Those that quantize x themselves, at run time (core/dynamic.py)."""
PLAIN = ("Conv", "Gemm", *DYNAMIC)
"""Products that read and write float32."""
ADDING_LAST = ("Conv", "QConv", "BConv")
"""Products that may add a residual behind their activation."""
CLIP_ATTRIBUTES = ("low", "high")


def _activation_body(name: str) -> str:
    """An activation of x alone."""
    return meanings.ACTIVATIONS[name].replace("VALUE", "x").replace("act =", "acc =")


def _floats(*names: str) -> str:
    """Each value as float32, under a name that ends in _f; what is float32 stays as it is."""
    return "".join(f"{name}_f = Cast <to = 1> ({name})\n " for name in names)


@dataclass(frozen=True)
class Base:
    """One fused operator without its variants.

    Attributes:
        inputs: names, in order, before the optional ones.
        attributes: all of them always given.
        body: standard operators that end in the value `acc`.
        parts: those that may follow the base.
        quantized: the output is quantized unless part F is there.
        rounded: the output is bfloat16 unless part F is there.
        outputs: names; a second one is the quantized or rounded first one.
        axis: of a y_scale that is per channel, or None where it is one number.
    """

    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    body: str
    parts: tuple[str, ...] = ()
    quantized: bool = False
    outputs: tuple[str, ...] = ("y",)
    axis: int | None = None
    rounded: bool = False


BASES = {
    "QConv": Base(
        (*_QUANTIZED_X, "w", "w_scale", "bias"),
        _CONV_ATTRIBUTES,
        f"{_DEQUANTIZE_X}\n {_DEQUANTIZE_W}\n acc = {meanings.CONV} (x_f, w_f, bias)",
        ("Add", "AddFloat", *ACTIVATIONS, "F"),
        quantized=True,
    ),
    "QGemm": Base(
        (*_QUANTIZED_X, "w", "w_scale", "bias"),
        (),
        f"{_DEQUANTIZE_X}\n {_DEQUANTIZE_W}\n {meanings.MATMUL.format(x='x_f', w='w_f')}",
        ("Add", "AddFloat", *ACTIVATIONS, "F"),
        quantized=True,
        axis=-1,
    ),
    "Conv": Base(
        ("x", "w", "bias"),
        _CONV_ATTRIBUTES,
        f"acc = {meanings.CONV} (x, w, bias)",
        ("Add", *ACTIVATIONS),
    ),
    "Gemm": Base(
        ("x", "w", "bias"), (), meanings.MATMUL.format(x="x", w="w"), ("Add", *ACTIVATIONS)
    ),
    "RowGemm": Base(
        ("x", "w", "w_scale", "bias"),
        (),
        f"{meanings.BY_ROWS}\n {meanings.INTEGER_MATMUL}",
        ("Add", *ACTIVATIONS),
    ),
    "TensorGemm": Base(
        ("x", "w", "w_scale", "bias"),
        (),
        f"{meanings.TOGETHER}\n {meanings.INTEGER_MATMUL}",
        ("Add", *ACTIVATIONS),
    ),
    "QAdd": Base(
        ("a", "a_scale", "a_zero_point", "b", "b_scale", "b_zero_point"),
        (),
        f"{_DEQUANTIZE_AB}\n acc = Add (a_f, b_f)",
        ACTIVATIONS,
        quantized=True,
    ),
    "QMul": Base(
        ("a", "a_scale", "a_zero_point", "b", "b_scale", "b_zero_point"),
        (),
        f"{_DEQUANTIZE_AB}\n acc = Mul (a_f, b_f)",
        quantized=True,
    ),
    "QMulFloat": Base(
        ("a", "a_scale", "a_zero_point", "b"),
        (),
        "a_f = DequantizeLinear (a, a_scale, a_zero_point)\n acc = Mul (a_f, b)",
        quantized=True,
    ),
    "QActivation": Base(
        _QUANTIZED_X, (), _DEQUANTIZE_X.replace("x_f", "acc"), (*ACTIVATIONS, "F"), quantized=True
    ),
    "QGlobalAveragePool": Base(
        _QUANTIZED_X, ("keepdims",), f"{_DEQUANTIZE_X}\n MEAN", ("F",), quantized=True
    ),
    "QAveragePool": Base(
        _QUANTIZED_X,
        (*_MAX_ATTRIBUTES, "count_include_pad"),
        f"{_DEQUANTIZE_X}\n acc = {meanings.AVERAGE_POOL} (x_f)",
        ("F",),
        quantized=True,
    ),
    "QMaxPool": Base(
        ("x",),
        _MAX_ATTRIBUTES,
        f"acc = {meanings.MAX_POOL} (x)",
    ),
    "SlicePad": Base(("x", "value"), ("steps", "channel_pads"), meanings.SLICE_PAD),
    **{name: Base(("x",), (), _activation_body(name)) for name in ("Silu", "Gelu", "GeluTanh")},
    "LayerNorm": Base(("x", "gamma", "beta"), ("epsilon",), f"acc = {meanings.NORM}"),
    "QLayerNorm": Base(
        ("x", "gamma", "beta"), ("epsilon",), f"acc = {meanings.NORM}", quantized=True
    ),
    "LayerNormQ": Base(
        ("x", "gamma", "beta", *QUANTIZED_Y),
        ("epsilon",),
        f"acc = {meanings.NORM}",
        outputs=("y", "q"),
    ),
    "Attention": Base(
        ("q", "k", "v"),
        ("heads", "scale"),
        meanings.ATTENTION,
        ("Mask", "Causal"),
    ),
    "QAttention": Base(
        meanings.QUANTIZED_QKV,
        ("heads", "scale"),
        meanings.QUANTIZED_ATTENTION,
        ("Mask", "Causal", "F"),
        quantized=True,
    ),
    "Tokens": Base(("x",), (), meanings.TOKENS),
    "BConv": Base(
        ("x", "w", "bias"),
        _CONV_ATTRIBUTES,
        f"{_floats('x', 'w')} acc = {meanings.CONV} (x_f, w_f, bias)",
        ("Add", *ACTIVATIONS, "F"),
        rounded=True,
    ),
    "BGemm": Base(
        ("x", "w", "bias"),
        (),
        _floats("x", "w") + meanings.MATMUL.format(x="x_f", w="w_f"),
        ("Add", *ACTIVATIONS, "F"),
        rounded=True,
    ),
    "BMaxPool": Base(
        ("x",), _MAX_ATTRIBUTES, f"{_floats('x')} acc = {meanings.MAX_POOL} (x_f)", rounded=True
    ),
    "BSlicePad": Base(
        ("x", "value"),
        ("steps", "channel_pads"),
        f"{_floats('x')} {meanings.SLICE_PAD.replace('(x,', '(x_f,')}",
        rounded=True,
    ),
    "BRepeat": Base(("x",), ("factors",), f"{_floats('x')} {meanings.REPEAT}", rounded=True),
    "BGlobalAveragePool": Base(("x",), ("keepdims",), f"{_floats('x')} MEAN", ("F",), rounded=True),
    "BLayerNorm": Base(
        ("x", "gamma", "beta"), ("epsilon",), f"acc = {meanings.NORM}", rounded=True
    ),
    "LayerNormB": Base(
        ("x", "gamma", "beta"), ("epsilon",), f"acc = {meanings.NORM}", outputs=("y", "q")
    ),
    "BAttention": Base(
        ("q", "k", "v"),
        ("heads", "scale"),
        _floats("q", "k", "v") + meanings.FLOAT_ATTENTION,
        ("Mask", "Causal", "F"),
        rounded=True,
    ),
}
