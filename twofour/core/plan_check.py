"""Contradictions within a plan, for hand-made or hostile files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from twofour.core.abi import MAX_SYMBOLS, MAX_THREADS
from twofour.core.cuda import is_gpu
from twofour.core.plan import CONSTANT, LEFT_OUT, Layer, Plan, Profile, Step, TensorInfo, Write
from twofour.core.sizes import Size
from twofour.core.target import CUDA, ISAS, TENSORRT

DTYPES = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()
)
"""Types that an engine passes on."""

ITEM_BYTES = {name: np.dtype(name).itemsize for name in DTYPES} | {"bfloat16": 2, "float8e4m3fn": 1}
"""Of an element, those that lie in an arena alone included."""

_MAX_MEMORY_BYTES = 1 << 36
_MAX_ELEMENTS = 1 << 33
_MAX_RANK = 32
_MAX_PROFILES = 64
_MAX_TERMS = 64
_MAX_POWER = 4
_STEP_KINDS = ("native", "onnxruntime", "python", TENSORRT, CUDA)


def wrong(plan: Plan) -> Iterator[str]:
    """What is wrong, in words."""
    yield from _wrong_target(plan)
    if plan.target.isa not in ISAS and not plan.target.on_gpu:
        yield f"unknown instruction set {plan.target.isa!r}, expected one of {', '.join(ISAS)}"
    if not 1 <= plan.threads <= MAX_THREADS:
        yield f"{plan.threads} threads, expected 1 to {MAX_THREADS}"
    if not 1 <= len(plan.profiles) <= _MAX_PROFILES:
        yield f"{len(plan.profiles)} profiles, expected 1 to {_MAX_PROFILES}"
    for profile in plan.profiles:
        symbols = list(_wrong_symbols(profile))
        yield from symbols
        if not symbols:  # sizes mean nothing without
            for tensor in profile.tensors:
                yield from _wrong_tensor(tensor, profile)
        yield from _wrong_memory(profile)
        yield from _wrong_steps(profile, len(plan.layers))
        if not symbols:
            yield from _wrong_writes(profile, plan.layers)
        if _ends(profile) != _ends(plan.profiles[0]):
            yield "the profiles have different inputs or outputs"
    yield from _wrong_reads(plan.layers)
    yield from _wrong_plugins(plan)


def _wrong_target(plan: Plan) -> Iterator[str]:
    """Steps that are not for the target, or a GPU that is not named."""
    yield from _wrong_tensorrt(plan)
    gpu, kinds = plan.target.cuda, {step.kind for step in plan.steps}
    if (gpu is not None) != (plan.target.isa == CUDA) or (gpu and plan.target.tensorrt):
        yield f"the target {plan.target.isa!r} contradicts what it says of CUDA"
    if gpu is not None and not is_gpu(gpu.gpu):
        yield f"the engine is for the GPU {gpu.gpu!r}, which is none"
    if (gpu is None and CUDA in kinds) or (gpu is not None and kinds & {"native", TENSORRT}):
        yield f"steps of the kinds {', '.join(sorted(kinds))} in an engine for {plan.target}"


def _wrong_tensorrt(plan: Plan) -> Iterator[str]:
    """What contradicts the TensorRT that a target names."""
    gpu = plan.target.tensorrt
    if (gpu is not None) != (plan.target.isa == TENSORRT):
        yield f"the target {plan.target.isa!r} contradicts what it says of TensorRT"
    if gpu is not None and (not gpu.library or not gpu.version or not gpu.gpu):
        yield "the engine does not say which TensorRT and which GPU it is for"
    if gpu is not None and len(plan.code) != 1:
        yield f"{len(plan.code)} networks of TensorRT, expected 1"
    kinds = {step.kind for step in plan.steps}
    if (gpu is None and TENSORRT in kinds) or (gpu is not None and kinds - {TENSORRT}):
        yield f"steps of the kinds {', '.join(sorted(kinds))} in an engine for {plan.target}"


def _ends(profile: Profile) -> list[list[tuple[str, str]]]:
    """Names and types of inputs and outputs."""
    return [[(t.name, t.dtype) for t in part] for part in (profile.inputs, profile.outputs)]


def _wrong_symbols(profile: Profile) -> Iterator[str]:
    """Ranges that hold nothing, and symbols that no input tells."""
    if len(profile.symbols) > MAX_SYMBOLS:
        yield f"{len(profile.symbols)} symbols, expected at most {MAX_SYMBOLS}"
    told = {size.terms for tensor in profile.inputs for size in tensor.sizes if size is not None}
    for index, symbol in enumerate(profile.symbols):
        if not 1 <= symbol.least <= symbol.usual <= symbol.most <= _MAX_ELEMENTS:
            yield (
                f"symbol {symbol.name!r} has the range {symbol.least} to {symbol.most}"
                f" and {symbol.usual} as usual"
            )
        if ((1, *(int(i == index) for i in range(len(profile.symbols)))),) not in told:
            yield f"no input has symbol {symbol.name!r} as a dimension"


def _wrong_tensor(tensor: TensorInfo, profile: Profile) -> Iterator[str]:
    if tensor.dtype not in DTYPES:
        yield f"tensor {tensor.name!r} has unknown dtype {tensor.dtype!r}"
    yield from _wrong_shape(tensor, profile)
    yield from _wrong_count(tensor, profile)


def _wrong_shape(tensor: TensorInfo, profile: Profile) -> Iterator[str]:
    shape = tensor.shape
    if len(shape) > _MAX_RANK or min(shape, default=0) < 0 or math.prod(shape) > _MAX_ELEMENTS:
        yield f"tensor {tensor.name!r} has shape {shape}"
    if not tensor.known and (shape or tensor.sizes):
        yield f"tensor {tensor.name!r} has a shape that is not known"
    if not tensor.known and tensor in profile.inputs:
        yield f"input {tensor.name!r} has no shape"
    if not tensor.sizes:
        return
    if len(tensor.sizes) != len(shape):
        yield f"tensor {tensor.name!r} has {len(shape)} dimensions and {len(tensor.sizes)} sizes"
        return
    for axis, size in enumerate(tensor.sizes):
        if size is not None and (reason := _wrong_size(size, shape[axis], profile)):
            yield f"tensor {tensor.name!r}, dimension {axis}: {reason}"
    single = all(size is None or len(size.terms) == 1 for size in tensor.sizes)
    if tensor in profile.inputs and not single:
        yield f"input {tensor.name!r} has a dimension that is no symbol"


def _wrong_size(size: Size, largest: int, profile: Profile) -> str:
    """Why a size is none; "" if it is one."""
    symbols = profile.symbols
    if not 1 <= len(size.terms) <= _MAX_TERMS or any(
        len(term) != 1 + len(symbols)
        or abs(term[0]) > _MAX_ELEMENTS
        or not all(0 <= power <= _MAX_POWER for power in term[1:])
        for term in size.terms
    ):
        return "not a polynomial in the symbols"
    corners = ("least", "usual", "most")
    least, usual, most = (size.at([getattr(s, corner) for s in symbols]) for corner in corners)
    if (usual, most) != (size.usual, size.most) or most != largest:
        return f"{usual} as usual and at most {most}, the plan says {size.usual} and {largest}"
    return "" if 0 <= least <= most else f"from {least} to {most}"


def _wrong_memory(profile: Profile) -> Iterator[str]:
    if not 0 <= profile.arena_bytes <= _MAX_MEMORY_BYTES:
        yield f"arena of {profile.arena_bytes} bytes"
    if 8 * len(profile.symbols) > profile.arena_bytes:
        yield f"{len(profile.symbols)} symbols in an arena of {profile.arena_bytes} bytes"
    for fill in profile.fills:
        end = fill.offset + fill.size_bytes
        if min(fill.offset, fill.size_bytes) < 0 or end > profile.arena_bytes:
            yield f"fill at {fill.offset}+{fill.size_bytes} outside the arena"
        if 0 <= fill.offset < 8 * len(profile.symbols) and fill.size_bytes > 0:
            yield f"fill at {fill.offset} over the symbols"
        if not 0 <= fill.value <= 255:
            yield f"fill at {fill.offset} with {fill.value}, not a byte"


def _wrong_steps(profile: Profile, layers: int) -> Iterator[str]:
    tensors = {tensor.name: tensor for tensor in profile.tensors}
    for step in profile.steps:
        for name in (*step.inputs, *step.outputs):
            if name not in tensors:
                yield f"step {step.symbol!r} uses unknown tensor {name!r}"
            elif step.kind == "native" and not _is_counted(tensors[name], step):
                yield f"program {step.symbol!r} uses tensor {name!r}, whose shape is not known"
        for layer in step.layers:
            if not 0 <= layer < layers:
                yield f"step {step.symbol!r} names layer {layer} of {layers}"
        if step.kind not in _STEP_KINDS:
            yield f"step {step.symbol!r} is of unknown kind {step.kind!r}"


def _wrong_plugins(plan: Plan) -> Iterator[str]:
    """Calls of plugins that no step makes, or that cannot be made."""
    calls = {call.step: call for call in plan.plugins}
    for step in plan.steps:
        if step.kind != "python":
            continue
        call = calls.get(step.symbol)
        if call is None:
            yield f"step {step.symbol!r} calls no plugin"
            continue
        read = [index for index in call.operands if index >= 0]
        if (
            any(index >= len(step.inputs) for index in read)
            or min(call.operands, default=0) < LEFT_OUT
        ):
            yield f"step {step.symbol!r} reads operands {call.operands}"
        if call.operands.count(CONSTANT) != len(call.constants):
            yield f"step {step.symbol!r} has {len(call.constants)} constants"
        for tensor in call.constants:
            if tensor.dtype not in DTYPES or tensor.sizes or not tensor.known:
                yield f"step {step.symbol!r} has a constant of {tensor.dtype}"
            yield from _wrong_shape(tensor, plan.profiles[0])


def _is_counted(tensor: TensorInfo, step: Step) -> bool:
    """Whether a program may use a tensor: its shape is known, or it is counted as it is written."""
    counted = tensor.name in step.outputs and tensor.count in step.outputs
    return tensor.known or bool(tensor.count and counted)


def _wrong_count(tensor: TensorInfo, profile: Profile) -> Iterator[str]:
    """What is wrong with the largest shape of a tensor, and with what counts it."""
    if bool(tensor.count) != bool(tensor.most) or (tensor.count and tensor.known):
        yield f"tensor {tensor.name!r} of known or unknown shape has a largest one: {tensor.most}"
    if not tensor.count:
        return
    most = tensor.most
    if len(most) > _MAX_RANK or min(most) < 0 or math.prod(most) > _MAX_ELEMENTS:
        yield f"tensor {tensor.name!r} has the largest shape {most}"
    counts = [(t.dtype, t.shape) for t in profile.tensors if t.name == tensor.count and t.known]
    if counts != [("int64", (1,))]:
        yield f"tensor {tensor.name!r} is counted by {tensor.count!r}, which is not one int64"


def _wrong_reads(layers: Sequence[Layer]) -> Iterator[str]:
    """Values whose writer is none."""
    for layer in layers:
        for read in layer.reads:
            if not -1 <= read.layer < len(layers):
                yield f"layer {layer.name!r} reads from layer {read.layer} of {len(layers)}"


def _wrong_writes(profile: Profile, layers: Sequence[Layer]) -> Iterator[str]:
    """What a profile's layers are said to write, where it does not lie."""
    for step in profile.steps:
        for index in step.layers:
            if 0 <= index < len(layers):
                for write in layers[index].writes:
                    yield from (
                        f"layer {layers[index].name!r}: {reason}"
                        for reason in _wrong_write(write, step, profile)
                    )


def _wrong_write(write: Write, step: Step, profile: Profile) -> Iterator[str]:
    tensor = write.tensor
    problems = list(_wrong_shape(tensor, profile))
    yield from problems
    if write.at is None:
        if tensor.name not in step.outputs:
            yield f"{tensor.name!r} is no plain tensor of step {step.symbol!r}"
        return
    if tensor.dtype not in ITEM_BYTES:
        yield f"tensor {tensor.name!r} has unknown dtype {tensor.dtype!r}"
    elif not problems and math.prod(tensor.shape) > 0:
        counts = write.planes(tensor.shape)
        strides = (write.at.image, ITEM_BYTES[tensor.dtype], write.at.row, write.at.pixel)
        last = sum((n - 1) * stride for n, stride in zip(counts, strides, strict=True))
        end = write.at.offset + last + ITEM_BYTES[tensor.dtype]
        if min(write.at.offset, *strides) < 0 or end > profile.arena_bytes:
            yield f"tensor {tensor.name!r} at {write.at.offset} to {end} lies outside the arena"
        if len(write.scale) not in (0, 1, counts[1]):
            yield f"tensor {tensor.name!r} of {counts[1]} channels has {len(write.scale)} scales"
