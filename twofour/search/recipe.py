"""The recipe of `twofour pipeline` that makes what a search found."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from twofour.compiler.forms import BF16
from twofour.core.errors import InputError
from twofour.core.writing import write_whole
from twofour.search.options import SearchOptions
from twofour.search.results import Found

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def fields_of(
    found: Found,
    options: SearchOptions,
    model: str | os.PathLike[str],
    data: str,
    folder: str | os.PathLike[str] = ".",
) -> dict[str, Any]:
    """The fields of the recipe.

    Args:
        found: with an answer.
        options: of the search.
        model: the file.
        data: the DATA argument that it was judged on.
        folder: that the recipe will lie in: its paths are relative to that.

    Raises:
        InputError: the search has no answer.
    """
    if found.best is None:
        raise InputError("there is no recipe of a search without an answer", [])
    layers = found.layers(found.best)
    calibrate = options.calibrate if isinstance(options.calibrate, str) else data
    fields: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]", "-", Path(model).stem).strip("-.") or "model",
        "model": {"onnx": _within(folder, os.fspath(model))},
        "data": {"calibrate": _within(folder, calibrate), "evaluate": _within(folder, data)},
        "metric": options.metric,
        "threads": options.threads,
        "sparsify": {"method": options.apply.method},
        "quantize": {
            "recipe": options.apply.quantize.recipe,
            "method": options.apply.quantize.method,
        },
        "layers": layers,
        "build": {"bf16": any(choice.endswith(BF16) for choice in layers.values())},
    }
    if options.output is not None:
        fields["metric_output"] = options.output
    if options.shapes:
        fields["shapes"] = {name: list(shape) for name, shape in options.shapes.items()}
    if options.apply.samples is not None:
        fields["sparsify"]["samples"] = options.apply.samples
    if options.apply.quantize.samples is not None:
        fields["quantize"]["samples"] = options.apply.quantize.samples
    if options.samples is not None:
        fields["evaluate"] = {"samples": options.samples}
    if options.max_drop is not None:
        fields["gate"] = {"max_drop": options.max_drop}
    return fields


def write_recipe(fields: Mapping[str, Any], found: Found, path: str | os.PathLike[str]) -> None:
    """Writes the file, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    best = found.best
    assert best is not None
    unit = f" {found.unit}" if found.unit else ""
    head = (
        f"# Found by twofour search in {len(found.points)} engines: {best.latency_us:.1f} us, "
        f"{best.speed[0]:.2f}x float32,\n# {found.metric} {best.figure:.4g}{unit} "
        f"(float32 {found.dense:.4g}), on {found.cpu}.\n"
    )
    text = head + yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, width=1000)
    try:
        write_whole(path, text.encode())
    except OSError as e:
        raise InputError(f"cannot write {path}", [str(e)], "name a file in another folder") from e


def _within(folder: str | os.PathLike[str], path: str) -> str:
    """A path as the folder sees it; a function stays as it is."""
    if _FUNCTION.fullmatch(path) and not Path(path).exists():
        return path
    return Path(os.path.relpath(path, folder)).as_posix()
