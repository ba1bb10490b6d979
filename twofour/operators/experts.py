"""Routed experts and the masked MLP as operators: only what is chosen is computed.

    choose, sort (or select)      which rows each expert has
    gather                        those rows, side by side, quantized where weights are int8
    first product                 each expert's rows by its weights, and the activation
    quantize (or gate)            where weights are int8; SwiGlu multiplies its halves first
    second product
    combine                       by token

Time grows with the rows that are routed, not with the number of experts. Meaning and names:
core/experts.py, core/experts_text.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from twofour.core.experts import DOMAIN, MIXTURE
from twofour.core.experts_text import BY_NAME, NAMES, function_text, inputs_of
from twofour.core.plugins import Array, Code, CpuTactic, CudaTactic, Operator, Problem
from twofour.core.target import Target
from twofour.kernels.cpu.problem import Config
from twofour.kernels.cpu.tactic import Tactic, tactics
from twofour.operators.experts_plan import Plan, operand, weights, why_not_sized
from twofour.operators.experts_products import Layer, as_filters, product_problem, product_stages
from twofour.operators.experts_route import combine_stage, routing_stages

_TOLERANCE = 1e-5
_ROUNDED_TOLERANCE = 5e-3  # an activation may fall on the other side of a step of its row
_PRODUCTS = ("dense", "2:4", "2:4 H", "2:4 C", "2:4 pair")
_RATIOS = (1, 4)  # rows of an expert, relative to the usual ones, that tiles are made for
_FEW = 4  # times as many rows as other products take: weights are read from further away
_AND = " then "
_CUDA = (CudaTactic("routed experts", "twofour.operators.experts_cuda"),)


def _refuse(tactic: Tactic, problem: Problem, target: Target) -> str:
    """Why a kernel cannot do the products of every expert; "" if it can."""
    if reason := why_not_sized(problem):
        return reason
    base, _, quantized = BY_NAME[problem.operator]
    names = inputs_of(base, quantized=quantized)[2:]
    if computed := [name for name in names if operand(problem, name).constant is None]:
        return f"needs constant weights: {computed[0]!r} is computed while running"
    plan = Plan.of(problem)
    if not 1 <= plan.k <= plan.experts:
        return f"k is {plan.k}: expected 1 to {plan.experts}, the number of experts"
    if tactic.most_positions is not None and plan.usual_rows > _FEW * tactic.most_positions:
        return f"for few rows: an expert has about {plan.usual_rows} here"
    for number in (1, 2):
        asked = product_problem(plan, number, plan.usual_rows)
        for expert, w in enumerate(weights(problem, f"w{number}")):
            if reason := tactic.refuse(asked, as_filters(w), target.isa):
                return f"w{number} of expert {expert}: {reason}"
    return ""


def _candidates(tactic: Tactic, plan: Plan, number: int, isa: str) -> list[Config]:
    """Configurations of one product: the best guess for usual experts, and for busy ones."""
    found: list[Config] = []
    for ratio in _RATIOS:
        rows = min(plan.slots, ratio * plan.usual_rows)
        tiles = tactic.configs(product_problem(plan, number, rows), isa)
        found += [config for config in tiles if not config.panels_outside][:1]
    return list(dict.fromkeys(found))


def _pairs(tactic: Tactic, problem: Problem, target: Target) -> dict[str, tuple[Config, Config]]:
    """Configurations of both products, by their words."""
    plan = Plan.of(problem)
    first, second = (_candidates(tactic, plan, number, target.isa) for number in (1, 2))
    count = max(len(first), len(second))
    pairs = [(first[i % len(first)], second[i % len(second)]) for i in range(count)]
    return {f"{a}{_AND}{b}": (a, b) for a, b in pairs}


def _configs(tactic: Tactic, problem: Problem, target: Target) -> Sequence[str]:
    return tuple(_pairs(tactic, problem, target))


def _emit(tactic: Tactic, problem: Problem, target: Target, config: str) -> Code:
    """All stages."""
    plan = Plan.of(problem)
    pair = _pairs(tactic, problem, target)[config]
    layers = [Layer(n, plan, tactic, each, target.isa) for n, each in enumerate(pair, 1)]
    products, constants = product_stages(problem, plan, layers)
    stages = (*routing_stages(problem, plan), *products, combine_stage(problem, plan))
    weights_at = tuple(range(2, len(problem.inputs)))
    precision = "int8" if plan.quantized else "float32"
    return Code(stages, constants, plan.offsets["end"], weights_at, precision)


def _cpu_tactics(*, quantized: bool) -> tuple[CpuTactic, ...]:
    """One for each kernel of a product."""
    dtype = "int8" if quantized else "float32"
    usable = [t for t in tactics() if t.dtype == dtype and t.name in _PRODUCTS]
    return tuple(
        CpuTactic(
            f"routed {tactic.name}",
            partial(_emit, tactic),
            partial(_refuse, tactic),
            partial(_configs, tactic),
        )
        for tactic in usable
    )


def _route_samples(problem: Problem, random: np.random.Generator) -> Sequence[Array]:
    """Normal rows; logits far enough apart that no rounding changes who is chosen."""
    x, logits = (each for each in problem.inputs[:2] if each is not None)
    ranks = random.permuted(
        np.broadcast_to(np.arange(logits.shape[-1], dtype=np.float32), logits.shape), axis=-1
    )
    spread = 4 / max(1, logits.shape[-1])
    values = spread * (ranks + random.uniform(-0.4, 0.4, logits.shape))
    return [random.standard_normal(x.shape, np.float32), values.astype(np.float32)]


def _mask_samples(problem: Problem, random: np.random.Generator) -> Sequence[Array]:
    """Normal rows, half of them set."""
    x, mask = (each for each in problem.inputs[:2] if each is not None)
    return [random.standard_normal(x.shape, np.float32), random.random(mask.shape) < 0.5]


def _operator(name: str, base: str, activation: str, quantized: bool) -> Operator:
    samples: Callable[..., Sequence[Array]] = _route_samples if base == MIXTURE else _mask_samples
    return Operator(
        DOMAIN,
        name,
        function_text(base, activation, quantized=quantized),
        tactics={"cpu": _cpu_tactics(quantized=quantized), "cuda": _CUDA},
        samples=samples,
        tolerance=_ROUNDED_TOLERANCE if quantized else _TOLERANCE,
    )


OPERATORS = tuple(_operator(*each) for each in NAMES)
"""Every base with every activation, in floats and in int8."""
