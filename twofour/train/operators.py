"""What the functions of a traced graph do, as far as quantization asks.

They have the names that `trace.name_of` gives them. What each is in ONNX decides: a graph has to be
quantized as the file that is exported from it would be.
"""

from __future__ import annotations

from dataclasses import dataclass

from twofour.train.trace import Call, Value

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
PRODUCTS = ("matmul", "mm", "bmm")
# What has weights: if a run calls one where the traced run did not, rounding would be missing.
WEIGHTED = frozenset((*CONVOLUTIONS, "linear", "addmm", *PRODUCTS))
FLOAT_WEIGHTED = frozenset(
    "conv_transpose1d conv_transpose2d conv_transpose3d lstm gru rnn_tanh rnn_relu bilinear einsum "
    "multi_head_attention_forward".split()
)
ACTIVATIONS = frozenset(
    "relu relu6 hardtanh clamp clip hardswish hardsigmoid sigmoid tanh gelu silu mish mul multiply "
    "div divide true_divide".split()
)
_RESHAPES = ("reshape", "view", "flatten", "unflatten", "reshape_as", "view_as")
_SQUEEZES = ("squeeze", "unsqueeze")
_TRANSPOSES = ("transpose", "permute", "swapaxes", "swapdims", "movedim", "t", "T", "mT", "adjoint")
_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d")
MOVES = frozenset((*_RESHAPES, *_SQUEEZES, *_TRANSPOSES))
_PARTS = frozenset(("getitem", "select", "narrow", "index_select", *_SQUEEZES, *_RESHAPES))
_CUTS = ("chunk", "split", "split_with_sizes", "tensor_split")
_JOINS = ("cat", "concat", "concatenate", "stack", "hstack", "dstack", "vstack")
_NORMALIZATIONS = ("layer_norm", "rms_norm")


@dataclass(frozen=True)
class Layer:
    """A function with a weight that can be int8.

    Attributes:
        call: it.
        x: what it reads.
        weight: the tensor.
        place: where the weight stands among the arguments.
        axis: of the weight, counts the output channels.
    """

    call: Call
    x: Value
    weight: Value
    axis: int

    @property
    def output(self) -> Value:
        """What it computes."""
        return self.call.outputs[0]

    @property
    def place(self) -> tuple[int | str, ...]:
        """Where the weight stands among the arguments."""
        return next(place for place, v in self.call.inputs.items() if v is self.weight)

    @property
    def sum_length(self) -> int:
        """How many products it sums for one output."""
        size = 1
        for axis, length in enumerate(self.weight.shape):
            size *= 1 if axis == self.axis else length
        return size

    @property
    def ends(self) -> bool:
        """Whether nothing more is computed after the product: no bias added by a node of its own.

        In ONNX a Linear of a matrix is a Gemm, one of more dimensions a MatMul, then an Add.
        """
        biased = self.call.input(2, "bias") is not None
        return self.call.function != "linear" or not biased or len(self.x.shape) == 2


def layer_of(call: Call) -> Layer | None:
    """The layer that a call is, or None: its weight is constant, its input is not."""
    first, second, axis = 0, 1, 0
    names = ("input", "weight")
    if call.function in PRODUCTS:
        names, axis = ("input", "other"), 1
    elif call.function == "addmm":
        first, second, axis, names = 1, 2, 1, ("mat1", "mat2")
    elif call.function not in CONVOLUTIONS and call.function != "linear":
        return None
    x, weight = call.input(first, names[0]), call.input(second, names[1])
    if x is None or weight is None or x.constant or not weight.constant or not weight.floating:
        return None
    if call.function not in CONVOLUTIONS and len(weight.shape) != 2:
        return None
    return Layer(call, x, weight, axis)


def operand(call: Call) -> Value | None:
    """The first tensor that it reads."""
    return next(iter(call.inputs.values()), None)


def moved_from(call: Call | None) -> list[Value]:
    """The tensors that all values of the call's results were moved from; none if it computes."""
    if call is None or call.changed:
        return []
    if call.function in _JOINS:
        parts = list(call.inputs.values())
        return [] if any(value.constant for value in parts) else parts
    x = operand(call)
    return [x] if x is not None and (is_mover(call) or call.function in _CUTS) else []


def is_mover(call: Call) -> bool:
    """Whether each value of its one result is one of its first tensor, or zero."""
    if call.function in MOVES or call.function in _POOLS:
        return len(call.outputs) == 1
    if call.function == "getitem":
        return all(_slices(index) for place, index in call.settings.items()) and (
            len(call.inputs) == 1
        )
    if call.function == "interpolate":
        return bool(call.setting(3, "mode", "nearest") == "nearest")
    if call.function == "pad":
        zeros = not call.setting(3, "value")
        return zeros and bool(call.setting(2, "mode", "constant") == "constant")
    return False


def _slices(index: object) -> bool:
    """Whether an index takes no single rows: those are a Gather."""
    each = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or isinstance(part, slice) for part in each)


def is_average(call: Call) -> bool:
    """Whether it is an average pooling, or a mean over height and width."""
    if call.function in ("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d"):
        return True
    return _means_over(call, (2, 3)) and len(call.inputs[0,].shape) == 4


def _means_over(call: Call, axes: tuple[int, ...]) -> bool:
    x = operand(call)
    if call.function != "mean" or x is None:
        return False
    given = call.setting(1, "dim")
    over = given if isinstance(given, (tuple, list)) else (given,)
    if given is None:
        return False
    rank = len(x.shape)
    return sorted(axis % rank for axis in over) == sorted(axis % rank for axis in axes)


def is_normalized(value: Value) -> bool:
    """Whether a normalization of rows reads the value, or some rows of it."""
    return any(
        _normalizes(reader) or (reader.function in _PARTS and is_normalized(reader.outputs[0]))
        for reader, _ in value.readers
    )


def _normalizes(call: Call) -> bool:
    return call.function in _NORMALIZATIONS or _means_over(call, (-1,))


def is_sum(call: Call) -> bool:
    """Whether it adds two tensors, and nothing else."""
    return call.function in ("add", "radd") and call.setting(2, "alpha", 1) == 1


def fold_batchnorm(calls: list[Call]) -> list[Call]:
    """Convolution and the normalization that alone reads it, as one: what the file will have.

    The normalization's result becomes the convolution's.
    """
    left = []
    for call in calls:
        x = call.input(0) if call.function == "batch_norm" else None
        maker = None if x is None else x.producer
        alone = x is not None and len(x.readers) == 1 and not x.returned
        if maker is None or maker.function not in CONVOLUTIONS or not alone:
            left.append(call)
            continue
        call.outputs[0].producer = maker
        maker.outputs[0] = call.outputs[0]
    return left
