"""CUDA as a target: for which GPU, by which libraries; and whether they are here.

Nothing of CUDA is imported for it: packages are looked up by name, the GPU is asked of its driver.
What is found wrong with an engine's file can so be said before anything is loaded.
"""

from __future__ import annotations

import ctypes.util
import functools
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from twofour.core.errors import InputError
from twofour.core.gpus import gpu_name, read_capabilities

WORD = "cuda"
"""What the target is called: "cuda", or "cuda:sm90"."""
INSTALL = "pip install 'twofour[cuda]'"
"""The command that brings what runs an engine."""
_GPU = re.compile(r"sm_?(\d{2,3})")
_LEAST = 80
_DISTRIBUTIONS = {
    "cublaslt": ("nvidia-cublas", "nvidia-cublas-cu13", "nvidia-cublas-cu12"),
    "cusparselt": ("nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12", "nvidia-cusparselt"),
    "nvrtc": ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12"),
    "triton": ("triton",),
    "cuda-bindings": ("cuda-bindings",),
}
PARTS = {
    "cuda-bindings": ("starts kernels", INSTALL),
    "triton": ("makes kernels at a build", INSTALL),
    "cublaslt": ("computes dense products", f"pip install {_DISTRIBUTIONS['cublaslt'][0]}"),
    "cusparselt": ("computes 2:4 products", f"pip install {_DISTRIBUTIONS['cusparselt'][0]}"),
    "nvrtc": ("makes 2:4 convolutions at a build", f"pip install {_DISTRIBUTIONS['nvrtc'][0]}"),
}
"""What engines for CUDA are built and run with: what for, and the command that brings it."""
_FILES = {"cublaslt": "cublasLt", "cusparselt": "cusparseLt", "nvrtc": "nvrtc"}


@dataclass(frozen=True)
class Cuda:
    """The GPU that an engine is for, and what made it.

    Attributes:
        gpu: "sm90"; "" for that of this machine, before a build.
        libraries: those that the engine calls, with the versions that its calls were timed with:
            "cublaslt 13.1.0.3"; before a build none.
        driver: of the machine that built it; informative.
    """

    gpu: str = ""
    libraries: tuple[str, ...] = ()
    driver: str = ""

    @property
    def capability(self) -> int:
        """Of the GPU: 90 for "sm90".

        Raises:
            InputError: the GPU is not named.
        """
        match = _GPU.fullmatch(self.gpu)
        if match is None:
            raise InputError(f"{self.gpu!r} names no GPU", ["expected one such as sm90"])
        return int(match[1])

    def fits(self, capability: tuple[int, int]) -> bool:
        """Whether code for it runs, as timed, on a GPU of this compute capability."""
        return self.gpu in ("", gpu_name(capability))

    def __str__(self) -> str:
        """As it is written on the command line."""
        return f"{WORD}:{self.gpu}" if self.gpu else WORD


def parse_cuda(text: str) -> Cuda | None:
    """A target word as CUDA's; None for another target's.

    Args:
        text: "cuda" or "cuda:sm90".

    Raises:
        InputError: it names no GPU, or one whose tensor cores know no 2:4.
    """
    word, colon, gpu = text.partition(":")
    if word != WORD:
        return None
    if not colon:
        return Cuda()
    match = _GPU.fullmatch(gpu)
    if match is None:
        raise InputError(
            f"unknown GPU {gpu!r} in the target {text!r}",
            ["expected a compute capability such as sm90"],
            "leave it out for the GPU of this machine",
        )
    if int(match[1]) < _LEAST:
        raise InputError(
            f"the target {text!r} is a GPU that is too old",
            [f"expected sm{_LEAST} (Ampere) or later, whose tensor cores take 2:4"],
            "build for the CPU of that machine: --target cpu",
        )
    return Cuda(f"sm{match[1]}")


def is_gpu(name: str) -> bool:
    """Whether it is the name of a GPU, as "sm90" is."""
    return _GPU.fullmatch(name) is not None


def installed(name: str) -> str:
    """The version of a part of CUDA by its package.

    Args:
        name: "cublaslt", "cusparselt", "nvrtc", "triton" or "cuda-bindings".

    Returns:
        For a library that the system has, without a package, "of the system"; "" for none.
    """
    for distribution in _DISTRIBUTIONS[name]:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "of the system" if name in _FILES and _on_system(_FILES[name]) else ""


def lacks(wanted: Cuda) -> tuple[str, ...]:
    """What this machine lacks to run an engine; empty when nothing is known to be missing."""
    missing = []
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        missing.append("package cuda-bindings")
    for library in wanted.libraries:
        name = library.partition(" ")[0]
        if name in _FILES and not installed(name):
            missing.append(f"{library} (package {_DISTRIBUTIONS[name][0]})")
    capabilities = read_capabilities()
    if not capabilities:
        missing.append(f"GPU for {wanted.gpu}" if wanted.gpu else "GPU")
    elif not any(map(wanted.fits, capabilities)):
        has = ", ".join(map(gpu_name, capabilities))
        missing.append(f"GPU for {wanted.gpu} (here is {has})")
    return tuple(missing)


def how_to_get(wanted: Cuda) -> str:
    """What to do where something is missing."""
    gpu = f" with a GPU of {wanted.gpu}" if wanted.gpu else " with a GPU"
    return (
        f"{INSTALL} on a machine{gpu}, or build the engine again for what is here: "
        "twofour build MODEL.onnx -o E.engine --target cuda"
    )


@functools.cache
def _on_system(file: str) -> bool:
    """Whether the system's loader knows a library."""
    return ctypes.util.find_library(file) is not None
