"""Other machines, emulated: qemu runs a Python of theirs, and all it loads, on the CPU it is told.

qemu's user mode shows a process this machine's /proc/cpuinfo; one in the folder given with -L takes
its place, here as Linux has it on such a CPU. What code may really do is the emulator's business:
an instruction that the CPU lacks ends the process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARM = Path(os.environ.get("TWOFOUR_ARM64", ROOT / ".venv-arm64"))
HOW = "bash tests/other_cpus/prepare.sh .venv-arm64 .venv/bin/python"
TIMEOUT_S = 300


@dataclass(frozen=True)
class Machine:
    """A CPU of qemu's.

    Attributes:
        cpu: as qemu calls it.
        arch: "aarch64" or "x86_64".
        info: what its /proc/cpuinfo says.
    """

    cpu: str
    arch: str
    info: str

    def require(self) -> None:
        """Skips a test where there is no emulator, or no system of its architecture."""
        if shutil.which(f"qemu-{self.arch}") is None:
            pytest.skip(f"qemu-{self.arch} is not here: apt install qemu-user")
        if self.arch == "aarch64" and not (ARM / "ready").exists():
            pytest.skip(f"no Python of AArch64 in {ARM}: {HOW}")
        if self.arch == "x86_64" and os.uname().machine != "x86_64":
            pytest.skip("this machine's Python is not of x86-64")

    def run(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs Python there.

        Args:
            folder: for the files that make up the machine.
            arguments: of the interpreter.
        """
        self.require()
        system = folder / f"{self.cpu.partition(',')[0]}-{self.arch}"
        (system / "proc").mkdir(parents=True, exist_ok=True)
        (system / "proc/cpuinfo").write_text(self.info)
        paths, python = [ROOT], sys.executable
        options = ["-cpu", self.cpu, "-L", str(system)]
        if self.arch == "aarch64":
            root = ARM / "root"
            for part in ("lib", "usr"):
                if not (system / part).exists():
                    (system / part).symlink_to(root / part)
            python = str(root / "usr/bin" / (ARM / "ready").read_text().strip())
            options += ["-E", f"PYTHONHOME={root / 'usr'}"]
            paths.append(root / "site")
        settings = {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        options += [part for key, value in settings.items() for part in ("-E", f"{key}={value}")]
        command = [f"qemu-{self.arch}", *options, python, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT, check=False
        )


def _x86(model: str, flags: str) -> str:
    return f"processor\t: 0\nmodel name\t: {model}\nflags\t\t: {flags}\n"


def _arm(part: str, features: str) -> str:
    return (
        f"processor\t: 0\nFeatures\t: fp asimd evtstrm aes crc32 {features}\n"
        f"CPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: {part}\n"
    )


_SSE = "fpu cx8 cmov mmx fxsr sse sse2 ht lm pni ssse3 cx16 sse4_1 sse4_2 popcnt"
_AVX2 = f"{_SSE} fma movbe xsave avx f16c avx2 bmi1 bmi2 abm"

NEOVERSE_N1 = Machine("neoverse-n1", "aarch64", _arm("0xd0c", "atomics fphp asimdhp asimddp"))
CORTEX_A72 = Machine("cortex-a72", "aarch64", _arm("0xd08", ""))
HASWELL = Machine("Haswell,-hle,-rtm", "x86_64", _x86("Intel Core Processor (Haswell)", _AVX2))
NEHALEM = Machine("Nehalem", "x86_64", _x86("Intel Core i7 9xx (Nehalem)", _SSE))
LYING = Machine("Nehalem", "x86_64", _x86("Says that it is a Haswell", _AVX2))
