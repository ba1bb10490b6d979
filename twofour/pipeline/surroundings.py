"""Where a run runs: the machine, and the versions of what computes."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from twofour.core.machine import read_machine, usable_cores
from twofour.core.outcome import Surroundings
from twofour.core.target import detect_host, host_target
from twofour.core.version import __version__
from twofour.pipeline.recipe_file import RecipeFile
from twofour.pipeline.stages.build import target_of

_PACKAGES = (
    "numpy",
    "llvmlite",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "safetensors",
    "torch",
)


def surroundings_of(file: RecipeFile, command: str) -> Surroundings:
    """Of this machine, for a recipe.

    Args:
        file: the recipe.
        command: that started the run.
    """
    targets = file.recipe.build.targets
    first = target_of(targets[0]) if targets[0] != "cpu" else host_target()
    return Surroundings(
        detect_host().model,
        usable_cores(),
        read_machine().memory_bytes or 0,
        f"{platform.system()} {platform.release()}, {_distribution()}",
        str(first),
        file.recipe.threads,
        file.recipe.seed,
        command,
        {"python": platform.python_version(), "twofour": __version__, **_versions()},
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return platform.platform()
