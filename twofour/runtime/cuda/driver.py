"""The driver of NVIDIA's GPUs, by cuda-bindings: loaded when first needed, its errors in words."""

from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass
from typing import Any

from twofour.core.cuda import INSTALL
from twofour.core.errors import InputError, UnsupportedError

_MODULE = "cuda.bindings.driver"
_SUCCESS = 0
_OUT_OF_MEMORY = 2
_BROKEN = frozenset((700, 702, 709, 714, 715, 716, 717, 718, 719))
"""Errors of a kernel after which nothing more runs on this GPU in this process."""
_lock = threading.Lock()
_ready: set[Any] = set()
"""Functions that were started."""


class OutOfMemoryError(UnsupportedError):
    """The GPU has not so much memory left."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a slice of one, that this process sees.

    Attributes:
        index: as CUDA counts them in this process.
        uuid: "GPU-..." or "MIG-...", as nvidia-smi -L shows it.
        name: as the driver has it.
        capability: of its code: (9, 0).
    """

    index: int
    uuid: str
    name: str
    capability: tuple[int, int]


class Driver:
    """The functions of the driver.

    Raises:
        UnsupportedError: cuda-bindings or the driver is not installed, or there is no GPU.
    """

    def __init__(self) -> None:
        """Loads the driver, once in a process."""
        self.functions = _bindings()
        with _lock:
            if self.functions not in _ready:
                self._start()
                _ready.add(self.functions)

    def _start(self) -> None:
        try:
            self.call("cuInit", 0)
        except RuntimeError as error:  # cuda-bindings has no class of its own for it
            raise UnsupportedError(
                "the GPU cannot be reached: its driver is not installed",
                [" ".join(str(error).split())],
                "install NVIDIA's driver, or start the container with the GPU: "
                "docker run --gpus all",
            ) from error

    def call(self, name: str, *arguments: Any) -> Any:
        """A function of the driver: its result, or a tuple of them, or None.

        Raises:
            OutOfMemoryError, UnsupportedError: with the function's name, the error's name and text.
        """
        status, *results = getattr(self.functions, name)(*arguments)
        if int(status) != _SUCCESS:
            raise self._failed(name, status)
        if len(results) > 1:
            return tuple(results)
        return results[0] if results else None

    def _failed(self, name: str, status: Any) -> UnsupportedError:
        number = int(status)
        words = [self._text(which, status) for which in ("cuGetErrorName", "cuGetErrorString")]
        reason = f"{words[0] or 'error'} ({number}): {words[1] or 'no text'}"
        if number == _OUT_OF_MEMORY:
            fix = "use a smaller batch or fewer sessions on this GPU, or free its memory"
            return OutOfMemoryError(f"CUDA refuses {name}: the GPU's memory is full", [reason], fix)
        fix = "twofour doctor says what there is of GPUs and their driver"
        if number in _BROKEN:
            fix = "a kernel failed, nothing runs on this GPU any more: start the process again"
        return UnsupportedError(f"CUDA refuses {name}", [reason], fix)

    def _text(self, name: str, status: Any) -> str:
        """The name or the text of an error; "" for one that the driver does not know."""
        known, text = getattr(self.functions, name)(status)
        if int(known) != _SUCCESS or text is None:
            return ""
        return text.decode(errors="replace") if isinstance(text, bytes) else str(text)

    @property
    def version(self) -> str:
        """The newest CUDA that the driver knows: "13.0"."""
        number = int(self.call("cuDriverGetVersion"))
        return f"{number // 1000}.{number % 1000 // 10}"

    def gpus(self) -> tuple[Gpu, ...]:
        """Those that this process sees."""
        return tuple(self.gpu(index) for index in range(int(self.call("cuDeviceGetCount"))))

    def gpu(self, index: int) -> Gpu:
        """One of them."""
        device = self.call("cuDeviceGet", index)
        name = _text(self.call("cuDeviceGetName", 256, device))
        major, minor = (
            self.attribute(device, f"COMPUTE_CAPABILITY_{each}") for each in ("MAJOR", "MINOR")
        )
        newer = "cuDeviceGetUuid_v2"  # which names slices too; later versions lack the suffix
        asked = newer if hasattr(self.functions, newer) else "cuDeviceGetUuid"
        uuid = uuid_text(bytes(self.call(asked, device).bytes), " MIG " in name)
        return Gpu(index, uuid, name, (major, minor))

    def attribute(self, device: Any, name: str) -> int:
        """A figure of one.

        Args:
            device: as `cuDeviceGet` gave it.
            name: "MULTIPROCESSOR_COUNT", as CUDA calls it behind `CU_DEVICE_ATTRIBUTE_`.
        """
        kind = getattr(self.functions.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self.call("cuDeviceGetAttribute", kind, device))

    def find(self, which: int | str) -> Gpu:
        """A GPU by its index or UUID.

        Args:
            which: 0, or "GPU-..." or "MIG-..." as nvidia-smi -L shows it, or its beginning.

        Raises:
            InputError: there is none such.
        """
        gpus = self.gpus()
        if isinstance(which, int):
            found = [gpu for gpu in gpus if gpu.index == which]
        else:
            wanted = _digits(which)
            found = [gpu for gpu in gpus if wanted and _digits(gpu.uuid).startswith(wanted)]
        if len(found) == 1:
            return found[0]
        seen = [f"{gpu.index}: {gpu.uuid} ({gpu.name})" for gpu in gpus]
        raise InputError(
            f"{'no' if not found else 'more than one'} GPU is {which!r}",
            ["this process sees " + ("; ".join(seen) or "none")],
            "name one of these; a process sees one slice (MIG) alone: start it with "
            "CUDA_VISIBLE_DEVICES=MIG-... for another",
        )


def uuid_text(content: bytes, is_slice: bool) -> str:
    """The 16 bytes of a UUID as nvidia-smi writes it."""
    digits = content.hex()
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    return f"{'MIG' if is_slice else 'GPU'}-{'-'.join(parts)}"


def _digits(uuid: str) -> str:
    """What tells one UUID from another."""
    return uuid.lower().removeprefix("gpu-").removeprefix("mig-").replace("-", "")


def _text(content: Any) -> str:
    if isinstance(content, bytes):
        return content.split(b"\0")[0].decode(errors="replace")
    return str(content)


def _bindings() -> Any:
    try:
        return importlib.import_module(_MODULE)
    except ImportError as error:
        raise UnsupportedError(
            "the GPU cannot be reached: cuda-bindings is not installed",
            [f"import {_MODULE}: {error}"],
            INSTALL,
        ) from error
