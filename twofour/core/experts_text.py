"""Routed experts and the masked MLP as ONNX functions: text in ONNX's own form.

Standard operators only, so that whoever runs the file needs nothing else. Names and meaning are
those of core/experts.py.
"""

from __future__ import annotations

from twofour.core.activation_texts import GELU, GELU_TANH, SILU
from twofour.core.experts import (
    ACTIVATIONS,
    DOMAIN,
    FLOAT_WEIGHTS,
    INTEGER_WEIGHTS,
    MASKED,
    MIXTURE,
    OPSET,
    SWIGLU,
)

_ROWS = """last = Constant <value_ints = [-1]> ()
 shape = Shape (x)
 width = Shape <start = -1> (x)
 flat = Concat <axis = 0> (last, width)
 rows = Reshape (x, flat)"""

_ROUTE = """zero = Constant <value_ints = [0]> ()
 one = Constant <value_ints = [1]> ()
 count = Shape <start = -1> (logits)
 by_expert = Concat <axis = 0> (last, count)
 scores = Reshape (logits, by_expert)
 k_number = Constant <value_int: int = @k> ()
 k_one = Reshape (k_number, last)
 top, chosen = TopK <axis = -1, largest = 1, sorted = 1> (scores, k_one)
 shares = Softmax <axis = -1> (scores)
 of_all = GatherElements <axis = -1> (shares, chosen)
 of_chosen = Softmax <axis = -1> (top)
 flag = Constant <value_int: int = @normalize> ()
 alone = Cast <to = 9> (flag)
 picked = Where (alone, of_chosen, of_all)
 size = Shape (scores)
 none = ConstantOfShape (size)
 gates = ScatterElements <axis = -1> (none, chosen, picked)
 gates_t = Transpose <perm = [1, 0]> (gates)
 gate = Unsqueeze (gates_t, last)
 tokens = Unsqueeze (rows, zero)"""

_ADD_UP = """weighted = Mul (of_experts, gate)
 total = ReduceSum <keepdims = 0> (weighted, zero)
 y = Reshape (total, shape)"""

_WHERE = """flags = Reshape (mask, last)
 set = Unsqueeze (flags, last)
 nothing = Constant <value_float = 0.0> ()
 kept = Where (set, of_experts, nothing)
 y = Reshape (kept, shape)"""

_ACTIVATION = {
    "Relu": "act = Relu (inner)",
    "Silu": SILU.replace("VALUE", "inner"),
    SWIGLU: """a, b = Split <axis = -1, num_outputs = 2> (inner)
 opened = Sigmoid (a)
 gated = Mul (a, opened)
 act = Mul (gated, b)""",
    "Gelu": GELU.replace("VALUE", "inner"),
    "GeluTanh": GELU_TANH.replace("VALUE", "inner"),
}


def name_of(base: str, activation: str, *, quantized: bool) -> str:
    """The operator's name.

    Args:
        base: MIXTURE or MASKED.
        activation: a name of ACTIVATIONS.
        quantized: its weights are int8.
    """
    return f"{'Q' if quantized else ''}{base}{activation}"


NAMES = tuple(
    (name_of(base, activation, quantized=quantized), base, activation, quantized)
    for base in (MIXTURE, MASKED)
    for quantized in (False, True)
    for activation in ACTIVATIONS
)
"""(name, base, activation, whether weights are int8) of every operator."""

BY_NAME = {name: (base, activation, quantized) for name, base, activation, quantized in NAMES}
"""Operator -> base, activation and whether its weights are int8."""


def inputs_of(base: str, *, quantized: bool) -> tuple[str, ...]:
    """The names of an operator's inputs."""
    chooser = "logits" if base == MIXTURE else "mask"
    return ("x", chooser, *(INTEGER_WEIGHTS if quantized else FLOAT_WEIGHTS))


def function_text(base: str, activation: str, *, quantized: bool, opset: int = OPSET) -> str:
    """The ONNX function of an operator.

    Args:
        base: MIXTURE or MASKED.
        activation: a name of ACTIVATIONS.
        quantized: its weights are int8.
        opset: of its body, 18 or later.
    """
    mixture = base == MIXTURE
    attributes = " <k: int = 1, normalize: int = 1>" if mixture else ""
    tokens = "tokens" if mixture else "rows"
    lines = [
        _ROWS,
        *([_ROUTE] if mixture else []),
        _product(tokens, "1", "inner", quantized=quantized, each=mixture),
        _ACTIVATION[activation],
        _product("act", "2", "of_experts", quantized=quantized, each=mixture),
        _ADD_UP if mixture else _WHERE,
    ]
    head = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
    head += f"{name_of(base, activation, quantized=quantized)}{attributes}"
    inputs = ", ".join(inputs_of(base, quantized=quantized))
    return f"{head} ({inputs}) => (y) {{\n " + "\n ".join(lines) + "\n}\n"


def _product(x: str, n: str, y: str, *, quantized: bool, each: bool) -> str:
    """Y = x w.T + b with the weights of that number; of each expert, or of the only one."""
    lines = [f"w{n}_t = Transpose <perm = [{'0, 2, 1' if each else '1, 0'}]> (w{n})"]

    def by_row(name: str) -> str:
        """What is one number an output channel, so that it broadcasts to the sums."""
        if not each:
            return name
        lines.append(f"{name}_u = Unsqueeze ({name}, one)")
        return f"{name}_u"

    if quantized:
        lines.append(_QUANTIZED.replace("N", n).replace("X", x))
        lines.append(f"by_w{n} = Mul (by_x{n}, {by_row(f'w{n}_scale')})")
    else:
        lines.append(f"by_w{n} = MatMul ({x}, w{n}_t)")
    lines.append(f"{y} = Add (by_w{n}, {by_row(f'b{n}')})")
    return "\n ".join(lines)


# core/dynamic.py: rows of X to bytes, and their product with wN.
_QUANTIZED = """magnitudesN = Abs (X)
 peakN = ReduceMax <keepdims = 1> (magnitudesN, last)
 leastN = Constant <value_float = 7.888609052210118e-31> ()
 highestN = Max (peakN, leastN)
 stepsN = Constant <value_float = 127.0> ()
 factorN = Div (stepsN, highestN)
 scaleN = Div (highestN, stepsN)
 scaledN = Mul (X, factorN)
 roundedN = Round (scaledN)
 centreN = Constant <value_float = 128.0> ()
 movedN = Add (roundedN, centreN)
 qN = Cast <to = 2> (movedN)
 q_zeroN = Cast <to = 2> (centreN)
 sumsN = MatMulInteger (qN, wN_t, q_zeroN)
 realN = Cast <to = 1> (sumsN)
 by_xN = Mul (realN, scaleN)"""
