"""PyTorch as a contestant: eager and compiled, with CUDA graphs and without.

On a GPU inputs lie there, and `cudnn.benchmark` is on, so that eager mode has its best convolutions
too. Compiled is `mode="max-autotune-no-cudagraphs"`, and captured into a graph here: so no Python
runs between its kernels, as it would with the graphs of `mode="max-autotune"`. Small batches, whose
time is that of reading weights, are compiled in the default mode: autotuning takes a minute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cuda.cases import WORKS, Array, Work, pruned_model
from benchmarks.cuda.turns import Entry

EAGER_F32, EAGER_F16, COMPILED = "torch eager f32", "torch eager fp16", "torch compile fp16"
GRAPH = ", graph"
ON_GPU = (COMPILED, EAGER_F32, EAGER_F16)
ON_CPU = (EAGER_F32,)
MODE = "max-autotune-no-cudagraphs"


class TorchSide:
    """Runs models in inference mode.

    Args:
        device: "cuda" or "cpu".
        folder: of files; pruned weights may be there.
        autotune_from: the smallest batch that torch.compile tunes itself for.
    """

    def __init__(self, device: str, folder: Path, autotune_from: int) -> None:
        """Sets PyTorch up."""
        self.device, self.folder, self.autotune_from = device, folder, autotune_from
        self.gpu = device == "cuda"
        self._network, self._model = "", nn.Module()
        torch.backends.cudnn.benchmark = True
        torch.set_grad_enabled(False)

    def files(self, network: str) -> None:
        """Makes the model, on the CPU."""
        if network != self._network:
            model = pruned_model(WORKS[network], self.folder / network)
            self._network, self._model = network, model

    def open(self, network: str, batch: int, kind: str) -> list[Entry]:
        """The contestants of a kind."""
        self.files(network)
        work = WORKS[network]
        dtype = torch.float32 if kind == EAGER_F32 else torch.float16
        model = copy.deepcopy(self._model).to(self.device, dtype)
        if work.images:
            model = model.to(memory_format=torch.channels_last)
        inputs = self._inputs(work, batch, dtype)
        if kind != COMPILED:
            return self._entries(kind, "eager", lambda: model(*inputs), model, inputs)
        torch._dynamo.reset()
        mode = MODE if batch >= self.autotune_from else "default"
        compiled = torch.compile(model, mode=mode, dynamic=False)
        return self._entries(kind, f'mode="{mode}"', lambda: compiled(*inputs), model, inputs)

    def close(self) -> None:
        """Gives memory back."""
        if self.gpu:
            torch.cuda.empty_cache()

    def _inputs(self, work: Work, batch: int, dtype: torch.dtype) -> list[Tensor]:
        made = []
        for array in work.feeds(batch, 0).values():
            x = torch.from_numpy(array).to(self.device)
            x = x.to(dtype) if x.is_floating_point() else x
            made.append(x.contiguous(memory_format=torch.channels_last) if work.images else x)
        return made

    def _entries(
        self,
        kind: str,
        setting: str,
        call: Callable[[], Any],
        model: nn.Module,
        inputs: list[Tensor],
    ) -> list[Entry]:
        """Called as it is, and on a GPU as a captured graph."""
        memory = self._memory(call, model, inputs)
        plain = Entry(kind, setting, call, self._wait, lambda: self._read(kind, call), memory)
        if not self.gpu:
            return [plain]
        try:
            graph, result = _captured(call)
        except RuntimeError as error:
            note = f"no graph: {str(error).splitlines()[0][:200]}"
            return [Entry(kind, setting, call, self._wait, plain.outputs, memory, note)]

        def outputs() -> list[Array]:
            graph.replay()
            self._wait()
            return _arrays(result)

        named = f"{setting}, captured"
        return [plain, Entry(kind + GRAPH, named, graph.replay, self._wait, outputs, memory)]

    def _read(self, kind: str, call: Callable[[], Any]) -> list[Array]:
        """Outputs; those that others are compared with without the shortcut of TF32."""
        if kind != EAGER_F32:
            return _arrays(call())
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            return _arrays(call())

    def _memory(
        self, call: Callable[[], Any], model: nn.Module, inputs: list[Tensor]
    ) -> int | None:
        """Weights, inputs, and the most that a call takes beside them."""
        call()
        self._wait()
        if not self.gpu:
            return None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self._wait()
        held = [*model.parameters(), *model.buffers(), *inputs]
        own = sum(each.numel() * each.element_size() for each in held)
        return own + torch.cuda.max_memory_allocated() - before

    def _wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()


def _captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of a call, and where its outputs lie."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def _arrays(result: Any) -> list[Array]:
    tensors = result if isinstance(result, (tuple, list)) else (result,)
    return [np.ascontiguousarray(each.float().cpu().numpy()) for each in tensors]
