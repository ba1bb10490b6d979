"""The engines of others, one file each, loaded by name so that none of them is required.

A peer's file has `prepare(model, feeds, threads, callers) -> Contestant`; one that can compute
floats in another precision than its own choice takes `precision` too. Each is set up as its own
documentation says for lowest latency, and called as cheaply as its Python interface allows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import cast

from twofour.bench.timing import Contestant, Feeds
from twofour.core.errors import InputError

Prepare = Callable[..., Contestant]

PEERS = ("onnxruntime", "openvino", "torch")


def prepare(
    name: str,
    model: Path | None,
    feeds: Feeds,
    threads: int,
    precision: str = "",
    callers: int = 1,
) -> Contestant:
    """Sets up a peer.

    Args:
        name: one of `PEERS`.
        model: an ONNX file; for torch a program that `torch.export.save` wrote; None if the user
            gave none.
        feeds: input name -> array.
        threads: at most so many threads compute one call.
        precision: that OpenVINO computes floats in, "f32" or "bf16"; "" for each peer's own choice.
        callers: so many call at once.

    Raises:
        InputError: an unknown peer, one that is not installed, or a file it does not take.
    """
    module = require(name)
    if model is None:
        needs = "a .pt2 file: --torch M.pt2" if name == "torch" else "the ONNX file: --model M.onnx"
        raise InputError(
            f"cannot measure against {name}", ["it was given no model"], f"give {needs}"
        )
    chosen = {"precision": precision} if precision else {}
    return cast("Prepare", module.prepare)(model, feeds, threads, callers=callers, **chosen)


def require(name: str) -> ModuleType:
    """A peer's file.

    Raises:
        InputError: an unknown peer, or one that is not installed.
    """
    if name not in PEERS:
        raise InputError(
            f"unknown peer {name!r}", [f"expected one of {', '.join(PEERS)}"], "check --vs"
        )
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] != name:
            raise
        raise InputError(
            f"cannot measure against {name}",
            [f"the Python package {name} is not installed"],
            "pip install 'twofour[bench]'" if name != "torch" else "pip install 'twofour[train]'",
        ) from e
