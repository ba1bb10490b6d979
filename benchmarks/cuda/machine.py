"""What benchmarks on a GPU say of the machine they run on."""

from __future__ import annotations

from twofour.bench.energy import Unavailable, gpu_counters
from twofour.core.nvml import EnergyCounter
from twofour.core.target import detect_host
from twofour.runtime.cuda.driver import Driver

TOOLS = ("torch", "triton", "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-cusparselt-cu13")


def counters() -> tuple[EnergyCounter, ...] | Unavailable:
    """Of the GPU that CUDA counts first here, which NVML may count otherwise."""
    return gpu_counters(Driver().gpu(0).uuid)


def device(kind: str) -> list[str]:
    """What it runs on, in words: the GPU where `kind` is cuda, and the CPU."""
    names = [Driver().gpu(0).name] if kind == "cuda" else []
    host = detect_host()
    return [*names, f"{host.model}, {host.cores} cores"]


def say(text: str) -> None:
    """Tells at once."""
    print(text, flush=True)
