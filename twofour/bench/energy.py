"""Joules of one inference, from the counters that a machine has.

    RAPL    energy of the processor's packages, /sys/class/powercap/intel-rapl:N (Intel, AMD)
    NVML    energy of an NVIDIA GPU since its driver was loaded, through nvidia-ml-py

    found = measure(lambda: session.run(feeds), seconds=2.0)
    found.joules, found.watts            # or found.reason, of what is Unavailable

Both count all that the device consumes, whoever causes it: another process, and what it takes to do
nothing. `idle_s` measures the latter first. Without a counter (virtual machines hide them) there is
no figure: one that is estimated from a data sheet would be none.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from twofour.core import nvml
from twofour.core.errors import InputError
from twofour.core.nvml import EnergyCounter, energy_counter
from twofour.core.progress import Report, silent

POWERCAP = Path("/sys/class/powercap")
_PACKAGE = re.compile(r"intel-rapl:\d+")
_POLL_S = 0.5  # a package's counter wraps after a minute at the earliest
_FIX_READ = "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj, or run as root"


class Counter(Protocol):
    """An energy counter that only rises, but for starting again at 0."""

    @property
    def name(self) -> str:
        """Of the device."""

    def read_uj(self) -> int:
        """Microjoules since some time."""

    def range_uj(self) -> int:
        """It starts again at 0 after so many; 0 where it never does."""


@dataclass(frozen=True)
class Energy:
    """What runs consumed.

    Attributes:
        joules: of one run.
        watts: on average while it ran.
        idle_watts: before, while this process slept; None where it was not measured.
        runs: how many were measured.
        seconds: that they took together.
        source: the counters, in words.
    """

    joules: float
    watts: float
    idle_watts: float | None
    runs: int
    seconds: float
    source: str

    @property
    def above_idle_joules(self) -> float | None:
        """Of one run, without what the device takes to do nothing."""
        if self.idle_watts is None:
            return None
        return (self.watts - self.idle_watts) * self.seconds / self.runs


@dataclass(frozen=True)
class Unavailable:
    """Why there is no figure.

    Attributes:
        reason: in words.
        fix: what would help; "" where nothing would.
    """

    reason: str
    fix: str = ""

    def __str__(self) -> str:
        """Both, in one line."""
        return f"unavailable: {self.reason}{f' ({self.fix})' if self.fix else ''}"


@dataclass(frozen=True)
class RaplDomain:
    """A package's counter.

    Attributes:
        name: "package-0".
        folder: of its files.
    """

    name: str
    folder: Path

    def read_uj(self) -> int:
        """Raises OSError or ValueError where it cannot be read."""
        return int((self.folder / "energy_uj").read_text())

    def range_uj(self) -> int:
        """The same."""
        return int((self.folder / "max_energy_range_uj").read_text())


def processor_counters(powercap: Path = POWERCAP) -> tuple[RaplDomain, ...] | Unavailable:
    """Of all packages. `psys`, which holds them and more, and their parts are left out.

    Args:
        powercap: the folder that the system lists them in.
    """
    try:
        folders = sorted(each for each in powercap.iterdir() if _PACKAGE.fullmatch(each.name))
        named = [RaplDomain((each / "name").read_text().strip(), each) for each in folders]
        found = tuple(each for each in named if each.name.startswith("package"))
        for each in found:
            each.read_uj()
            each.range_uj()
    except FileNotFoundError:
        found = ()
    except PermissionError as e:
        return Unavailable(f"{e.filename}: {e.strerror}", _FIX_READ)
    except (OSError, ValueError) as e:
        return Unavailable(f"a damaged energy counter in {powercap}: {e}")
    if not found:
        return Unavailable(
            "this machine shows no energy counter of its processor (RAPL); virtual machines and "
            "containers hide it"
        )
    return found


def gpu_counters(
    which: int | str, library: Any = nvml.LIBRARY
) -> tuple[EnergyCounter, ...] | Unavailable:
    """Of one NVIDIA GPU.

    Args:
        which: its number as NVML counts, whatever a process sees of them; or its UUID.
        library: pynvml; None where it is not installed.
    """
    if library is None:
        return Unavailable("the package nvidia-ml-py is missing", nvml.INSTALL)
    try:
        return (energy_counter(which, library),)
    except OSError as e:
        return Unavailable(f"NVIDIA GPU {which} has no energy counter: {e}")


def measure(
    call: Callable[[], object],
    seconds: float = 2.0,
    idle_s: float = 0.0,
    counters: Sequence[Counter] | Unavailable | None = None,
    report: Report = silent,
) -> Energy | Unavailable:
    """Runs for some time, and divides what was consumed by the number of runs.

    Args:
        call: one run, finished when it returns.
        seconds: at least; at least one run.
        idle_s: to sleep before, for `Energy.idle_watts`.
        counters: by default the processor's.
        report: told the tenths of a second.

    Raises:
        InputError: no time.
    """
    if not (0 < seconds < 1e5 and 0 <= idle_s < 1e5):
        got = [f"expected seconds above 0, got {seconds} and {idle_s} idle"]
        raise InputError("bad time to measure energy", got, "give a few seconds")
    found = processor_counters() if counters is None else counters
    if isinstance(found, Unavailable):
        return found
    call()
    idle_watts = None
    if idle_s:
        idle = _consumed(found, lambda: time.sleep(min(idle_s, 0.1)), idle_s, silent)
        if isinstance(idle, Unavailable):
            return idle
        idle_watts = idle.joules / idle.seconds
    ran = _consumed(found, call, seconds, report)
    if isinstance(ran, Unavailable):
        return ran
    watts = ran.joules / ran.seconds
    source = ", ".join(each.name for each in found)
    return Energy(ran.joules / ran.runs, watts, idle_watts, ran.runs, ran.seconds, source)


@dataclass(frozen=True)
class _Consumed:
    joules: float
    runs: int
    seconds: float


def _consumed(
    counters: Sequence[Counter], call: Callable[[], object], seconds: float, report: Report
) -> _Consumed | Unavailable:
    """Calls until the time is over; the counters are read often enough to see each restart."""
    clock = time.perf_counter
    try:
        ranges = [each.range_uj() for each in counters]
        before = [each.read_uj() for each in counters]
        start = polled = clock()
        total, runs = 0, 0
        while True:
            call()
            runs += 1
            now = clock()
            over = now - start >= seconds
            if over or now - polled >= _POLL_S:
                read = [each.read_uj() for each in counters]
                steps = zip(before, read, ranges, strict=True)
                total += sum(_risen(*step) for step in steps)
                before, polled = read, now
                report(min(int(10 * (now - start)), int(10 * seconds)), int(10 * seconds), "energy")
            if over:
                break
    except (OSError, ValueError) as e:
        return Unavailable(f"an energy counter could not be read: {e}")
    if not total:
        names = ", ".join(each.name for each in counters)
        return Unavailable(f"the energy counter ({names}) stood still for {now - start:.1f} s")
    return _Consumed(1e-6 * total, runs, now - start)


def _risen(before: int, now: int, range_uj: int) -> int:
    """What a counter counted, if it started again at most once."""
    if now >= before:
        return now - before
    return now - before + range_uj if range_uj else now
