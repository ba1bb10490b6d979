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
    from twofour.compiler.build import build
    from twofour.core.errors import Error
    from twofour.core.version import __version__
    from twofour.engine import Engine
    from twofour.predict.forecast import forecast
    from twofour.runtime.session import Session, load

_HOMES = {
    "__version__": "twofour.core.version",
    "Error": "twofour.core.errors",
    "Engine": "twofour.engine",
    "Session": "twofour.runtime.session",
    "load": "twofour.runtime.session",
    "build": "twofour.compiler.build",
    "forecast": "twofour.predict.forecast",
}

__all__ = ["Engine", "Error", "Session", "__version__", "build", "forecast", "load"]


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
