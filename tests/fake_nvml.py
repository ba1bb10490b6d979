"""A made-up NVML with two GPUs: one that tells everything, and one that is cut into a slice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

UUID, CUT, SLICE = "GPU-aaaa", "GPU-bbbb", "MIG-cccc"


class NVMLError(Exception):
    pass


class FakeNvml:
    """The functions of pynvml that are called; handles are UUIDs."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        self.opened = 0
        self.fails = False
        self.mj = 5_000

    def nvmlInit(self) -> None:
        self.opened += 1
        if self.fails:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index not in (0, 1):
            raise NVMLError("Invalid Argument")
        return (UUID, CUT)[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in (UUID, CUT):
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetUUID(self, handle: str) -> bytes:
        return handle.encode()

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "A GPU"

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        if handle == UUID:
            raise NVMLError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 2

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, index: int) -> str:
        if index:
            raise NVMLError("Not Found")
        return SLICE

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=1 << 30, total=4 << 30)

    def _whole(self, handle: str) -> None:
        if handle != UUID:
            raise NVMLError("Not Supported")

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        self._whole(handle)
        return SimpleNamespace(gpu=75, memory=10)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self._whole(handle)
        return 350_500

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        self._whole(handle)
        return 700_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self._whole(handle)
        return self.mj

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        self._whole(handle)
        assert sensor == 0
        return 61

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        self._whole(handle)
        return 0x1 | 0x4 | 0x40
