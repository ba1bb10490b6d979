"""OpenVINO on the CPU: latency hint, one stream, tensors shared with numpy.

The precision it computes float models in is its own choice (bfloat16 where the CPU has it) unless
asked otherwise, and is named in the setting. Input and output tensors are set once and shared: a
call copies nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino

from twofour.bench.inputs import model_inputs, require_feeds
from twofour.bench.timing import Array, Contestant, Feeds
from twofour.core.errors import InputError


def prepare(model: Path, feeds: Feeds, threads: int, precision: str = "") -> Contestant:
    """An infer request with shared input tensors.

    Args:
        model: an ONNX file.
        feeds: input name -> array.
        threads: at most so many compute.
        precision: that floats are computed in, such as "f32" or "bf16"; "" for its own choice.

    Raises:
        InputError: OpenVINO refuses the file or the input.
    """
    require_feeds(feeds, model_inputs(model), model)
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if precision:
        config["INFERENCE_PRECISION_HINT"] = precision
    try:
        core = openvino.Core()
        network = core.read_model(str(model))
        network.reshape({name: list(array.shape) for name, array in feeds.items()})
        compiled = core.compile_model(network, "CPU", config)
        request = compiled.create_infer_request()
        shared = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        for name, array in shared.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        request.infer(share_outputs=True)
    except RuntimeError as e:
        raise InputError(f"OpenVINO cannot run {model}", [str(e).strip().splitlines()[-1]]) from e

    def call() -> None:
        request.infer(share_outputs=True)

    def outputs() -> dict[str, Array]:
        call()
        return {port.get_any_name(): request.get_tensor(port).data for port in compiled.outputs}

    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    setting = f"threads {threads}, latency hint, floats as {precision}, shared tensors"
    version = str(openvino.__version__).partition("-")[0]
    return Contestant("OpenVINO", version, setting, call, outputs)
