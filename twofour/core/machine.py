"""What Linux tells of the machine: cores, caches, memory, and what makes its times unsteady.

Everything is read below a root folder, and what is not there is unknown: in a container, on another
system or architecture any of these files may be missing. Sources: Linux
Documentation/ABI/testing/sysfs-devices-system-cpu, admin-guide/mm/transhuge, admin-guide/cgroup-v2,
proc(5).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
_CPUS = "sys/devices/system/cpu"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Cache:
    """One kind of cache.

    Attributes:
        name: "L1d", "L1i", "L2", "L3".
        size_bytes: of one.
        shared_by: hardware threads that share one.
    """

    name: str
    size_bytes: int
    shared_by: int


@dataclass(frozen=True)
class Machine:
    """What is known; None or "" or empty: unknown.

    Attributes:
        threads: hardware threads that run, whether this process may use them or not.
        cores: of them, those that do not share a core.
        sockets: processors.
        numa_nodes: parts of the memory.
        caches: those of the first hardware thread.
        memory_bytes: in all.
        available_bytes: that may be taken without swapping.
        huge_pages: transparent ones: "always", "madvise" or "never".
        huge_page_bytes: size of one.
        governor: of the clock.
        cpu_quota: cores' worth of time that the cgroup allows.
        virtual: whether a hypervisor lies below.
    """

    threads: int | None
    cores: int | None
    sockets: int | None
    numa_nodes: int | None
    caches: tuple[Cache, ...]
    memory_bytes: int | None
    available_bytes: int | None
    huge_pages: str
    huge_page_bytes: int | None
    governor: str
    cpu_quota: float | None
    virtual: bool


@dataclass(frozen=True)
class CpuTimes:
    """Ticks since the start of the system, over all hardware threads.

    Attributes:
        busy: computing, for whomever.
        stolen: that the hypervisor gave to other machines.
        total: all of them.
    """

    busy: int
    stolen: int
    total: int


def read_machine(root: Path = ROOT) -> Machine:
    """Reads what there is below `root`."""
    online = parse_cpu_list(_text(root, f"{_CPUS}/online"))
    topology = [
        (
            _text(root, f"{_CPUS}/cpu{cpu}/topology/physical_package_id"),
            _text(root, f"{_CPUS}/cpu{cpu}/topology/core_id"),
        )
        for cpu in online
    ]
    known = [each for each in topology if all(each)]
    memory = parse_meminfo(_text(root, "proc/meminfo"))
    flags = re.search(r"^flags\s*:(.*)$", _text(root, "proc/cpuinfo"), re.MULTILINE)
    transparent = "sys/kernel/mm/transparent_hugepage"
    return Machine(
        len(online) or None,
        len(set(known)) or None,
        len({package for package, _ in known}) or None,
        len(parse_cpu_list(_text(root, "sys/devices/system/node/online"))) or None,
        _caches(root),
        memory.get("MemTotal"),
        memory.get("MemAvailable"),
        parse_choice(_text(root, f"{transparent}/enabled")),
        parse_size_text(_text(root, f"{transparent}/hpage_pmd_size")),
        _text(root, f"{_CPUS}/cpu0/cpufreq/scaling_governor"),
        _quota(root),
        flags is not None and "hypervisor" in flags[1].split(),
    )


def usable_cores() -> int:
    """Hardware threads that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_times(root: Path = ROOT) -> CpuTimes | None:
    """What has been computed so far; None where that is unknown."""
    return parse_cpu_times(_text(root, "proc/stat"))


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """0-3,8 -> (0, 1, 2, 3, 8); nothing for what is no such list."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            return ()
        first = int(match[1])
        found += range(first, int(match[2] or first) + 1)
    return tuple(found)


def parse_meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo -> bytes by name."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)
    return {name: int(size) << 10 for name, size in found}


def parse_choice(text: str) -> str:
    """What is chosen of "always [madvise] never"; "" if nothing is."""
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else ""


def parse_size_text(text: str) -> int | None:
    """32K -> 32768; None for what is no size."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    return int(match[1]) * _UNITS[match[2]] if match else None


def parse_cpu_times(text: str) -> CpuTimes | None:
    """The first line of /proc/stat: user nice system idle iowait irq softirq steal."""
    match = re.match(r"cpu\s+((?:\d+ ?)+)", text)
    ticks = [int(each) for each in match[1].split()] if match else []
    if len(ticks) < 4:
        return None
    ticks = (ticks + [0] * 4)[:8]  # guests are counted as user, too; old systems have fewer
    total, stolen = sum(ticks), ticks[7]
    return CpuTimes(total - ticks[3] - ticks[4] - stolen, stolen, total)


def parse_quota(text: str) -> float | None:
    """1.5 of cpu.max "150000 100000" (cgroup v2); None for "max 100000"."""
    match = re.fullmatch(r"(\d+) (\d+)", text)
    return int(match[1]) / int(match[2]) if match and int(match[2]) else None


def _quota(root: Path) -> float | None:
    """The least of those of this process's cgroup and its parents, of version 2 or 1."""
    group = re.search(r"^0::(/.*)$", _text(root, "proc/self/cgroup"), re.MULTILINE)
    parts = [part for part in group[1].split("/") if part] if group else []
    folders = ["/".join(["sys/fs/cgroup", *parts[:depth]]) for depth in range(len(parts) + 1)]
    texts = [_text(root, f"{folder}/cpu.max") for folder in folders]
    first = "sys/fs/cgroup/cpu"
    texts.append(
        f"{_text(root, f'{first}/cpu.cfs_quota_us')} {_text(root, f'{first}/cpu.cfs_period_us')}"
    )
    found = [quota for quota in map(parse_quota, texts) if quota]
    return min(found, default=None)


def _caches(root: Path) -> tuple[Cache, ...]:
    found = []
    for index in range(8):
        folder = f"{_CPUS}/cpu0/cache/index{index}"
        level, kind = _text(root, f"{folder}/level"), _text(root, f"{folder}/type")
        size = parse_size_text(_text(root, f"{folder}/size"))
        if level and size:
            letter = {"Data": "d", "Instruction": "i"}.get(kind, "")
            shared = len(parse_cpu_list(_text(root, f"{folder}/shared_cpu_list"))) or 1
            found.append(Cache(f"L{level}{letter}", size, shared))
    return tuple(found)


def _text(root: Path, path: str) -> str:
    """A file's text without the space around it; "" if it cannot be read."""
    try:
        return (root / path).read_text(errors="replace").strip()
    except OSError:
        return ""
