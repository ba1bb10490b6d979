"""Prune 2:4, quantize to INT8, compile, and run networks fast on the CPU at hand.

    import twofour

    engine = twofour.build("model.onnx", int8=True, data="samples.npz")
    session = twofour.Session(engine)            # or twofour.load("model.engine")
    outputs = session.run({"x": x})

The names below are imported when they are first used, so that `import twofour` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twofour.compiler.build import Model, Progress
    from twofour.core.data import DataLike
    from twofour.core.errors import Error
    from twofour.core.version import __version__
    from twofour.engine import Engine
    from twofour.runtime.session import Session, load

_HOMES = {
    "__version__": "twofour.core.version",
    "Error": "twofour.core.errors",
    "Engine": "twofour.engine",
    "Session": "twofour.runtime.session",
    "load": "twofour.runtime.session",
}

__all__ = ["Engine", "Error", "Session", "__version__", "build", "load"]


def build(
    model: Model,
    *,
    int8: bool = False,
    data: DataLike | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Engine:
    """Compiles a model for this machine.

    Args:
        model: path of an ONNX file, or a model in memory; not changed.
        int8: quantize a float model first, calibrated on `data`.
        data: a DATA argument, a dict of arrays, or an iterable of dicts of arrays.
        progress: called with (done, total, what).
        **options: the fields of `twofour.compiler.build.BuildOptions`: sparsity, shapes, threads,
            timing_cache, target, dump.

    Raises:
        InputError: the model, the data or an option is not usable.
        UnsupportedError: the model cannot be compiled.
        TypeError: an unknown option.
    """
    from twofour.compiler.build import BuildOptions
    from twofour.compiler.build import build as compile_model

    return compile_model(model, BuildOptions(**options), int8=int8, data=data, progress=progress)


def __getattr__(name: str) -> Any:
    """Imports a public name from where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module 'twofour' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
