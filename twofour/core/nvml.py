"""What NVIDIA's driver tells of its GPUs (NVML, through nvidia-ml-py): load, memory, power, limits.

Reading changes nothing. A call can take milliseconds: never make one in the thread of an event
loop.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

try:
    import pynvml
except ImportError:
    pynvml = None

LIBRARY: Any = pynvml
"""None where it is not installed."""
INSTALL = "pip install nvidia-ml-py"
THROTTLES = {
    "sw_power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sync_boost": 0x10,
    "sw_thermal": 0x20,
    "hw_thermal": 0x40,
    "hw_power_brake": 0x80,
}
"""Why clocks are lower than they could be -> its bit in what NVML gives."""
_TEMPERATURE = 0  # of the chip


@dataclass(frozen=True)
class GpuState:
    """A GPU, or a slice of one, at one moment; None is what it does not tell.

    Attributes:
        uuid: "GPU-..." or "MIG-...".
        name: as the driver has it.
        memory_used_bytes: by all processes.
        memory_total_bytes: there are.
        utilization: share of the last moment in which a kernel ran, 0 to 1.
        power_watts: now.
        power_limit_watts: at which it slows down.
        energy_joules: since the driver was loaded.
        temperature_celsius: of the chip.
        throttles: names of `THROTTLES` that hold now.
    """

    uuid: str
    name: str
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    utilization: float | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    energy_joules: float | None = None
    temperature_celsius: float | None = None
    throttles: tuple[str, ...] | None = None


class Nvml:
    """The library, opened when first asked.

    Attributes:
        library: pynvml; None where it is not installed.
    """

    def __init__(self, library: Any = LIBRARY) -> None:
        """Opens nothing yet."""
        self.library = library
        self._lock = threading.Lock()
        self._why: str | None = None

    def why_not(self) -> str:
        """Why nothing can be asked; "" where something can. Opens the library once."""
        with self._lock:
            if self._why is None:
                self._why = self._opened()
            return self._why

    def _opened(self) -> str:
        if self.library is None:
            return "the package nvidia-ml-py is missing"
        try:
            self.library.nvmlInit()
        except self.library.NVMLError as error:
            return str(error)
        return ""

    def states(self) -> tuple[GpuState, ...]:
        """Every GPU, each followed by its slices; none where nothing can be asked."""
        if self.why_not():
            return ()
        count = self._ask("nvmlDeviceGetCount") or 0
        handles = (self._ask("nvmlDeviceGetHandleByIndex", index) for index in range(count))
        return tuple(
            self._state(each)
            for handle in handles
            if handle is not None
            for each in (handle, *self._slices(handle))
        )

    def name(self, handle: Any) -> str:
        """Of a GPU."""
        return _text(self._ask("nvmlDeviceGetName", handle) or "an NVIDIA GPU")

    def _slices(self, handle: Any) -> Iterator[Any]:
        """Those that a GPU is cut into."""
        mode = self._ask("nvmlDeviceGetMigMode", handle)
        if not mode or not mode[0]:
            return
        for index in range(self._ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            found = self._ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
            if found is not None:
                yield found

    def _state(self, handle: Any) -> GpuState:
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        rates = self._ask("nvmlDeviceGetUtilizationRates", handle)
        reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        return GpuState(
            _text(self._ask("nvmlDeviceGetUUID", handle) or ""),
            self.name(handle),
            None if memory is None else int(memory.used),
            None if memory is None else int(memory.total),
            None if rates is None else rates.gpu / 100,
            _scaled(self._ask("nvmlDeviceGetPowerUsage", handle)),
            _scaled(self._ask("nvmlDeviceGetEnforcedPowerLimit", handle)),
            _scaled(self._ask("nvmlDeviceGetTotalEnergyConsumption", handle)),
            _number(self._ask("nvmlDeviceGetTemperature", handle, _TEMPERATURE)),
            None
            if reasons is None
            else tuple(name for name, bit in THROTTLES.items() if int(reasons) & bit),
        )

    def _ask(self, name: str, *arguments: Any) -> Any:
        """What a function gives; None where this GPU or this driver has it not."""
        function = getattr(self.library, name, None)
        if function is None:
            return None
        try:
            return function(*arguments)
        except self.library.NVMLError:
            return None


@dataclass(frozen=True)
class EnergyCounter:
    """A GPU's counter of what it consumed.

    Attributes:
        name: of the GPU.
        library: pynvml.
        handle: of the device.
    """

    name: str
    library: Any
    handle: Any

    def read_uj(self) -> int:
        """Microjoules since the driver was loaded. Raises OSError where the GPU has no counter."""
        try:
            return 1000 * int(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle))
        except self.library.NVMLError as e:
            raise OSError(str(e)) from e

    def range_uj(self) -> int:
        """64 bits of millijoules are never used up."""
        return 0


def energy_counter(which: int | str, library: Any = LIBRARY) -> EnergyCounter:
    """That of one GPU.

    Args:
        which: its number as NVML counts, which knows nothing of CUDA_VISIBLE_DEVICES; or its UUID.
        library: pynvml; None where it is not installed.

    Raises:
        OSError: there is none; says why.
    """
    nvml = Nvml(library)
    if why := nvml.why_not():
        raise OSError(why)
    try:
        ask = "nvmlDeviceGetHandleBy" + ("UUID" if isinstance(which, str) else "Index")
        found = EnergyCounter("", library, getattr(library, ask)(which))
    except library.NVMLError as error:
        raise OSError(str(error)) from error
    found.read_uj()
    return EnergyCounter(nvml.name(found.handle), library, found.handle)


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _scaled(value: Any) -> float | None:
    """Thousandths as units."""
    return None if value is None else value / 1000
