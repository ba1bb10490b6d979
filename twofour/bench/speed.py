"""What this machine can do at most, measured in less than two seconds: for doctor."""

from __future__ import annotations

from dataclasses import dataclass

from twofour.bench.timing import Contestant, Schedule, race
from twofour.compiler.peak import measure_peaks
from twofour.compiler.rates import copy_gbps, reader
from twofour.core.machine import Machine, usable_cores
from twofour.core.progress import Report, silent
from twofour.core.target import host_target

_LEAST_BYTES, _MOST_THREADS = 1 << 24, 64
_READING = Schedule(duration_s=0.3, slice_s=0.02, pause_s=0.0, warm_s=0.002, min_rounds=4)


@dataclass(frozen=True)
class Speed:
    """Rates of this machine.

    Attributes:
        peak_gmacs: kind of kernel -> thousand millions of multiply-adds a second of one core,
            counted as if dense.
        copy_gbps: of one core within its second-level cache, bytes read and written together.
        read_gbps: of one core from memory.
        read_all_gbps: of `threads` hardware threads together from memory.
        threads: all that this process may use, 64 at most.
    """

    peak_gmacs: dict[str, float]
    copy_gbps: float
    read_gbps: float
    read_all_gbps: float
    threads: int


def measure_speed(machine: Machine, report: Report = silent) -> Speed:
    """Measures.

    Args:
        machine: this one: how much has to be read to leave its caches.
        report: told how far it is.
    """
    target = host_target()
    report(0, 3, "multiply-adds")
    peaks = measure_peaks(1, target).gmacs
    report(1, 3, "caches")
    copied = copy_gbps(target)
    report(2, 3, "memory")
    threads = min(usable_cores(), _MOST_THREADS)
    size = _bytes_each(machine, threads)
    calls = [reader(target, size) for _ in range(threads)]
    one = Contestant("one", "", "", calls[0], dict)
    everybody = Contestant("all", "", "", calls[0], dict, tuple(calls[1:]))
    alone, together = race([one, everybody], _READING)
    report(3, 3, "memory")
    each = 1e-9 * size
    return Speed(peaks, copied, each * alone.per_second, each * together.per_second, threads)


def _bytes_each(machine: Machine, threads: int) -> int:
    """So much that a thread's share of the last cache holds a quarter of it, if there is memory."""
    last = machine.caches[-1] if machine.caches else None
    wanted = 4 * last.size_bytes // last.shared_by if last else _LEAST_BYTES
    room = (machine.available_bytes or 1 << 32) // 4 // threads
    return max(min(max(wanted, _LEAST_BYTES), room), 1 << 20)
