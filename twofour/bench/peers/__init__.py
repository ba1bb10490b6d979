"""The engines of others, one file each, loaded by name so that none of them is required.

A peer's file has `prepare(model, feeds, threads) -> Contestant`. Each is set up as its own
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

Prepare = Callable[[Path, Feeds, int], Contestant]

PEERS = ("onnxruntime", "openvino", "torch")


def prepare(name: str, model: Path | None, feeds: Feeds, threads: int) -> Contestant:
    """Sets up a peer.

    Args:
        name: one of `PEERS`.
        model: an ONNX file; for torch a program that `torch.export.save` wrote; None if the user
            gave none.
        feeds: input name -> array.
        threads: at most so many threads compute.

    Raises:
        InputError: an unknown peer, one that is not installed, or a file it does not take.
    """
    if name not in PEERS:
        raise InputError(
            f"unknown peer {name!r}", [f"expected one of {', '.join(PEERS)}"], "check --vs"
        )
    if model is None:
        needs = "a .pt2 file: --torch M.pt2" if name == "torch" else "the ONNX file: --model M.onnx"
        raise InputError(
            f"cannot measure against {name}", ["it was given no model"], f"give {needs}"
        )
    return cast("Prepare", _load(name).prepare)(model, feeds, threads)


def _load(name: str) -> ModuleType:
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
