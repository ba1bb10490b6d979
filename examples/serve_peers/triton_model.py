"""An ONNX file in Triton's Python backend; `start.py` makes the repository around it.

Triton hands over the requests of a batch one by one: they are joined, run once, and taken apart.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb

# The stub was built before NumPy 2, whose arrays it reads as if they were empty; DLPack is safe.
DLPACK = int(np.__version__.partition(".")[0]) >= 2


class TritonPythonModel:
    """The name is Triton's; config.pbtxt has the parameters `model` and `threads`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Makes the session of one instance."""
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters["threads"])
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            parameters["model"], options, providers=["CPUExecutionProvider"]
        )
        self._inputs = [each.name for each in self._session.get_inputs()]
        self._outputs = [each.name for each in self._session.get_outputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Runs one batch."""
        parts = [
            [_array(pb.get_input_tensor_by_name(request, name)) for request in requests]
            for name in self._inputs
        ]
        if len(requests) == 1:
            feeds = {name: part[0] for name, part in zip(self._inputs, parts, strict=True)}
            return [self._response(self._session.run(self._outputs, feeds))]
        joined = {
            name: np.concatenate(part) for name, part in zip(self._inputs, parts, strict=True)
        }
        arrays = self._session.run(self._outputs, joined)
        ends = np.cumsum([len(each) for each in parts[0]])[:-1]
        split = [np.split(array, ends) for array in arrays]
        return [self._response(list(each)) for each in zip(*split, strict=True)]

    def _response(self, arrays: list[Any]) -> Any:
        named = zip(self._outputs, arrays, strict=True)
        return pb.InferenceResponse([_tensor(name, array) for name, array in named])


def _array(tensor: Any) -> Any:
    return np.from_dlpack(tensor) if DLPACK else tensor.as_numpy()


def _tensor(name: str, array: Any) -> Any:
    array = np.ascontiguousarray(array)
    return pb.Tensor.from_dlpack(name, array) if DLPACK else pb.Tensor(name, array)
