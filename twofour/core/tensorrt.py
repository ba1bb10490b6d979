"""TensorRT as a target: which one, of which version, for which GPU; and whether it is here.

Nothing of TensorRT is imported for it: packages are looked up by name, the GPU is asked of its
driver. What is found wrong with an engine's file can so be said before anything is loaded.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from twofour.core.errors import InputError
from twofour.core.gpus import gpu_name, read_capabilities

WORD = "tensorrt"
"""What the target is called: "tensorrt", or "tensorrt:sm89"."""
AMPERE_PLUS = "ampere+"
"""Every GPU of compute capability 8.0 or more."""
TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
"""Library -> what it is called; the one that is preferred where both are installed first."""
MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
"""Library -> modules that it may be imported as; the bindings alone do."""
_DISTRIBUTIONS = {
    name: tuple(f"{stem}{cuda}{part}" for part in ("-bindings", "") for cuda in cudas)
    for name, stem, cudas in (
        ("tensorrt", "tensorrt", ("-cu13", "-cu12", "-cu11", "")),
        ("tensorrt_rtx", "tensorrt-rtx", ("-cu13", "-cu12", "")),
    )
}
_GPU = re.compile(r"sm_?(\d{2,3})")
_AMPERE = (8, 0)


@dataclass(frozen=True)
class TensorRT:
    """The TensorRT and the GPU that an engine is for.

    Attributes:
        gpu: "sm89", "ampere+" for any from 8.0 on, or "" for that of this machine.
        library: "tensorrt" or "tensorrt_rtx"; "" for the one that is installed.
        version: as the library gives it, "10.9.0.34"; "" before a build.
    """

    gpu: str = ""
    library: str = ""
    version: str = ""

    @property
    def title(self) -> str:
        """For people: "TensorRT for RTX 1.7.1.116"."""
        return f"{TITLES.get(self.library, 'TensorRT')} {self.version}".rstrip()

    def __str__(self) -> str:
        """As it is written on the command line."""
        word = self.library.replace("_", "-") or WORD
        return f"{word}:{self.gpu}" if self.gpu else word


@dataclass(frozen=True)
class Installed:
    """A TensorRT that can be imported here.

    Attributes:
        library: see `TensorRT`.
        module: to import.
        version: of its package; "" where that is not known.
    """

    library: str
    module: str
    version: str


def parse_tensorrt(text: str) -> TensorRT | None:
    """A target word as TensorRT's; None for another target's.

    Args:
        text: "tensorrt", "tensorrt:sm89", "tensorrt:ampere+", or with "tensorrt-rtx" as its word.

    Raises:
        InputError: it names no GPU.
    """
    word, colon, gpu = text.partition(":")
    if word not in (WORD, "tensorrt-rtx"):
        return None
    library = "" if word == WORD else "tensorrt_rtx"
    if not colon or gpu == AMPERE_PLUS:
        return TensorRT(gpu, library)
    match = _GPU.fullmatch(gpu)
    if match is None:
        raise InputError(
            f"unknown GPU {gpu!r} in the target {text!r}",
            [f"expected a compute capability such as sm89, or {AMPERE_PLUS}"],
            "leave it out for the GPU of this machine",
        )
    return TensorRT(f"sm{match[1]}", library)


def is_tensorrt(text: str) -> bool:
    """Whether a word names a target of TensorRT."""
    try:
        return parse_tensorrt(text) is not None
    except InputError:
        return False


def fits_gpu(gpu: str, capability: tuple[int, int]) -> bool:
    """Whether code for `gpu` runs on a GPU of this compute capability."""
    return capability >= _AMPERE if gpu == AMPERE_PLUS else gpu in ("", gpu_name(capability))


@functools.cache
def installed() -> tuple[Installed, ...]:
    """Every TensorRT that can be imported, the preferred one first."""
    found = []
    for library, modules in MODULES.items():
        module = next((name for name in modules if find_spec(name) is not None), "")
        if module:
            found.append(Installed(library, module, _version(library)))
    return tuple(found)


def lacks(wanted: TensorRT) -> tuple[str, ...]:
    """What this machine lacks to run an engine; empty when nothing is known to be missing."""
    here = {each.library: each for each in installed()}
    found = here.get(wanted.library)
    missing = []
    if found is None:
        missing.append(wanted.title)
    elif found.version and found.version != wanted.version:
        missing.append(f"{wanted.title} (here is {found.version})")
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        missing.append("package cuda-bindings")
    capabilities = read_capabilities()
    if not capabilities:
        missing.append(f"GPU for {wanted.gpu}" if wanted.gpu else "GPU")
    elif not any(fits_gpu(wanted.gpu, each) for each in capabilities):
        has = ", ".join(map(gpu_name, capabilities))
        missing.append(f"GPU for {wanted.gpu} (here is {has})")
    return tuple(missing)


def how_to_get(wanted: TensorRT) -> str:
    """What to do where something is missing."""
    package = "tensorrt-rtx-cu13" if wanted.library == "tensorrt_rtx" else "tensorrt"
    pinned = f"{package}=={wanted.version}" if wanted.version else package
    return (
        f"pip install '{pinned}' 'twofour[tensorrt]' on a machine with such a GPU, or build the "
        "engine again there: twofour build MODEL.onnx -o E.engine --target tensorrt"
    )


def _version(library: str) -> str:
    for name in _DISTRIBUTIONS[library]:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""
