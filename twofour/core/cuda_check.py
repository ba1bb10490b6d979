"""Contradictions between a plan and the programs of its steps on a GPU, for hostile files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from twofour.core.cuda_program import ALIGNMENT, ARENA, WEIGHTS, CudaProgram, Transfer
from twofour.core.errors import EngineError
from twofour.core.memory import Bytes
from twofour.core.plan import Plan, Profile, Step, TensorInfo
from twofour.core.plan_check import ITEM_BYTES
from twofour.core.target import CUDA

LIBRARIES = ("cublaslt", "cusparselt")
"""Those that a program may call."""
_GRID = ((1 << 31) - 1, (1 << 16) - 1, (1 << 16) - 1)
_MOST_SHARED_BYTES = 228 << 10
_MOST_TURNS = 1 << 16


def wrong_programs(plan: Plan, weights_bytes: int, held: Mapping[str, Bytes]) -> Iterator[str]:
    """What is wrong with the programs of a plan's steps.

    Args:
        plan: known to be sound but for them.
        weights_bytes: how many bytes of weights there are.
        held: the programs as bytes by the symbols of their steps.
    """
    for profile in plan.profiles:
        for step in profile.steps:
            if step.kind != CUDA:
                continue
            if step.symbol not in held:
                yield f"program {step.symbol!r} is missing"
                continue
            try:
                program = CudaProgram.from_bytes(held[step.symbol].tobytes())
            except EngineError as error:
                yield f"program {step.symbol!r} is malformed: {'; '.join(error.reasons)}"
                continue
            for reason in wrong_program(program, step, profile, plan, weights_bytes):
                yield f"program {step.symbol!r}: {reason}"


def wrong_program(
    program: CudaProgram, step: Step, profile: Profile, plan: Plan, weights_bytes: int
) -> Iterator[str]:
    """What is wrong with one program."""
    sizes = {ARENA: profile.arena_bytes, WEIGHTS: weights_bytes}
    yield from program.wrong(sizes, len(plan.layers))
    if len(program.order) > _MOST_TURNS:
        yield f"{len(program.order)} calls, expected at most {_MOST_TURNS}"
    yield from _wrong_calls(program, step, plan)
    tensors = {tensor.name: tensor for tensor in profile.tensors}
    for names, transfers in ((step.inputs, program.inputs), (step.outputs, program.outputs)):
        counted = step.outputs if names is step.outputs else ()
        if sorted(names) != sorted(transfer.name for transfer in transfers):
            yield f"it copies {[t.name for t in transfers]}, the step has {list(names)}"
            continue
        for transfer in transfers:
            yield from _wrong_transfer(transfer, tensors[transfer.name], counted)


def _wrong_calls(program: CudaProgram, step: Step, plan: Plan) -> Iterator[str]:
    """Calls that cannot be made."""
    for launch in program.launches:
        if launch.code not in plan.code:
            yield f"{launch.symbol} is in the object {launch.code!r}, which the plan does not name"
        if any(n > most for n, most in zip(launch.grid, _GRID, strict=False)):
            yield f"{launch.symbol} has a grid of {launch.grid} blocks"
        if launch.shared_bytes > _MOST_SHARED_BYTES:
            yield f"{launch.symbol} asks for {launch.shared_bytes} bytes of shared memory"
    for call in program.calls:
        if call.library not in LIBRARIES:
            yield f"it calls {call.library!r}, expected one of {', '.join(LIBRARIES)}"
    for turn in program.turns_checked():
        if turn.layer not in step.layers:
            yield f"a call belongs to layer {turn.layer}, which is none of the step"


def _wrong_transfer(
    transfer: Transfer, tensor: TensorInfo, counted: Sequence[str]
) -> Iterator[str]:
    """Why a tensor is not copied so; one whose rows one of `counted` says has room for all."""
    place, shape = transfer.place, tensor.shape
    if not tensor.known and tensor.count in counted:
        shape = tensor.most
    elif tensor.sizes or not tensor.known:
        yield f"the shape of {tensor.name!r} is open"
    size = math.prod(shape) * ITEM_BYTES.get(tensor.dtype, 0)
    if place.size_bytes != size:
        yield f"{tensor.name!r} has {size} bytes, {place.size_bytes} are copied"
    if place.block != ARENA or place.offset % ALIGNMENT:
        yield f"{tensor.name!r} is copied to {place.block} at {place.offset}"
