"""The NVIDIA GPUs of this machine, as far as the driver tells without any library of its own."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from twofour.core.machine import ROOT

_QUERY = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as its driver has it; "an NVIDIA GPU" where only its device file is there.
        memory_bytes: None if unknown.
        driver: version; "" if unknown.
    """

    name: str
    memory_bytes: int | None = None
    driver: str = ""


def read_gpus(root: Path = ROOT) -> tuple[Gpu, ...]:
    """Asks nvidia-smi, else the driver's files, else counts device files."""
    if root == ROOT and (found := parse_nvidia_smi(_nvidia_smi())):
        return found
    texts = []
    for path in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        try:
            texts.append(path.read_text(errors="replace"))
        except OSError:
            continue
    names = [re.search(r"^Model:\s*(.+)$", text, re.MULTILINE) for text in texts]
    if names:
        return tuple(Gpu(name[1].strip() if name else "an NVIDIA GPU") for name in names)
    devices = [path for path in root.glob("dev/nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return (Gpu("an NVIDIA GPU"),) * len(devices)


def parse_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    """Lines such as "NVIDIA H200, 143771, 570.86.15": name, MiB, driver."""
    found = []
    for line in text.splitlines():
        name, _, rest = line.partition(",")
        memory, _, driver = (part.strip() for part in rest.partition(","))
        if name.strip() and driver:
            size = int(memory) << 20 if memory.isdigit() else None
            found.append(Gpu(name.strip(), size, driver))
    return tuple(found)


@functools.cache
def read_capabilities() -> tuple[tuple[int, int], ...]:
    """The compute capability of each GPU; none where the driver does not tell."""
    return parse_capabilities(_nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader"))


def parse_capabilities(text: str) -> tuple[tuple[int, int], ...]:
    """Lines such as "8.9"."""
    found = re.findall(r"^\s*(\d+)\.(\d+)\s*$", text, re.MULTILINE)
    return tuple((int(major), int(minor)) for major, minor in found)


def gpu_name(capability: tuple[int, int]) -> str:
    """(8, 9) -> "sm89"."""
    return f"sm{capability[0]}{capability[1]}"


def _nvidia_smi(*query: str) -> str:
    """What it prints; "" if it is not there, fails or hangs."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *(query or _QUERY)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
