"""Joules from counters: a made-up sysfs tree and a made-up NVML, read by the real code."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from twofour.bench.energy import (
    Energy,
    Unavailable,
    gpu_counters,
    measure,
    processor_counters,
)
from twofour.core.errors import InputError

RANGE_UJ = 262_143_328_850


def powercap(root: Path, **domains: tuple[str, int]) -> Path:
    """A tree as Linux has it: folder -> name and microjoules; colons for dashes."""
    for folder, (name, energy_uj) in domains.items():
        at = root / folder.replace("__", ":").replace("_", "-")
        at.mkdir(parents=True)
        (at / "name").write_text(f"{name}\n")
        (at / "energy_uj").write_text(f"{energy_uj}\n")
        (at / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    return root


def consuming(joules: float, *files: Path) -> Callable[[], None]:
    """A run that lets each counter rise by so much, and starts it again at its range."""

    def run() -> None:
        for file in files:
            energy_uj = (int(file.read_text()) + round(1e6 * joules)) % RANGE_UJ
            file.write_text(f"{energy_uj}\n")

    return run


def test_the_packages_are_summed_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    root = powercap(
        tmp_path,
        intel_rapl=("", 0),
        intel_rapl__0=("package-0", 5_000_000),
        intel_rapl__0__0=("core", 4_000_000),
        intel_rapl__1=("package-1", 7_000_000),
        intel_rapl__2=("psys", 90_000_000),
        intel_rapl_mmio__0=("package-0", 5_000_000),
    )
    counters = processor_counters(root)
    assert [each.name for each in counters] == ["package-0", "package-1"]
    files = [each / "energy_uj" for each in root.iterdir()]
    found = measure(consuming(0.25, *files), 0.05, counters=counters)
    assert isinstance(found, Energy)
    assert found.joules == pytest.approx(0.5)  # a quarter in each of two packages
    assert found.watts == pytest.approx(0.5 * found.runs / found.seconds)
    assert found.seconds >= 0.05
    assert found.source == "package-0, package-1"
    assert (found.idle_watts, found.above_idle_joules) == (None, None)


def test_a_counter_that_starts_again_at_0(tmp_path: Path) -> None:
    root = powercap(tmp_path, intel_rapl__0=("package-0", RANGE_UJ - 1_000_000))
    found = measure(
        consuming(0.3, root / "intel-rapl:0" / "energy_uj"),
        0.05,
        counters=processor_counters(root),
    )
    assert found.joules == pytest.approx(0.3, rel=1e-5)


def test_it_may_start_again_many_times_in_a_long_measurement(tmp_path: Path) -> None:
    """Each run takes longer than the counter is left alone."""
    root = powercap(tmp_path, intel_rapl__0=("package-0", 0))
    consume = consuming(0.7e-6 * RANGE_UJ, root / "intel-rapl:0" / "energy_uj")

    def run() -> None:
        time.sleep(0.55)
        consume()

    found = measure(run, 2.0, counters=processor_counters(root))
    assert found.runs >= 2
    assert found.joules == pytest.approx(0.7e-6 * RANGE_UJ, rel=1e-5)


def test_what_the_device_takes_to_do_nothing(tmp_path: Path) -> None:
    """A counter that rises with the clock at 10 W, and by 2 J in each run."""
    start, runs = time.perf_counter(), []

    class Clock:
        name = "clock"

        def read_uj(self) -> int:
            return int(1e6 * (10 * (time.perf_counter() - start) + 2 * len(runs)))

        def range_uj(self) -> int:
            return 0

    def run() -> None:
        time.sleep(0.01)
        runs.append(1)

    found = measure(run, 0.2, idle_s=0.2, counters=[Clock()])
    assert found.idle_watts == pytest.approx(10, rel=0.05)
    assert found.above_idle_joules == pytest.approx(2, rel=0.05)
    assert found.joules > 2.05


def test_a_refused_read_names_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted, since the user of these tests may be root, who may read everything."""
    root = powercap(tmp_path, intel_rapl__0=("package-0", 0))
    real = Path.read_text

    def read_text(self: Path, *arguments: object, **named: object) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **named)

    monkeypatch.setattr(Path, "read_text", read_text)
    found = processor_counters(root)
    assert isinstance(found, Unavailable)
    assert str(found).startswith("unavailable: ")
    assert "intel-rapl:0/energy_uj: Permission denied (sudo chmod a+r" in str(found)


def test_without_counters_it_says_so(tmp_path: Path) -> None:
    for root in (tmp_path / "none", powercap(tmp_path / "some", dtpm=("dtpm", 0))):
        found = measure(lambda: None, 0.01, counters=processor_counters(root))
        assert isinstance(found, Unavailable)
        assert "no energy counter" in str(found)


def test_a_counter_that_stands_still_measures_nothing(tmp_path: Path) -> None:
    root = powercap(tmp_path, intel_rapl__0=("package-0", 5))
    found = measure(lambda: None, 0.02, counters=processor_counters(root))
    assert isinstance(found, Unavailable)
    assert "package-0) stood still" in found.reason


def test_damaged_and_vanishing_counters(tmp_path: Path) -> None:
    root = powercap(tmp_path, intel_rapl__0=("package-0", 5))
    counters = processor_counters(root)
    file = root / "intel-rapl:0" / "energy_uj"
    found = measure(lambda: file.unlink(missing_ok=True), 0.02, counters=counters)
    assert "could not be read" in found.reason
    file.write_text("many")
    assert "damaged" in processor_counters(root).reason


class NVMLError(Exception):
    pass


def nvml(counts_mj: bool = True, devices: int = 1) -> SimpleNamespace:
    """A library with one GPU that consumes 3 mJ between two looks."""
    state = {"mj": 1000}

    def handle(index: int) -> int:
        if index >= devices:
            raise NVMLError("Invalid Argument")
        return index

    def energy(handle: int) -> int:
        if not counts_mj:
            raise NVMLError("Not Supported")
        state["mj"] += 3
        return state["mj"]

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetName=lambda handle: "A GPU",
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )


def test_a_gpu() -> None:
    found = measure(lambda: None, 0.001, counters=gpu_counters(0, nvml()))
    assert found.source == "A GPU"
    assert found.joules * found.runs == pytest.approx(0.003)


@pytest.mark.parametrize(
    ("index", "library", "message"),
    [
        (0, None, "the package nvidia-ml-py is missing"),
        (0, nvml(counts_mj=False), "has no energy counter: Not Supported"),
        (2, nvml(), "NVIDIA GPU 2 has no energy counter: Invalid Argument"),
    ],
)
def test_gpus_without_a_counter(index: int, library: object, message: str) -> None:
    found = gpu_counters(index, library)
    assert isinstance(found, Unavailable)
    assert message in str(found)
    assert measure(lambda: None, 0.01, counters=found) == found


def test_this_machine_has_a_figure_or_a_reason() -> None:
    found = measure(lambda: sum(range(1000)), 0.3)
    if isinstance(found, Energy):
        assert 0 < found.watts < 5000
    else:
        assert found.reason


@pytest.mark.parametrize(("seconds", "idle"), [(0, 0), (-1, 0), (float("nan"), 0), (1, -1)])
def test_no_time(seconds: float, idle: float) -> None:
    with pytest.raises(InputError, match="bad time"):
        measure(lambda: None, seconds, idle)
