"""What a worker does for a target: builds the engine there."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import twofour
from twofour.core.target import Target


def start(model: Path) -> Callable[[Target], bytes]:
    return functools.partial(build, model)


def build(model: Path, target: Target) -> bytes:
    """The engine's file."""
    engine = twofour.build(
        model, shapes={"x": (2, 16, 6, 6)}, target=target, threads=1, tuning_effort=0, race=False
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.engine")
        engine.save(path)
        return path.read_bytes()
