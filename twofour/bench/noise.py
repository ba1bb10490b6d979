"""What makes times of this machine unsteady: told beside a measurement, and by doctor."""

from __future__ import annotations

import time
from dataclasses import dataclass

from twofour.core.machine import CpuTimes, Machine, cpu_times, read_machine, usable_cores

_LOOK_S = 0.2
_BUSY_THREADS, _STOLEN_SHARE = 0.3, 0.01


@dataclass(frozen=True)
class Watch:
    """Looks at the machine before and after a measurement.

    Attributes:
        found: what is known before.
        before: what had been computed then.
    """

    found: tuple[str, ...]
    before: CpuTimes | None

    @staticmethod
    def begin() -> Watch:
        """Takes 0.2 s in which this process sleeps."""
        machine = read_machine()
        found = (*reasons(machine, usable_cores()), *others_now(machine))
        return Watch(found, cpu_times())

    def end(self) -> list[str]:
        """What made the times since then unsteady, a sentence each."""
        return [*self.found, *stolen(self.before, cpu_times())]


def reasons(machine: Machine, usable: int) -> list[str]:
    """What stands in the way of steady times as the machine is set up, a sentence each.

    Args:
        machine: this one.
        usable: hardware threads that this process may use.
    """
    found = []
    if machine.governor and machine.governor != "performance":
        found.append(
            f"the clock's governor is {machine.governor}, which changes the clock as it sees fit: "
            "sudo cpupower frequency-set -g performance"
        )
    if machine.cpu_quota is not None and machine.cpu_quota < usable:
        found.append(
            f"the cgroup allows {machine.cpu_quota:g} cores' worth of time on {usable} cores: "
            "what takes more is stopped for some milliseconds"
        )
    if machine.threads and machine.cores and machine.threads > machine.cores:
        found.append("hardware threads share cores: what runs on one slows down the other")
    return found


def others_now(machine: Machine) -> list[str]:
    """What else computes at the moment, looked at for 0.2 s while this process sleeps."""
    before = cpu_times()
    time.sleep(_LOOK_S)
    after = cpu_times()
    return [*busy(before, after, machine.threads), *stolen(before, after)]


def busy(before: CpuTimes | None, after: CpuTimes | None, threads: int | None) -> list[str]:
    """A sentence if hardware threads were computing between two looks."""
    if before is None or after is None or after.total <= before.total or not threads:
        return []
    used = threads * (after.busy - before.busy) / (after.total - before.total)
    if used <= _BUSY_THREADS:
        return []
    return [f"others compute on {used:.1f} of {threads} hardware threads"]


def stolen(before: CpuTimes | None, after: CpuTimes | None) -> list[str]:
    """A sentence if the hypervisor took much between two looks."""
    if before is None or after is None or after.total <= before.total:
        return []
    share = (after.stolen - before.stolen) / (after.total - before.total)
    return [f"the hypervisor took {share:.0%} of the time"] if share > _STOLEN_SHARE else []
