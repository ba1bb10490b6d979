"""GPUs are found by what the driver tells; where it tells nothing there are none."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from twofour.core import gpus
from twofour.core.gpus import Gpu


def test_what_nvidia_smi_prints() -> None:
    text = "NVIDIA H200, 143771, 570.86.15\nNVIDIA H200, 143771, 570.86.15\n"
    assert gpus.parse_nvidia_smi(text) == (Gpu("NVIDIA H200", 143771 << 20, "570.86.15"),) * 2
    assert gpus.parse_nvidia_smi("GPU, [N/A], 550.1") == (Gpu("GPU", None, "550.1"),)
    assert gpus.parse_nvidia_smi("No devices were found") == ()
    assert gpus.parse_nvidia_smi("") == ()


def test_the_drivers_files(tmp_path: Path) -> None:
    assert gpus.read_gpus(tmp_path) == ()
    folder = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text("Model: \t\t NVIDIA A10\nIRQ:   \t\t 16\n")
    assert gpus.read_gpus(tmp_path) == (Gpu("NVIDIA A10"),)


def test_device_files(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert gpus.read_gpus(tmp_path) == (Gpu("an NVIDIA GPU"),) * 2


@pytest.mark.parametrize("error", [OSError("no"), subprocess.TimeoutExpired("nvidia-smi", 5)])
def test_a_program_that_fails(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(gpus.shutil, "which", lambda _: "/bin/nvidia-smi")
    monkeypatch.setattr(gpus.subprocess, "run", failing)
    assert gpus._nvidia_smi() == ""
