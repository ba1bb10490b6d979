"""GPUs as NVML tells of them."""

from __future__ import annotations

import pytest

from tests.fake_nvml import CUT, SLICE, UUID, FakeNvml
from twofour.core.nvml import THROTTLES, GpuState, Nvml, energy_counter


def test_all_that_a_gpu_tells() -> None:
    whole, cut, part = Nvml(FakeNvml()).states()
    assert whole == GpuState(
        UUID,
        "A GPU",
        1 << 30,
        4 << 30,
        utilization=0.75,
        power_watts=350.5,
        power_limit_watts=700.0,
        energy_joules=5.0,
        temperature_celsius=61.0,
        throttles=("sw_power_cap", "hw_thermal"),
    )
    assert (cut.uuid, part.uuid) == (CUT, SLICE)
    assert part == GpuState(SLICE, "A GPU", 1 << 30, 4 << 30)


def test_it_is_opened_once() -> None:
    library = FakeNvml()
    nvml = Nvml(library)
    nvml.states()
    nvml.states()
    assert library.opened == 1


def test_without_package_or_driver_there_is_nothing() -> None:
    assert Nvml(None).states() == ()
    assert Nvml(None).why_not() == "the package nvidia-ml-py is missing"
    library = FakeNvml()
    library.fails = True
    assert Nvml(library).states() == ()
    assert Nvml(library).why_not() == "Driver Not Loaded"


def test_energy_in_microjoules() -> None:
    counter = energy_counter(0, FakeNvml())
    assert (counter.name, counter.read_uj(), counter.range_uj()) == ("A GPU", 5_000_000, 0)
    with pytest.raises(OSError, match="Not Supported"):
        energy_counter(1, FakeNvml())
    with pytest.raises(OSError, match="Invalid Argument"):
        energy_counter(2, FakeNvml())


def test_energy_of_a_gpu_by_its_uuid() -> None:
    assert energy_counter(UUID, FakeNvml()).read_uj() == 5_000_000
    with pytest.raises(OSError, match="Not Supported"):
        energy_counter(CUT, FakeNvml())
    with pytest.raises(OSError, match="Not Found"):
        energy_counter("GPU-dddd", FakeNvml())


def test_names_and_bits_are_those_of_the_library() -> None:
    real = pytest.importorskip("pynvml")
    functions = [name for name in vars(FakeNvml) if name.startswith("nvmlDevice")]
    assert [name for name in functions if not hasattr(real, name)] == []
    assert THROTTLES["hw_thermal"] == real.nvmlClocksThrottleReasonHwThermalSlowdown
    assert THROTTLES["sw_power_cap"] == real.nvmlClocksThrottleReasonSwPowerCap
    assert THROTTLES["sw_thermal"] == real.nvmlClocksThrottleReasonSwThermalSlowdown
    assert THROTTLES["hw_power_brake"] == real.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
