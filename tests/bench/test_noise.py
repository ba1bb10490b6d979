"""What makes times unsteady is told, and nothing where all is well or unknown."""

from __future__ import annotations

import dataclasses

from twofour.bench import noise
from twofour.core.machine import CpuTimes, Machine

QUIET = Machine(8, 8, 1, 1, (), None, None, "", None, "performance", None, False)


def test_a_machine_set_up_well() -> None:
    assert noise.reasons(QUIET, 8) == []
    unknown = dataclasses.replace(QUIET, threads=None, cores=None, governor="")
    assert noise.reasons(unknown, 8) == []


def test_each_reason() -> None:
    for change, words in (
        ({"governor": "powersave"}, "governor is powersave"),
        ({"cpu_quota": 2.5}, "2.5 cores' worth of time on 8"),
        ({"threads": 16}, "hardware threads share cores"),
    ):
        (found,) = noise.reasons(dataclasses.replace(QUIET, **change), 8)
        assert words in found
    assert noise.reasons(dataclasses.replace(QUIET, cpu_quota=8.0), 8) == []


def test_what_others_took() -> None:
    before = CpuTimes(1000, 10, 10000)
    assert noise.busy(before, CpuTimes(1005, 10, 10160), 8) == []
    (busy,) = noise.busy(before, CpuTimes(1060, 10, 10160), 8)
    assert busy == "others compute on 3.0 of 8 hardware threads"
    assert noise.stolen(before, CpuTimes(1000, 11, 10160)) == []
    (stolen,) = noise.stolen(before, CpuTimes(1000, 18, 10160))
    assert stolen == "the hypervisor took 5% of the time"


def test_looks_that_tell_nothing() -> None:
    one = CpuTimes(1000, 10, 10000)
    for before, after, threads in ((None, one, 8), (one, None, 8), (one, one, 8), (one, one, None)):
        assert noise.busy(before, after, threads) == []
        assert noise.stolen(before, after) == []
