"""Machines unlike this one, for doctor."""

from __future__ import annotations

import pytest

from twofour.bench.probe import Probe
from twofour.bench.speed import Speed
from twofour.cli import doctor
from twofour.core import gpus, machine, target
from twofour.core.gpus import Gpu
from twofour.core.machine import Cache, Machine
from twofour.core.target import Host

SPEED = Speed({"int8 dense": 20.0, "float32 dense": 5.0}, 30.0, 10.0, 20.0, 4)
PROBE = Probe("int8", "2:4", 100.0, 70.0, 100 / 70, 400.0)
UNKNOWN = Machine(None, None, None, None, (), None, None, "", None, "", None, False)
KNOWN = Machine(
    threads=16,
    cores=8,
    sockets=2,
    numa_nodes=2,
    caches=(Cache("L1d", 48 << 10, 2), Cache("L3", 32 << 20, 8)),
    memory_bytes=128 << 30,
    available_bytes=64 << 20,
    huge_pages="never",
    huge_page_bytes=2 << 20,
    governor="powersave",
    cpu_quota=0.5,
    virtual=True,
)


def plant_machine(patch: pytest.MonkeyPatch, found: Machine, has: tuple[Gpu, ...]) -> None:
    """An ARM CPU of which nothing else is known but this, and no optional package."""
    host = Host("aarch64", "Arm Neoverse N1", frozenset({"asimd"}), 4)
    patch.setattr(target, "detect_host", lambda: host)
    patch.setattr(machine, "read_machine", lambda: found)
    patch.setattr(gpus, "read_gpus", lambda: has)
    patch.setattr(doctor, "_version", lambda name: None)
    patch.setattr(doctor, "_probes", lambda out: [PROBE])
    patch.setattr(doctor, "_speed", lambda machine, out: SPEED)
