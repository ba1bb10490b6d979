"""Turns -> chosen recipes: what each tactic offers, compiled, compared, timed on the GPU.

Equal turns are looked at once. Without a GPU nothing has a time: the first guess that can be
compiled is taken, a sparse one where there is one, and no other is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.compiler.cuda import compiling
from twofour.compiler.cuda.check import WrongError
from twofour.compiler.cuda.libraries import left_out, library_recipes, repacked
from twofour.compiler.cuda.lower import Turn
from twofour.compiler.cuda.tactics import offered
from twofour.core.errors import EngineError, Error, UnsupportedError
from twofour.core.plan import Candidate, is_sparse
from twofour.kernels.cuda import gemm_cusparselt
from twofour.kernels.cuda.kernel import Compiled, Kernel, LibraryKernel, NvidiaSource, Recipe
from twofour.kernels.cuda.problem import ConvProblem
from twofour.runtime.cuda.device import Device

Array = NDArray[Any]
Call = Kernel | NvidiaSource | LibraryKernel
_LINE = 16
GUESS_EFFORT = 1
"""Of what is offered where nothing can be timed: enough for a second guess."""
_WRONG, _FAILS = "it is wrong", "it fails"
_MOST_TOLD = 8
_MOST_OFFERED = 1024
_offered: dict[tuple[Any, ...], tuple[Recipe, ...]] = {}
"""What libraries offered in this process, the oldest first, without its constants: listing it takes
long."""
_BLOCK = (1 << 20) + 7
"""Random elements that are repeated: no row of channels begins like another one."""


@dataclass(frozen=True)
class Way:
    """A recipe with its code.

    Attributes:
        recipe: what it does.
        code: of each call; None for a library's.
    """

    recipe: Recipe
    code: tuple[Compiled | None, ...]


@dataclass(frozen=True)
class Choice:
    """What a turn will do.

    Attributes:
        way: the chosen one.
        time_us: of it, or None where nothing was timed.
        candidates: all, the chosen one among them.
    """

    way: Way
    time_us: float | None
    candidates: tuple[Candidate, ...]


Timer = Callable[[Turn, Way], float]
"""Runs a way of doing a turn, compares the result with the definition, and gives microseconds.

Raises an error that names what is wrong where it fails."""


def key_of(turn: Turn) -> tuple[Any, ...]:
    """Equal for turns that any kernel runs alike."""
    aligned = tuple(
        (role, tensor.offset_bytes % _LINE, tensor.dtype)
        for role, tensor in sorted(turn.operands.items())
    )
    arrays = tuple((role, a.shape, a.dtype.str) for role, a in sorted(turn.constants.items()))
    return (_without_numbers(turn.problem), aligned, arrays)


def _without_numbers(problem: Any) -> Any:
    """The problem of a product as if its scales and bounds were those of any other."""
    if not isinstance(problem, ConvProblem):
        return problem
    finish = problem.finish
    plain = replace(
        finish,
        residual_scale=1.0,
        y_factor=1.0 if finish.y_factor == 1.0 else 2.0,
        y_zero=0 if finish.y_zero == 0 else 1,
        low=-math.inf if finish.low == -math.inf else -1.0 if finish.low else 0.0,
        high=math.inf if finish.high == math.inf else 1.0,
        residual_zero=0 if finish.residual_zero == 0 else 1,
    )
    return replace(problem, finish=plain, x_zero=0 if problem.x_zero == 0 else 1)


def ways_of(
    turns: Sequence[Turn],
    capability: int,
    effort: int,
    sparsity: str,
    tell: compiling.Tell | None = None,
) -> dict[tuple[Any, ...], list[Way | Candidate]]:
    """All that can be done for each different turn: with its code, or refused."""
    found = _recipes(turns, capability, effort)
    made = _made([recipe for recipes in found.values() for recipe in recipes], capability, tell)
    return {
        key: [_way(recipe, made, sparsity) for recipe in recipes] for key, recipes in found.items()
    }


def guesses_of(
    turns: Sequence[Turn], capability: int, sparsity: str, tell: compiling.Tell | None = None
) -> dict[tuple[Any, ...], list[Way | Candidate]]:
    """Of what can be done for each different turn the best guess, behind those refused for it.

    A sparse kernel is the better guess: on the GPUs that were measured it is the faster one for
    nearly every layer of a 2:4 network (benchmarks/cuda_networks.md).
    """
    left = _recipes(turns, capability, GUESS_EFFORT)
    for recipes in left.values():
        recipes.sort(key=lambda recipe: not is_sparse(recipe.tactic))
    found: dict[tuple[Any, ...], list[Way | Candidate]] = {key: [] for key in left}
    while open_ones := [key for key, recipes in left.items() if recipes]:
        tried = {key: left[key].pop(0) for key in open_ones}
        made = _made(tried.values(), capability, tell)
        for key, recipe in tried.items():
            found[key].append(way := _way(recipe, made, sparsity))
            if isinstance(way, Way):
                left[key].clear()
    return found


def _recipes(
    turns: Sequence[Turn], capability: int, effort: int
) -> dict[tuple[Any, ...], list[Recipe]]:
    """What is offered for each different turn."""
    found: dict[tuple[Any, ...], list[Recipe]] = {}
    for turn in turns:
        key = key_of(turn)
        if key not in found:
            recipes = offered(turn.problem, turn.constants, capability, effort)
            found[key] = [_aligned(recipe, turn) for recipe in recipes]
    return found


def with_libraries(
    ways: Sequence[Way | Candidate],
    turn: Turn,
    device: Device,
    effort: int,
    sparsity: str,
    capability: int,
) -> list[Way | Candidate]:
    """The ways, and what NVIDIA's libraries offer for a product.

    Args:
        ways: so far.
        turn: what is to be done.
        device: the GPU, which alone can tell.
        effort: how many algorithms are tried.
        sparsity: "disable" rules out sparse ones.
        capability: of the GPU, 90 for 9.0.
    """
    if not isinstance(turn.problem, ConvProblem):
        return [*ways]
    if any(tensor.offset_bytes % _LINE for tensor in turn.operands.values()):
        return [*ways]
    sparse = sparsity != "disable"
    key = (key_of(turn), effort, device.gpu.uuid, sparse)
    listed = _offered.get(key)
    if listed is not None:
        recipes = tuple(repacked(recipe, turn.problem, turn.constants, device) for recipe in listed)
    else:
        wanted = turn.problem if sparse else replace(turn.problem, pattern="")
        recipes = library_recipes(wanted, turn.constants, device, effort=effort)
        plain = tuple(replace(recipe, constants={}) for recipe in recipes)
        compiling.remember(_offered, {key: plain}, _MOST_OFFERED)
    made = _made(recipes, capability)
    found = [*ways, *(_way(recipe, made, sparsity) for recipe in recipes)]
    reason = left_out(turn.problem, effort)
    if reason and sparse and gemm_cusparselt.takes(turn.problem, capability):
        found.append(Candidate(gemm_cusparselt.NAME, "", reason=reason))
    return found


def own_ways(
    turns: Sequence[Turn],
    choices: Mapping[tuple[Any, ...], Choice],
    device: Device | None,
    capability: int,
    effort: int,
) -> list[Way]:
    """What was chosen for turns like each, with each one's own constants.

    Args:
        turns: all of them.
        choices: by `key_of`.
        device: the GPU, which packs what its libraries read.
        capability: of the GPU, 90 for 9.0.
        effort: that the choices were made with.
    """
    first = {key_of(turn): turn for turn in reversed(turns)}
    others = [turn for turn in turns if first[key_of(turn)] is not turn]
    recipes = []
    for turn in others:
        chosen = choices[key_of(turn)].way.recipe
        if any(isinstance(call, LibraryKernel) for call in chosen.calls):
            assert device is not None
            recipe = repacked(chosen, turn.problem, turn.constants, device)
        else:
            offers = offered(turn.problem, turn.constants, capability, effort)
            name = (chosen.tactic, chosen.config)
            recipe = next(each for each in offers if (each.tactic, each.config) == name)
        recipes.append(_aligned(recipe, turn))
    made = _made(recipes, capability)
    own = {id(turn): choices[key].way for key, turn in first.items()}
    for turn, recipe in zip(others, recipes, strict=True):
        way = _way(recipe, made, "enable")
        if isinstance(way, Candidate):
            raise Error(f"{way.tactic} {way.config} for {turn.op.name!r}", [way.reason])
        own[id(turn)] = way
    return [own[id(turn)] for turn in turns]


def _made(
    recipes: Iterable[Recipe], capability: int, tell: compiling.Tell | None = None
) -> dict[int, compiling.Code]:
    """The code of every kernel of the recipes, by the identity of the call."""
    calls = [c for r in recipes for c in r.calls if not isinstance(c, LibraryKernel)]
    return dict(zip(map(id, calls), compiling.compile_all(calls, capability, tell), strict=True))


def _way(recipe: Recipe, made: Mapping[int, compiling.Code], sparsity: str) -> Way | Candidate:
    """A recipe with its code; or that it is out, and why."""
    if is_sparse(recipe.tactic) and sparsity == "disable":
        ruled = "sparse kernels were ruled out: --sparsity disable"
        return Candidate(recipe.tactic, recipe.config, reason=ruled)
    code = tuple(made.get(id(call)) for call in recipe.calls)
    for each in code:
        if isinstance(each, str):
            return Candidate(recipe.tactic, recipe.config, reason=f"cannot be compiled: {each}")
    return Way(recipe, tuple(c for c in code if not isinstance(c, str)))


def _aligned(recipe: Recipe, turn: Turn) -> Recipe:
    """The recipe, told which operands begin at no multiple of 16 bytes."""
    off = tuple(role for role, t in turn.operands.items() if t.offset_bytes % _LINE)
    if not off:
        return recipe
    calls = tuple(
        replace(call, unaligned=tuple(role for role in call.roles if role in off))
        if isinstance(call, Kernel)
        else call
        for call in recipe.calls
    )
    return replace(recipe, calls=calls)


def choose(
    turn: Turn,
    ways: Sequence[Way | Candidate],
    timer: Timer | None,
    sparsity: str,
) -> Choice:
    """The fastest way; the first one where nothing is timed.

    Args:
        turn: the turn.
        ways: all that can be done for it, or was refused.
        timer: runs and times; None without a GPU.
        sparsity: "force" takes a sparse way where there is one.

    Raises:
        UnsupportedError: there is none.
    """
    refused = [way for way in ways if isinstance(way, Candidate)]
    usable = [way for way in ways if isinstance(way, Way)]
    if sparsity == "force" and any(is_sparse(way.recipe.tactic) for way in usable):
        dense = [way for way in usable if not is_sparse(way.recipe.tactic)]
        usable = [way for way in usable if is_sparse(way.recipe.tactic)]
        why = "dense kernels were ruled out: --sparsity force"
        refused += [Candidate(w.recipe.tactic, w.recipe.config, reason=why) for w in dense]
    timed: list[tuple[float, Way]] = []
    seen: list[Candidate] = []
    for way in usable:
        if timer is None:
            timed.append((math.inf, way))
            continue
        try:
            time_us = timer(turn, way)
        except (UnsupportedError, EngineError, WrongError, RuntimeError, ValueError) as error:
            reason = f"{_WRONG if isinstance(error, WrongError) else _FAILS}: {_text(error)}"
            refused.append(Candidate(way.recipe.tactic, way.recipe.config, reason=reason))
            continue
        timed.append((time_us, way))
        seen.append(Candidate(way.recipe.tactic, way.recipe.config, time_us))
    if not timed:
        reasons = [f"{c.tactic} {c.config}: {c.reason}" for c in refused[:10]]
        raise UnsupportedError(
            f"no kernel can run {turn.op.name!r} ({turn.op.op_type}) on this GPU",
            reasons or [f"no tactic takes {turn.problem}"],
            "report it with the model; --target cpu builds for the CPU",
        )
    best_us, best = min(timed, key=lambda entry: entry[0])
    time = None if timer is None else best_us
    if timer is None:
        seen = [Candidate(best.recipe.tactic, best.recipe.config)]
    return Choice(best, time, tuple(sorted(seen, key=_by_time)) + tuple(refused))


def wrong_ones(choices: Iterable[Choice]) -> tuple[str, ...]:
    """Kernels that computed something else than they should and were not taken, in words."""
    reasons = {
        f"{each.tactic} {each.config} was not taken: {each.reason}": None
        for choice in choices
        for each in choice.candidates
        if each.reason.startswith(_WRONG)
    }
    return tuple(reasons)[:_MOST_TOLD]


def _by_time(candidate: Candidate) -> float:
    return math.inf if candidate.time_us is None else candidate.time_us


def _text(error: Exception) -> str:
    what = getattr(error, "what", "") or str(error)
    return "; ".join([what, *getattr(error, "reasons", ())])[:300]


def random_operand(dtype: str, count: int, seed: int) -> Array:
    """Elements as a network has them, never all zero, as bytes of the type."""
    return np.resize(_random(dtype, min(count, _BLOCK), seed), count)


def _random(dtype: str, count: int, seed: int) -> Array:
    random = np.random.default_rng(seed)
    if dtype in ("int8", "uint8"):
        return random.integers(-100 if dtype == "int8" else 0, 100, count).astype(dtype)
    if dtype in ("bool", "int32", "int64"):
        return random.integers(0, 2, count).astype(dtype)
    values = random.standard_normal(count).astype(np.float32)
    if dtype == "float16":
        return values.astype(np.float16)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    if dtype == "float8e4m3fn":
        return random.integers(0x28, 0x50, count).astype(np.uint8) | (
            random.integers(0, 2, count).astype(np.uint8) << 7
        )
    return values
