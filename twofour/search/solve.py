"""One choice for each unit: a knapsack of several choices, as an integer program.

    minimise   sum of harms       subject to   sum of times <= limit         least_harm
    minimise   sum of times       subject to   sum of harms <= limit         fastest

Two neighbouring units of different kinds (int8 beside float32, say) take time for what passes
between them. With x[u, c] = 1 where unit u has choice c:

    sum_c x[u, c] = 1
    y[e, a, b] >= sum of x[u, c of kind a] + sum of x[v, c of kind b] - 1,   0 <= y <= 1

for each edge e from u to v and each pair of kinds that costs something; as costs are not negative,
y is 1 where it has to be and 0 elsewhere. The solver is HiGHS, through scipy; it is exact up to
the gap below, and deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from twofour.core.errors import UnsupportedError

_GAP = 1e-4  # of the optimum; measured times are known less well
_NODES = 20_000  # of the search tree: a bound that is the same on every machine
_TIE = 1e-6
_OPTIMAL, _LIMIT, _INFEASIBLE = 0, 1, 2
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Edge:
    """A tensor that one unit makes and another one reads.

    Attributes:
        source: index of the unit that makes it.
        target: index of the unit that reads it.
        costs: kind of the source, kind of the target -> what the passage takes; pairs that are
            missing take nothing.
    """

    source: int
    target: int
    costs: Mapping[tuple[int, int], float]


@dataclass(frozen=True)
class Problem:
    """What there is to choose from.

    Attributes:
        times: of each choice of each unit.
        harms: likewise, 0 or more.
        kinds: likewise, the number of the kind of choice that it is.
        edges: between units.
        fixed: time that no choice changes.
    """

    times: Sequence[Sequence[float]]
    harms: Sequence[Sequence[float]]
    kinds: Sequence[Sequence[int]]
    edges: Sequence[Edge] = ()
    fixed: float = 0.0

    def time(self, chosen: Sequence[int]) -> float:
        """Of a choice for each unit."""
        whole = self.fixed + sum(t[c] for t, c in zip(self.times, chosen, strict=True))
        for edge in self.edges:
            ends = [self.kinds[u][chosen[u]] for u in (edge.source, edge.target)]
            whole += edge.costs.get((ends[0], ends[1]), 0.0)
        return whole

    def harm(self, chosen: Sequence[int]) -> float:
        """Of a choice for each unit."""
        return sum(h[c] for h, c in zip(self.harms, chosen, strict=True))


def fastest(problem: Problem, most_harm: float) -> tuple[int, ...] | None:
    """The choices that take the least time, their harms together at most so much.

    Returns:
        An index for each unit; None where nothing holds the limit.
    """
    program = _Program(problem)
    return program.solve(program.times, program.harms, most_harm)


def least_harm(problem: Problem, most_time: float) -> tuple[int, ...] | None:
    """The choices that do the least harm, their times together at most so much."""
    program = _Program(problem)
    return program.solve(program.harms, program.times, most_time - problem.fixed)


class _Program:
    """The integer program: first the choices of all units, then the passages."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        counts = [len(each) for each in problem.times]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(int)
        self._passages = [
            (edge, pair, cost)
            for edge in problem.edges
            for pair, cost in edge.costs.items()
            if cost > 0 and pair[0] != pair[1]
        ]
        choices, passages = int(self._starts[-1]), len(self._passages)
        zeros = np.zeros(passages)
        self.times: Vector = np.concatenate(
            [np.fromiter((t for each in problem.times for t in each), float, choices), zeros]
        )
        self.times[choices:] = [cost for _, _, cost in self._passages]
        self.harms: Vector = np.concatenate(
            [np.fromiter((h for each in problem.harms for h in each), float, choices), zeros]
        )
        self._integer = np.concatenate([np.ones(choices), zeros])

    def solve(self, goal: Vector, bounded: Vector, limit: float) -> tuple[int, ...] | None:
        """Minimises `goal` within `limit` of `bounded`; of equal ones, what has less of that."""
        scale = float(np.abs(bounded).max(initial=0.0)) or 1.0
        goals = float(np.abs(goal).max(initial=0.0)) or 1.0
        if not np.isfinite(limit):
            limit = 2 * float(np.abs(bounded).sum()) + 1.0
        found = milp(
            goal / goals + _TIE * bounded / scale,
            integrality=self._integer,
            bounds=Bounds(0, 1),
            constraints=[
                self._one_each(),
                *self._passing(),
                LinearConstraint(bounded[None] / scale, -np.inf, limit / scale),
            ],
            options={"mip_rel_gap": _GAP, "node_limit": _NODES},
        )
        if found.status == _INFEASIBLE or (found.x is None and found.status == _LIMIT):
            return None
        if found.x is None:
            raise UnsupportedError("the solver found no answer", [str(found.message)])
        starts = self._starts
        return tuple(int(np.argmax(found.x[a:b])) for a, b in pairwise(starts))

    def _one_each(self) -> LinearConstraint:
        matrix = lil_matrix((len(self._starts) - 1, len(self.times)))
        for unit, (a, b) in enumerate(pairwise(self._starts)):
            matrix[unit, a:b] = 1
        return LinearConstraint(matrix.tocsr(), 1, 1)

    def _passing(self) -> list[LinearConstraint]:
        """For each passage: x[u, kind a] + x[v, kind b] - y <= 1."""
        if not self._passages:
            return []
        matrix = lil_matrix((len(self._passages), len(self.times)))
        first, kinds = int(self._starts[-1]), self._problem.kinds
        for row, (edge, pair, _) in enumerate(self._passages):
            for unit, kind in zip((edge.source, edge.target), pair, strict=True):
                for c, own in enumerate(kinds[unit]):
                    if own == kind:
                        matrix[row, self._starts[unit] + c] = 1
            matrix[row, first + row] = -1
        return [LinearConstraint(matrix.tocsr(), -np.inf, 1)]
