"""Constants folded within bounds: a file of a few bytes may describe more than any memory holds.

What folding does with a node is what the ONNX reference evaluator does, in numpy or in Python. So a
node is folded only if its results, its work and all results so far are small enough; others are
left to run time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnxscript.optimizer._constant_folding import FoldConstantsPass

from twofour.core.errors import UnsupportedError
from twofour.onnx_tools.infer import is_short
from twofour.onnx_tools.windows import require_sizes

ShouldFold = Callable[[ir.Node], bool | None]

_RESULT_ELEMENTS = 1 << 26
_SLOW_ELEMENTS = 1 << 16  # of operators that the evaluator computes in Python
_PRODUCTS = 1 << 30  # of one matrix product
_TOTAL_BYTES = 1 << 30  # or twice what the model has
_QUICK = frozenset(
    "Abs Add And ArgMax ArgMin Cast CastLike Ceil Clip Concat ConstantOfShape Cos Div Equal Erf "
    "Exp Expand Flatten Floor Gather Gemm Greater GreaterOrEqual Identity LeakyRelu Less "
    "LessOrEqual Log MatMul Max Mean Min Mod Mul Neg Not Or Pad Pow Range Reciprocal ReduceMax "
    "ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Round Shape Sigmoid Sign Sin Slice "
    "Softmax Split Sqrt Squeeze Sub Sum Tanh Tile Transpose Trilu Unsqueeze Where Xor".split()
)
_GROWING = frozenset("ConstantOfShape Expand OneHot Pad Range Resize Tile Upsample".split())


def fold_constants(model: ir.Model, should_fold: ShouldFold = lambda node: None) -> None:
    """Replaces what depends on no input by its value, in place.

    Args:
        model: its constants are initializers.
        should_fold: False keeps a node, True folds it even if it grows; None leaves it to folding.

    Raises:
        InputError: a value has a negative dimension.
        UnsupportedError: it has evaluators of its own, and one does not take what is there.
    """
    budget = _Budget(model, should_fold)
    functions = dict(model.functions)
    model.functions.clear()  # meanings of plugins stay as they are written: by that they are known
    try:
        _Folding(
            shape_inference=True,
            input_size_limit=_RESULT_ELEMENTS,
            output_size_limit=_RESULT_ELEMENTS,
            should_fold=budget.allows,
        )(model)
    except RuntimeError as error:
        raise UnsupportedError(
            "constants of the model cannot be folded", str(error).strip().splitlines()[:1]
        ) from error
    finally:
        model.functions.update(functions)


class _Folding(FoldConstantsPass):
    """Folding that refuses negative dimensions: the inference of what reads them may crash."""

    def _do_inference(self, node: ir.Node) -> None:
        if node.op_type == "Expand" and not is_short(node.inputs[1]):
            return
        super()._do_inference(node)
        require_sizes([node])


class _Budget:
    """Counts what was folded."""

    def __init__(self, model: ir.Model, should_fold: ShouldFold) -> None:
        held = (v.const_value for graph in model.graphs() for v in graph.initializers.values())
        held_bytes = sum(tensor.nbytes for tensor in held if tensor is not None)
        self._left_bytes: float = max(_TOTAL_BYTES, 2 * held_bytes)
        self._wanted = should_fold

    def allows(self, node: ir.Node) -> bool | None:
        """What `should_fold` says, if the node is small enough."""
        wanted = self._wanted(node)
        if wanted is False or node.domain not in ("", "ai.onnx"):
            return False
        given = [v.const_value for v in node.inputs if v is not None and v.const_value is not None]
        if any(tensor.dtype == ir.DataType.STRING for tensor in given):
            return False
        taken = sum(tensor.size for tensor in given)
        made = _elements(node, taken)
        most = _RESULT_ELEMENTS if node.op_type in _QUICK else _SLOW_ELEMENTS
        if made > most or taken > 2 * most or _products(node, made) > _PRODUCTS:
            return False
        size_bytes = made * max([tensor.dtype.bitwidth for tensor in given], default=64) // 8
        if size_bytes > self._left_bytes:
            return False
        self._left_bytes -= size_bytes
        return wanted


def _elements(node: ir.Node, taken: int) -> float:
    """At most so many elements in all results."""
    shapes = [value.shape for value in node.outputs]
    known = [shape.numpy() for shape in shapes if shape is not None and shape.is_static()]
    if len(known) == len(shapes):
        return sum(math.prod(shape) for shape in known)
    return math.inf if node.op_type in _GROWING else 8.0 * taken


def _products(node: ir.Node, made: float) -> float:
    """Multiplications of a matrix product."""
    x = node.inputs[0].const_value if node.inputs and node.inputs[0] is not None else None
    if node.op_type not in ("MatMul", "Gemm") or x is None:
        return 0
    return made * max(np.array(x.shape.numpy()), default=1)
