"""Runs what the compiler lowered for a GPU without one: kernels in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.kernels.cuda.interpret import TORCH, interpret
from twofour.compiler.cuda.arena import place
from twofour.compiler.cuda.assemble import Constants, lives_of, places_of, scratch_buffer
from twofour.compiler.cuda.choose import Way
from twofour.compiler.cuda.graphs import Network
from twofour.compiler.cuda.lower import Stretch, input_buffer, output_buffer
from twofour.compiler.cuda.tactics import offered
from twofour.core.cuda_program import WEIGHTS, Place
from twofour.kernels.cuda.kernel import Kernel, Recipe

Array = NDArray[Any]
GARBAGE = 0x5A


def run(network: Network, feeds: Mapping[str, Array], which: int = 0) -> dict[str, Array]:
    """The outputs of a network all of whose parts run on the GPU.

    Args:
        network: lowered.
        feeds: its inputs.
        which: of the recipes of each turn: this one, counted around.
    """
    held = dict(feeds)
    for part in network.parts:
        assert part.gpu is not None, [network.order.reasons[n] for n in part.section.nodes]
        held |= run_stretch(part.gpu, held, network, which)
    return {info.name: held[info.name] for info in network.outputs}


def run_stretch(
    stretch: Stretch, feeds: Mapping[str, Array], network: Network, which: int
) -> dict[str, Array]:
    """What a stretch leaves for the host."""
    recipes = [_recipe(turn, which) for turn in stretch.turns]
    ways = [Way(recipe, (None,) * len(recipe.calls)) for recipe in recipes]
    lives = lives_of(stretch, ways)
    offsets, size = place(lives)
    constants = Constants()
    places = [
        places_of(turn, way, offsets, scratch_buffer(i), constants)
        for i, (turn, way) in enumerate(zip(stretch.turns, ways, strict=True))
    ]
    blocks = {
        "arena": torch.full((size,), GARBAGE, dtype=torch.uint8),
        "weights": torch.from_numpy(constants.block().copy()),
    }
    for name in stretch.inputs:
        content = torch.from_numpy(
            np.ascontiguousarray(feeds[name]).reshape(-1).view(np.uint8).copy()
        )
        at = offsets[input_buffer(name)]
        blocks["arena"][at : at + len(content)] = content
    for way, where in zip(ways, places, strict=True):
        for call in way.recipe.calls:
            assert isinstance(call, Kernel)
            start(call, where, blocks)
    found = {
        name: _fetched(blocks["arena"], offsets[output_buffer(name)], network.plain[name])
        for name in stretch.outputs
    }
    for name in stretch.outputs:
        if count := network.plain[name].count:
            found[name] = found[name][: found[count][0]]
    return found


def start(kernel: Kernel, where: Mapping[str, Place], blocks: Mapping[str, torch.Tensor]) -> None:
    """One launch in the interpreter."""
    tensors = {}
    for role, dtype in kernel.operands:
        found = where[role]
        block = blocks["weights" if found.block == WEIGHTS else "arena"]
        content = block[found.offset : found.offset + found.size_bytes]
        tensors[role] = content.view(TORCH[dtype])
    interpret(kernel, tensors)


def _recipe(turn: Any, which: int) -> Recipe:
    found: Sequence[Recipe] = offered(turn.problem, turn.constants, 90, 1)
    usable = [r for r in found if all(isinstance(call, Kernel) for call in r.calls)]
    assert usable, f"no recipe for {turn.op.op_type}: {turn.problem}"
    return usable[which % len(usable)]


def _fetched(arena: torch.Tensor, at: int, info: Any) -> Array:
    dtype = np.dtype(info.dtype)
    shape = info.most if info.count else info.shape
    count = int(np.prod(shape, dtype=np.int64))
    content = arena[at : at + count * dtype.itemsize].numpy().copy()
    return content.view(dtype).reshape(shape)
