"""Triton's Python backend for an engine of twofour: what one call brings is run as few batches.

Needs `twofour[serve]` where Triton's Python finds it. Beside this file lies model.engine; how
requests are joined stands in config.pbtxt, parameter "twofour".
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton  # type: ignore[import-not-found]
from numpy.typing import NDArray

from twofour.engine import Engine
from twofour.serve.errors import MalformedError
from twofour.serve.models.instances import Result, Runner
from twofour.serve.models.queue import Job, Key
from twofour.serve.models.rows import Layout
from twofour.serve.repository.config import Batching, Instance

Array = NDArray[Any]
# Triton's stub may have been built before NumPy 2, whose arrays it then reads as if each element
# were 0 bytes large. DLPack does not look into arrays; NumPy 1 fails when it drops what it got so.
DLPACK = int(np.__version__.partition(".")[0]) >= 2


class TritonPythonModel:
    """One instance of the model, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the engine on the cores and with the threads of this instance, and warms it up."""
        parameters = json.loads(args["model_config"])["parameters"]
        settings = json.loads(parameters["twofour"]["string_value"])
        group = args["model_instance_name"].rsplit("_", 1)[0]
        instance = Instance.model_validate(settings["instances"][group])
        if instance.cores:
            os.sched_setaffinity(0, instance.cores)
        folder = Path(args["model_repository"]) / args["model_version"]
        engine = Engine.load(folder / "model.engine")
        self._inputs = [info.name for info in engine.plan.inputs]
        self._layout = Layout(engine.plan, Batching.model_validate(settings["batching"]))
        if engine.plan.target.cuda is not None and instance.gpu is None:
            if args.get("model_instance_kind") == "GPU":
                gpu = int(args["model_instance_device_id"])
                instance = instance.model_copy(update={"gpu": gpu})
        self._runner = Runner(engine, self._layout, instance)
        for shapes in self._layout.shapes_to_warm():
            zeros = {i.name: np.zeros(shapes[i.name], i.dtype) for i in engine.plan.inputs}
            self._runner.time_us(zeros, settings["warm_up_rounds"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers each request, in order."""
        results: dict[int, Result] = {}
        fitting: dict[Key, list[tuple[int, Job]]] = defaultdict(list)
        for index, request in enumerate(requests):
            try:
                job = self._job(request)
            except MalformedError as e:
                results[index] = e
            else:
                fitting[job.key].append((index, job))
        for batch in fitting.values():  # no more rows than max_batch_size: Triton sees to that
            done = self._runner.run([job for _, job in batch])
            results |= {at: result for (at, _), (_, result) in zip(batch, done, strict=True)}
        return [_response(request, results[at]) for at, request in enumerate(requests)]

    def finalize(self) -> None:
        """Ends the session's threads."""
        self._runner.close()

    def _job(self, request: Any) -> Job:
        """A request as the layout takes it; raises MalformedError where the engine does not."""
        tensors = {n: triton.get_input_tensor_by_name(request, n) for n in self._inputs}
        inputs = {name: _array(tensor) for name, tensor in tensors.items() if tensor is not None}
        place = self._layout.place(inputs)
        return Job(inputs, place.rows, place.length, place.key, 1, 0, None, lambda _: None)


def _array(tensor: Any) -> Array:
    """What a tensor of Triton's holds, not copied."""
    array: Array = np.from_dlpack(tensor) if DLPACK else tensor.as_numpy()
    return array


def _tensor(name: str, array: Array) -> Any:
    """An output as Triton takes it."""
    array = np.ascontiguousarray(array)
    return triton.Tensor.from_dlpack(name, array) if DLPACK else triton.Tensor(name, array)


def _response(request: Any, result: Result) -> Any:
    """The outputs that the request wants, or why it has none."""
    if isinstance(result, Exception):
        malformed = isinstance(result, MalformedError)
        code = triton.TritonError.INVALID_ARG if malformed else triton.TritonError.INTERNAL
        return triton.InferenceResponse(error=triton.TritonError(str(result), code))
    wanted = request.requested_output_names()
    tensors = [_tensor(name, y) for name, y in result.items() if name in wanted]
    return triton.InferenceResponse(output_tensors=tensors)
