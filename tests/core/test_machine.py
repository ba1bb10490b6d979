"""What is read of a machine: planted trees of other machines, and of next to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from twofour.core import machine
from twofour.core.machine import Cache, CpuTimes, read_machine
from twofour.core.target import parse_cpuinfo


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def cpus(count: int, cores: int, sockets: int = 1) -> dict[str, str]:
    """Hardware threads count up over all cores first, as Linux has it."""
    folder = "sys/devices/system/cpu"
    found = {f"{folder}/online": f"0-{count - 1}"}
    for cpu in range(count):
        topology = f"{folder}/cpu{cpu}/topology"
        found[f"{topology}/core_id"] = str(cpu % cores % (cores // sockets))
        found[f"{topology}/physical_package_id"] = str(cpu % cores // (cores // sockets))
    return found


def cache(index: int, level: str, kind: str, size: str, shared: str) -> dict[str, str]:
    folder = f"sys/devices/system/cpu/cpu0/cache/index{index}"
    names = ("level", "type", "size", "shared_cpu_list")
    return {f"{folder}/{n}": v for n, v in zip(names, (level, kind, size, shared), strict=True)}


def test_a_server_with_two_sockets(tmp_path: Path) -> None:
    files = {
        **cpus(16, 8, 2),
        **cache(0, "1", "Data", "48K", "0,8"),
        **cache(1, "1", "Instruction", "32K", "0,8"),
        **cache(2, "2", "Unified", "2048K", "0,8"),
        **cache(3, "3", "Unified", "60M", "0-3,8-11"),
        "sys/devices/system/node/online": "0-1",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave",
        "sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never",
        "sys/kernel/mm/transparent_hugepage/hpage_pmd_size": "2097152",
        "proc/meminfo": "MemTotal:       131072 kB\nMemAvailable:    65536 kB\nHugePages_Total: 0",
        "proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu avx2",
    }
    found = read_machine(plant(tmp_path, files))
    assert (found.threads, found.cores, found.sockets, found.numa_nodes) == (16, 8, 2, 2)
    assert found.caches == (
        Cache("L1d", 48 << 10, 2),
        Cache("L1i", 32 << 10, 2),
        Cache("L2", 2 << 20, 2),
        Cache("L3", 60 << 20, 8),
    )
    assert (found.memory_bytes, found.available_bytes) == (128 << 20, 64 << 20)
    assert (found.huge_pages, found.huge_page_bytes) == ("always", 2 << 20)
    assert (found.governor, found.cpu_quota, found.virtual) == ("powersave", None, False)


def test_a_container_on_arm(tmp_path: Path) -> None:
    """Its cgroup's parent allows less than it does itself; there are no caches to see."""
    files = {
        **cpus(4, 4),
        "proc/self/cgroup": "0::/pod/box",
        "sys/fs/cgroup/cpu.max": "max 100000",
        "sys/fs/cgroup/pod/cpu.max": "150000 100000",
        "sys/fs/cgroup/pod/box/cpu.max": "400000 100000",
        "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd0c",
    }
    found = read_machine(plant(tmp_path, files))
    assert (found.threads, found.cores) == (4, 4)
    assert (found.cpu_quota, found.caches, found.huge_pages) == (1.5, (), "")


def test_the_quota_of_an_old_cgroup(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/cpu"
    files = {f"{folder}/cpu.cfs_quota_us": "50000", f"{folder}/cpu.cfs_period_us": "100000"}
    assert read_machine(plant(tmp_path, files)).cpu_quota == 0.5
    plant(tmp_path, {f"{folder}/cpu.cfs_quota_us": "-1"})
    assert read_machine(tmp_path).cpu_quota is None


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    found = read_machine(tmp_path)
    assert found == machine.Machine(
        None, None, None, None, (), None, None, "", None, "", None, False
    )
    assert machine.cpu_times(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [("0", (0,)), ("0-2,5", (0, 1, 2, 5)), ("", ()), ("nonsense", ()), ("0-", ())],
)
def test_lists_of_cpus(text: str, found: tuple[int, ...]) -> None:
    assert machine.parse_cpu_list(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cpu  10 1 4 80 3 0 2 7 0 0\ncpu0 1 1 1 1", CpuTimes(17, 7, 107)),
        ("cpu  10 1 4 80", CpuTimes(15, 0, 95)),
        ("intr 1 2 3", None),
        ("", None),
    ],
)
def test_times(text: str, found: CpuTimes | None) -> None:
    assert machine.parse_cpu_times(text) == found


@pytest.mark.parametrize(
    ("text", "size"), [("32K", 32768), ("1M", 1 << 20), ("64", 64), ("", None), ("x", None)]
)
def test_sizes(text: str, size: int | None) -> None:
    assert machine.parse_size_text(text) == size


def test_names_of_cpus() -> None:
    intel = (
        "processor : 0\nmodel name : A CPU\nflags : avx512_vnni fma\n\nmodel name : B\nflags : x"
    )
    assert parse_cpuinfo(intel) == ("A CPU", frozenset({"avx512vnni", "fma"}))
    arm = "CPU implementer : 0x41\nCPU part : 0xd40\nFeatures : asimd sve"
    assert parse_cpuinfo(arm) == ("Arm Neoverse V1", frozenset({"asimd", "sve"}))
    assert parse_cpuinfo(arm.replace("0xd40", "0x1"))[0] == "ARM core 0x41:0x1"
    assert parse_cpuinfo("") == ("", frozenset())
