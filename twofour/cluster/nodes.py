"""The machines of a cluster: which of them can run code for a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from twofour.cluster.worker import VERSIONS, Place, look
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.target import Target, missing_features


@dataclass(frozen=True)
class Node:
    """One machine.

    Attributes:
        id: Ray's.
        cpus: that Ray may give to work on it.
        place: what it is.
    """

    id: str
    cpus: float
    place: Place

    def lacks(self, target: Target) -> tuple[str, ...]:
        """What keeps it from running code for a target."""
        return missing_features(target, self.place.host)


def cpus_by_node() -> dict[str, float]:
    """Of those that are alive."""
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"]: node["Resources"].get("CPU", 0) for node in found if node["Alive"]}


def require_versions(place: Place) -> None:
    """Refuses a machine whose answers may be others than this one's. Raises InputError."""
    if place.versions != VERSIONS:
        raise InputError(
            f"node {place.node} of the cluster runs other versions",
            [f"expected {VERSIONS}, as here", f"got {place.versions}"],
            "install the same versions on every node",
        )


def cannot_run(node: str, error: RayError) -> InputError:
    """What says that a machine could not even begin."""
    trace = [line for line in str(error).splitlines() if line.strip()]
    return InputError(
        f"node {node} of the cluster cannot run twofour" if node else "a node cannot run twofour",
        trace[-3:],
        f"install {VERSIONS} on every node, with the packages that the work needs",
    )


@dataclass
class Nodes:
    """What is known of the machines. Each is asked once, when its target is to be known."""

    known: dict[str, Node] = field(default_factory=dict)

    def alive(self) -> tuple[Node, ...]:
        """Those with CPUs; asks the ones that are not known yet.

        Raises:
            InputError: one of them runs other versions.
        """
        cpus = {node: count for node, count in cpus_by_node().items() if count > 0}
        ask = ray.remote(num_cpus=0, max_retries=0)(look)
        asked = {
            node: ask.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote()
            for node in cpus
            if node not in self.known
        }
        for node, ref in asked.items():
            try:
                place = ray.get(ref)
            except RayTaskError as e:
                raise cannot_run(node, e) from e
            except RayError:  # it has ended meanwhile
                continue
            require_versions(place)
            self.known[node] = Node(node, cpus[node], place)
        return tuple(self.known[node] for node in cpus if node in self.known)

    def best(self, target: Target, busy: Mapping[str, int]) -> Node:
        """The one to build for a target on: of its model, then the one with the least to do.

        Args:
            target: that code is for.
            busy: workers by id of their machine.

        Raises:
            UnsupportedError: none can run it.
        """
        nodes = self.alive()
        able = [node for node in nodes if not node.lacks(target)]
        if not able:
            raise UnsupportedError(
                f"no node of the cluster can run {target}",
                [
                    f"{node.place.node} ({node.place.host.model}) lacks "
                    f"{', '.join(node.lacks(target))}"
                    for node in nodes
                ]
                or ["no node has a CPU that Ray may use"],
                "add such a node, or leave the target out: kernels are timed where they run",
            )
        return min(able, key=lambda n: (n.place.host.model != target.model, busy.get(n.id, 0)))
