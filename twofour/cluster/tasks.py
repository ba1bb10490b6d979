"""A scan's items on the machines of a Ray cluster: a `Spread` (see `core/scan.py`).

    with on_ray("auto") as spread:
        results = scan(items, start, cache, spread=spread)

One actor of Ray is one worker: it prepares once, then answers items one after another. As many are
asked for as there are items, `jobs` at most; those that the cluster has no room for yet take part
when it has. An item whose worker or machine ends is done again by another one, a few times. Items
with a target are built and timed: their worker is on a machine that can run it, and asks for all of
its CPUs, so that nothing else of the cluster runs beside it.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from twofour.cluster.connect import connect
from twofour.cluster.nodes import Nodes, cannot_run, cpus_by_node, require_versions
from twofour.cluster.sending import Packed, pack
from twofour.cluster.worker import Place, Worker
from twofour.core.errors import Error, InputError, UnsupportedError
from twofour.core.processes import AnyStart, located
from twofour.core.scan import Arrivals, Item
from twofour.core.target import Target

log = logging.getLogger(__name__)
TRIES = 3
"""So often an item is given to a worker."""
SENT_BYTES = 1 << 30
"""Most that all files may have which are not on every machine."""
PATIENCE_S = 10.0
LOST = (
    RayActorError,
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    WorkerCrashedError,
)
Note = Callable[[str], None]


@contextmanager
def on_ray(
    address: str = "", jobs: int | None = None, threads: int = 1, note: Note = log.warning
) -> Iterator[RayTasks]:
    """Connects to a cluster, if this process has not, and disconnects at the end.

    Args:
        address: "auto", the cluster of this machine; "host:port", that of its head; "": one is
            started on this machine, and ended at the end.
        jobs: workers at most; by default as many as the cluster has CPUs for.
        threads: of each worker, which asks for as many CPUs.
        note: told what the user should know while it works.

    Raises:
        InputError: there is no such cluster, it runs other versions, or fewer than 1 job.
    """
    if jobs is not None and jobs < 1:
        raise InputError(f"cannot work with {jobs} workers", ["expected at least 1"])
    ours = not ray.is_initialized()
    try:
        if ours:
            connect(address)
        fit = sum(int(cpus // threads) for cpus in cpus_by_node().values())
        yield RayTasks(jobs or max(1, fit), threads, note=note)
    finally:
        if ours:
            ray.shutdown()


@dataclass(frozen=True)
class RayTasks:
    """A `Spread` over the cluster that this process is connected to.

    Attributes:
        jobs: workers at most.
        threads: of each.
        sent_bytes: most that all files may have which are not on every machine.
        note: told what the user should know.
    """

    jobs: int
    threads: int = 1
    sent_bytes: int = SENT_BYTES
    note: Note = log.warning

    def results(self, items: Sequence[Item], start: AnyStart) -> Arrivals:
        """As `Spread.results`.

        Raises:
            InputError: the work or a file cannot be sent, or a machine runs other versions.
            UnsupportedError: workers end at an item or at their start, a function fails with an
                error that is none of ours, or no machine can run a target.
            Error: whatever the function raised of these, its item named.
        """
        pool = _Pool(self, items, pack(start, [item.argument for item in items]))
        try:
            yield from pool.results()
        except RayError as e:
            raise UnsupportedError(
                "the Ray cluster failed", str(e).splitlines(), "see its logs: ray status"
            ) from e
        finally:
            pool.close()


@dataclass
class _Hand:
    """A worker, and what it was asked last.

    Attributes:
        actor: of Ray.
        target: of the items that it is for.
        node: Ray's id of the machine that it has to be on; "" for any.
        step: "look", "begin" or "answer".
        index: of the item that it is at; None as long as it prepares.
        name: of the machine, as soon as it is known.
    """

    actor: Any
    target: Target | None
    node: str
    step: str = "look"
    index: int | None = None
    name: str = ""


@dataclass
class _Pool:
    """The workers of one scan."""

    spread: RayTasks
    items: Sequence[Item]
    packed: Packed
    waiting: dict[Target | None, deque[int]] = field(default_factory=dict)
    hands: dict[Any, _Hand] = field(default_factory=dict)
    tries: Counter[int] = field(default_factory=Counter)
    ended_early: int = 0
    placed: bool = False
    told: bool = False
    start: Any = None
    sent: dict[int, Any] = field(default_factory=dict)
    nodes: Nodes = field(default_factory=Nodes)

    def __post_init__(self) -> None:
        """Hires nobody yet."""
        for index, item in enumerate(self.items):
            self.waiting.setdefault(item.target, deque()).append(index)
        self.start = ray.put(self.packed.start)

    def results(self) -> Arrivals:
        """Until every item has one."""
        left = len(self.items)
        while left:
            self.hire()
            ready, _ = ray.wait(list(self.hands), timeout=PATIENCE_S)
            for ref in ready:
                hand = self.hands.pop(ref)
                try:
                    found = self.advance(hand, ref)
                except Error:
                    ray.kill(hand.actor)
                    raise
                if found is not None:
                    left -= 1
                    yield found
            if not (ready or self.placed or self.told):
                self.told = True
                self.spread.note("waiting for the cluster: it may have no free CPU")

    def close(self) -> None:
        """Ends all workers, whatever they are at."""
        for hand in self.hands.values():
            ray.kill(hand.actor)
        self.hands.clear()

    def hire(self) -> None:
        """As many workers as have something to do, and no more."""
        for ref, hand in list(self.hands.items()):
            if hand.index is None and not self.waiting[hand.target]:
                ray.kill(hand.actor)
                del self.hands[ref]
        for target, waiting in self.waiting.items():
            preparing = sum(h.index is None and h.target == target for h in self.hands.values())
            while preparing < len(waiting) and len(self.hands) < self.spread.jobs:
                self.add(target)
                preparing += 1

    def add(self, target: Target | None) -> None:
        """One more worker.

        Raises:
            UnsupportedError: no machine can run the target.
        """
        options: dict[str, Any] = {"num_cpus": self.spread.threads, "scheduling_strategy": "SPREAD"}
        node = ""
        if target is not None:
            busy = Counter(hand.node for hand in self.hands.values())
            best = self.nodes.best(target, busy)
            node, strategy = best.id, NodeAffinitySchedulingStrategy(best.id, soft=False)
            options = {"num_cpus": best.cpus, "scheduling_strategy": strategy}
        make: Any = ray.remote(Worker)
        actor = make.options(**options).remote(os.getcwd())
        self.hands[actor.look.remote(self.packed.files)] = _Hand(actor, target, node)

    def advance(self, hand: _Hand, ref: Any) -> tuple[Item, Any] | None:
        """Takes what a worker found, and asks it for more.

        Returns:
            A result, if that is what it was asked for.
        """
        try:
            found = ray.get(ref)
        except RayTaskError as e:
            raise self.failed(hand, e) from e
        except LOST as e:
            ray.kill(hand.actor)
            self.lost(hand, e)
            return None
        if hand.step == "look":
            self.begin(hand, found)
            return None
        if hand.step == "begin":
            if isinstance(found, Error):
                raise found
            self.ended_early = 0
            self.give(hand)
            return None
        assert hand.index is not None
        item = self.items[hand.index]
        if isinstance(found, Error):
            raise located(item.name, found)
        self.give(hand)
        return item, found

    def begin(self, hand: _Hand, place: Place) -> None:
        """Lets a worker prepare, with the files that it lacks."""
        self.placed = True
        require_versions(place)
        self.require_room(place)
        hand.step, hand.name = "begin", place.node
        contents = [self.content(number) for number in place.lacking]
        ref = hand.actor.begin.remote(self.start, self.packed.files, place.lacking, *contents)
        self.hands[ref] = hand

    def content(self, number: int) -> Any:
        """A file in Ray's object store, where all workers find it."""
        if number not in self.sent:
            self.sent[number] = ray.put(self.packed.files[number].contents())
        return self.sent[number]

    def require_room(self, place: Place) -> None:
        """Refuses to send too much. Raises InputError."""
        files = [self.packed.files[number] for number in place.lacking]
        size = sum(file.size_bytes for file in files)
        if size > self.spread.sent_bytes:
            largest = max(files, key=lambda file: file.size_bytes)
            raise InputError(
                f"{largest.path} is not on node {place.node} of the cluster",
                [
                    f"expected files of at most {self.spread.sent_bytes / 1e6:,.1f} MB, which are "
                    f"sent there, got {size / 1e6:,.1f} MB"
                ],
                "put it under a path that every node has, such as a shared disk, and name that",
            )

    def give(self, hand: _Hand) -> None:
        """The next item, or the end."""
        waiting = self.waiting[hand.target]
        if not waiting:
            ray.kill(hand.actor)
            return
        hand.step, hand.index = "answer", waiting.popleft()
        self.hands[hand.actor.answer.remote(self.packed.arguments[hand.index])] = hand

    def lost(self, hand: _Hand, error: RayError) -> None:
        """A worker is gone: its item waits again.

        Raises:
            UnsupportedError: it was not the first one.
        """
        reasons = [line.strip() for line in str(error).splitlines() if line.strip()]
        fix = "use fewer --jobs if memory ran out; without --ray the cause is seen best"
        if hand.index is None:
            self.ended_early += 1
            if self.ended_early >= TRIES * min(self.spread.jobs, len(self.items)):
                raise UnsupportedError("workers of the cluster end as they begin", reasons, fix)
            return
        item = self.items[hand.index]
        self.tries[hand.index] += 1
        if self.tries[hand.index] >= TRIES:
            raise UnsupportedError(f"{TRIES} workers ended at {item.name}", reasons, fix)
        self.spread.note(f"a worker on {hand.name} ended at {item.name}, which is done again")
        self.waiting[hand.target].appendleft(hand.index)

    def failed(self, hand: _Hand, error: RayTaskError) -> Error:
        """What says that a worker raised something that is not expected."""
        if hand.step == "look":
            return cannot_run(hand.name, error)
        where = "its start" if hand.index is None else self.items[hand.index].name
        trace = [line for line in str(error).splitlines() if line.strip()]
        return UnsupportedError(
            f"a worker on {hand.name} failed at {where}",
            trace,
            "mend what raised it; without --ray and with one job it is seen best",
        )
