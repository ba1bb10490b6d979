"""What benchmarks on a GPU say of the machine they run on."""

from __future__ import annotations

from twofour.bench.energy import gpu_counters
from twofour.core.target import detect_host

TOOLS = ("torch", "triton", "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-cusparselt-cu13")


def device(kind: str) -> list[str]:
    """What it runs on, in words: the GPU where `kind` is cuda, and the CPU."""
    counters = gpu_counters(0) if kind == "cuda" else ()
    names = [each.name for each in counters] if isinstance(counters, tuple) else []
    host = detect_host()
    return [*names, f"{host.model}, {host.cores} cores"]


def say(text: str) -> None:
    """Tells at once."""
    print(text, flush=True)
