"""Spells every activation the way kernels know it.

    Clip(x[, low][, high])                            ->  Clip(x, low, high); Relu(x) for [0, inf)
    Max(x, c), Min(x, c)                              ->  Clip(x, c, .), Clip(x, ., c)
    Clip(Clip(x)), and likewise with Relu             ->  one Clip
    Clip(x + 3, 0, 6) / 6                             ->  HardSigmoid<1/6, 1/2>(x)
    x * HardSigmoid<1/6, 1/2>(x)                      ->  HardSwish(x)
    x * Sigmoid(x), Swish<1>(x)                       ->  twofour.Silu(x)
    x / 2 * (1 + Erf(x / sqrt(2)))                    ->  twofour.Gelu(x)
    x / 2 * (1 + Tanh(sqrt(2 / pi) (x + 0.044715 x**3)))  ->  twofour.GeluTanh(x)
    Gelu<none>(x), Gelu<tanh>(x)                      ->  twofour.Gelu(x), twofour.GeluTanh(x)

    Products in any order and nesting, constants multiplied or divided by, read to 4 digits.

Conditions:
    1. the input is float32
    2. the bounds of Clip are constant numbers, low <= high
    3. the constants of a product are those above
    4. for a Clip of a Clip, nobody else reads the inner one
    5. the result has the shape of the input: no constant has more axes
"""

from __future__ import annotations

import math

import onnx_ir as ir

from twofour.compiler.passes import activations, reading
from twofour.compiler.passes.activations import HIGHEST, LOWEST, near
from twofour.compiler.passes.products import Product, product, sum_of
from twofour.compiler.passes.rewrite import Refused, Replacement
from twofour.core.approximations import SIXTH
from twofour.core.functions import Activation

NAME = "canonical_activation"
_ROOT_HALF = math.sqrt(0.5)
_ROOT_TANH, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if reading.is_op(node, "Clip", "Relu"):
        return _clip(node)
    if reading.is_op(node, "Min", "Max"):
        return _one_sided(node)
    if reading.is_op(node, "Mul", "Div"):
        return _product(node)
    if reading.is_op(node, "Gelu", "Swish"):
        return _named(node)
    return None


def _replaced(node: ir.Node, activation: Activation, x: ir.Value) -> Replacement | Refused:
    """The node's result computed as that activation of x."""
    if x.dtype != ir.DataType.FLOAT:
        return Refused(f"its input is {x.dtype}; expected float32")
    before, after = reading.shape_text(x), reading.shape_text(node.outputs[0])
    if before != after:
        return Refused(f"its constants spread {before} to {after}")
    new = activations.write(activation, x, node.name)
    return Replacement(node.outputs[0], new.outputs[0], (new,))


def _clip(node: ir.Node) -> Replacement | Refused | None:
    """Clip with both bounds given, and not behind another one."""
    activation = activations.read(node)
    if not isinstance(activation, Activation):
        return Refused(activation) if activation else None
    x = reading.data(node)
    inner = activations.read(x.producer())
    if isinstance(inner, Activation) and inner.name in ("Relu", "Clip"):
        if isinstance(reader := reading.sole_reader(x), str):
            return Refused(reader)
        return _replaced(node, _both(inner, activation), reading.data(_producer(x)))
    given = [reading.optional(node, index) for index in (1, 2)]
    if activation.name == node.op_type and (node.op_type == "Relu" or None not in given):
        return None
    return _replaced(node, activation, x)


def _producer(value: ir.Value) -> ir.Node:
    """The node that computes a value of which one is known to."""
    node = value.producer()
    if node is None:
        raise ValueError(f"{value.name!r} has no producer")
    return node


def _both(first: Activation, second: Activation) -> Activation:
    """`second` after `first`: again bounds, those of the second where the first ones are wider."""
    low, high = ((one.bounds()) for one in (first, second))
    ends = [min(max(end, high[0]), high[1]) for end in low]
    return _bounded(*ends)


def _bounded(low: float, high: float) -> Activation:
    """Clip, or Relu where that is the same."""
    low, high = max(low, LOWEST), min(high, HIGHEST)
    return Activation("Relu") if (low, high) == (0.0, HIGHEST) else Activation("Clip", low, high)


def _one_sided(node: ir.Node) -> Replacement | Refused | None:
    """Min and Max of a tensor and one constant number."""
    if len(node.inputs) != 2:
        return None
    for index in (0, 1):
        x, bound = reading.data(node, index), reading.array(reading.optional(node, 1 - index))
        if bound is not None and bound.size == 1 and bound.ndim <= _rank(x):
            number = float(bound.reshape(-1)[0])
            low, high = (number, HIGHEST) if node.op_type == "Max" else (LOWEST, number)
            return _replaced(node, _bounded(low, high), x)
    return None


def _rank(value: ir.Value) -> int:
    """The number of axes; 0 where it is not known."""
    return len(value.shape) if value.shape is not None else 0


def _named(node: ir.Node) -> Replacement | Refused:
    """Gelu and Swish of later opsets."""
    if node.op_type == "Swish":
        alpha = reading.float_attribute(node, "alpha", 1.0)
        if not near(alpha, 1.0):
            return Refused(f"its alpha is {alpha:.6g}; expected 1")
        return _replaced(node, Activation("Silu"), reading.data(node))
    tanh = reading.string_attribute(node, "approximate", "none") == "tanh"
    return _replaced(node, Activation("GeluTanh" if tanh else "Gelu"), reading.data(node))


def _product(node: ir.Node) -> Replacement | Refused | None:
    """The activations that are products."""
    whole = product(node.outputs[0])
    if len(whole.factors) == 1:
        return _gate(node, whole)
    if len(whole.factors) != 2:
        return None
    for x, other in (whole.factors, whole.factors[::-1]):
        found = _of_two(x, other.producer())
        if found is not None:
            name, constant = found
            if not near(whole.constant, constant):
                return Refused(f"it is {name} times {whole.constant / constant:.6g}; expected once")
            return _replaced(node, Activation(name), x)
    return None


def _gate(node: ir.Node, whole: Product) -> Replacement | Refused | None:
    """Clip(x + 3, 0, 6) / 6."""
    x = _shifted(whole.factors[0].producer())
    if x is None or not near(whole.constant, SIXTH):
        return None
    return _replaced(node, Activation("HardSigmoid"), x)


def _shifted(node: ir.Node | None) -> ir.Value | None:
    """The x of Clip(x + 3, 0, 6)."""
    if node is None or activations.read(node) != Activation("Clip", 0.0, 6.0):
        return None
    terms = sum_of(reading.data(node))
    return terms.value if terms is not None and near(terms.constant, 3.0) else None


def _of_two(x: ir.Value, node: ir.Node | None) -> tuple[str, float] | None:
    """What x times the node's result is, and the constant that must stand before it."""
    activation = activations.read(node)
    if node is not None and isinstance(activation, Activation) and reading.data(node) is x:
        names = {"Sigmoid": "Silu", "HardSigmoid": "HardSwish"}
        return (names[activation.name], 1.0) if activation.name in names else None
    if _shifted(node) is x:
        return "HardSwish", SIXTH
    return _gelu(x, node)


def _gelu(x: ir.Value, node: ir.Node | None) -> tuple[str, float] | None:
    """For 1 + Erf(x / sqrt(2)), or the form with Tanh."""
    terms = sum_of(node.outputs[0]) if node is not None else None
    inner = terms.value.producer() if terms is not None else None
    if terms is None or inner is None or not near(terms.constant, 1.0):
        return None
    if not reading.is_op(inner, "Erf", "Tanh"):
        return None
    argument = product(reading.data(inner))
    if len(argument.factors) != 1:
        return None
    (value,) = argument.factors
    if inner.op_type == "Erf":
        return ("Gelu", 0.5) if value is x and near(argument.constant, _ROOT_HALF) else None
    fits = near(argument.constant, _ROOT_TANH) and _is_cubic(value.producer(), x)
    return ("GeluTanh", 0.5) if fits else None


def _is_cubic(node: ir.Node | None, x: ir.Value) -> bool:
    """Whether the node computes x + 0.044715 x**3."""
    if node is None or not reading.is_op(node, "Add"):
        return False
    for index in (0, 1):
        if reading.data(node, index) is x:
            power = product(reading.data(node, 1 - index))
            return power.factors == (x, x, x) and near(power.constant, _CUBIC)
    return False
