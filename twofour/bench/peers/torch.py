"""PyTorch in eager mode: float32, inference mode, channels-last memory for images."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twofour.bench.timing import Array, Contestant, Feeds
from twofour.core.errors import InputError


def prepare(model: Path, feeds: Feeds, threads: int, callers: int = 1) -> Contestant:
    """A program that `torch.export.save` wrote, which all callers share.

    Raises:
        InputError: the file is none, or does not take the input.
    """
    if model.suffix != ".pt2":
        raise InputError(
            f"PyTorch cannot run {model}",
            ["expected a .pt2 file: PyTorch reads no ONNX"],
            "write it with torch.export.save(torch.export.export(model, (x,)), 'M.pt2') "
            "and give it as --torch M.pt2",
        )
    if not model.is_file():
        raise InputError(f"no program at {model}", ["there is no such file"], "check the path")
    if not zipfile.is_zipfile(model):
        expected = "expected what torch.export.save wrote, a zip archive"
        raise InputError(f"PyTorch cannot read {model}", [expected], "save it again")
    try:
        module = torch.export.load(model).module()
    except (RuntimeError, ValueError, OSError, KeyError) as e:
        raise InputError(f"PyTorch cannot read {model}", [str(e).strip().splitlines()[0]]) from e
    return contestant(module, feeds, threads, callers)


def contestant(
    module: Callable[..., Any], feeds: Feeds, threads: int, callers: int = 1
) -> Contestant:
    """A module that takes the arrays of `feeds` in their order.

    The number of threads is PyTorch's own and holds for the whole process.
    """
    torch.set_num_threads(threads)
    inputs = [_tensor(array) for array in feeds.values()]

    def call() -> Any:
        with torch.inference_mode():
            return module(*inputs)

    def outputs() -> dict[str, Array]:
        result = call()
        results = result if isinstance(result, (tuple, list)) else (result,)
        return {f"output{i}": value.numpy() for i, value in enumerate(results)}

    setting = f"threads {threads}, eager, float32, inference mode"
    more = (call,) * (callers - 1)
    return Contestant("PyTorch", str(torch.__version__), setting, call, outputs, more)


def predictor(module: Callable[..., Any]) -> Callable[[Array], Array]:
    """The output of a module with one input and one output, as a function of arrays."""

    def predict(x: Array) -> Array:
        with torch.inference_mode():
            result: Array = module(_tensor(np.ascontiguousarray(x))).numpy()
        return result

    return predict


def _tensor(array: Array) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
