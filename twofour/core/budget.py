"""The fewest items to leave alone so that a drop stays within a limit, by few evaluations.

A pure search over sets: what an item is (a layer that stays float) and how a set is judged is the
caller's. One evaluation, of a network on all samples, takes seconds, so each set is judged once and
their number is bounded.

    1. none left alone: within the limit, nothing has to be done; all left alone: if even that is
       beyond it, there is no answer
    2. each item left alone by itself, the likeliest first: what that gains gives the order. If one
       is enough, that is the answer
    3. the shortest prefix of the order that holds the limit, by bisection
    4. members of it that turn out not to be needed, the least gain first

Where gains add up, the answer is the smallest set there is. Where they do not, every answer has
been judged and holds the limit, and with evaluations left no member can be taken out alone; a
smaller set of other members may exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Judge = Callable[[Sequence[frozenset[str]]], Sequence[float]]
"""The drop for each of several sets that are left alone; infinite where it is not a number."""

LEAST_EVALUATIONS = 8
_AT_ONCE = 4
"""Items judged between two looks at whether one is enough; what runs in parallel, too. Fixed, so
that the number of processes does not change the answer."""
_SLACK = 1e-9  # a drop of exactly the limit holds, whatever binary fractions make of it


@dataclass(frozen=True)
class Choice:
    """What the search found.

    Attributes:
        left: the items to leave alone, the largest gain first; all of them where nothing holds.
        holds: whether the drop of `left` is within the limit.
        drop: with `left` left alone.
        drop_of_none: with no item left alone.
        drop_of_all: with all left alone; None if that was not needed.
        gains: by how much an item left alone makes the drop smaller, of those that were judged.
        evaluations: sets that were judged.
    """

    left: tuple[str, ...]
    holds: bool
    drop: float
    drop_of_none: float
    drop_of_all: float | None
    gains: Mapping[str, float]
    evaluations: int


def fewest(items: Sequence[str], judge: Judge, limit: float, most: int) -> Choice:
    """Finds a small set that holds the limit.

    Args:
        items: each once, the likeliest to matter first.
        judge: deterministic; given at least one set, each of them new.
        limit: of the drop.
        most: evaluations, at least `LEAST_EVALUATIONS`.

    Raises:
        ValueError: an item is there twice, or fewer evaluations are allowed than it takes.
    """
    if len(set(items)) < len(items) or most < LEAST_EVALUATIONS:
        raise ValueError(f"items {list(items)} at {most} evaluations")
    return _Search(items, judge, limit, most).run()


class _Search:
    def __init__(self, items: Sequence[str], judge: Judge, limit: float, most: int) -> None:
        self._items, self._judge = items, judge
        self._limit, self._most = limit, most
        self._drops: dict[frozenset[str], float] = {}

    def run(self) -> Choice:
        """The steps of the module's text."""
        if self._holds(()) or not self._items:
            return self._choice((), {})
        if not self._holds(self._items):
            return self._choice(tuple(self._items), {})
        gains = self._gains()
        order = _ordered(self._items, gains)
        enough = [name for name in order if self._known((name,)) <= self._limit + _SLACK]
        if enough:
            return self._choice(enough[:1], gains)
        return self._choice(self._needed(self._prefix(order)), gains)

    def _gains(self) -> dict[str, float]:
        """Of each item alone, as far as the evaluations allow, until one is enough."""
        kept = math.ceil(math.log2(len(self._items) + 1)) + self._most // 8
        count = max(1, min(len(self._items), self._most - len(self._drops) - kept))
        gains: dict[str, float] = {}
        for start in range(0, count, _AT_ONCE):
            names = self._items[start : min(start + _AT_ONCE, count)]
            drops = self._look([frozenset((name,)) for name in names])
            gains |= {name: self._gain(drop) for name, drop in zip(names, drops, strict=True)}
            if min(drops) <= self._limit + _SLACK:
                break
        return gains

    def _gain(self, drop: float) -> float:
        """0 where neither network gives a number."""
        before = self._known(())
        return 0.0 if before == drop else before - drop

    def _prefix(self, order: Sequence[str]) -> list[str]:
        """A prefix that holds, the next shorter one not; of all items that is known."""
        fails, holds = 0, len(order)
        while holds - fails > 1 and self._may():
            middle = (fails + holds) // 2
            if self._holds(order[:middle]):
                holds = middle
            else:
                fails = middle
        return list(order[:holds])

    def _needed(self, members: list[str]) -> list[str]:
        """Takes out, one after the other, what is not needed."""
        changed = True
        while changed:
            changed = False
            for name in reversed(members):
                less = [each for each in members if each != name]
                if (self._may() or frozenset(less) in self._drops) and self._holds(less):
                    members, changed = less, True
        return members

    def _choice(self, left: Sequence[str], gains: Mapping[str, float]) -> Choice:
        everything = frozenset(self._items)
        drop = self._known(left)
        return Choice(
            tuple(left),
            drop <= self._limit + _SLACK,
            drop,
            self._known(()),
            self._drops.get(everything) if everything else None,
            gains,
            len(self._drops),
        )

    def _may(self) -> bool:
        return len(self._drops) < self._most

    def _holds(self, names: Iterable[str]) -> bool:
        return self._look([frozenset(names)])[0] <= self._limit + _SLACK

    def _known(self, names: Iterable[str]) -> float:
        return self._drops.get(frozenset(names), math.inf)

    def _look(self, sets: Sequence[frozenset[str]]) -> list[float]:
        fresh = [each for each in sets if each not in self._drops]
        if fresh:
            self._drops.update(zip(fresh, self._judge(fresh), strict=True))
        return [self._drops[each] for each in sets]


def _ordered(items: Sequence[str], gains: Mapping[str, float]) -> list[str]:
    """Those that gain, the most first; those not judged, as they were; those that do not gain."""
    gaining = [name for name in items if gains.get(name, 0.0) > 0]
    unknown = [name for name in items if name not in gains]
    useless = [name for name in items if gains.get(name, 1.0) <= 0]

    def less(name: str) -> float:
        return -gains[name]

    return [*sorted(gaining, key=less), *unknown, *sorted(useless, key=less)]
