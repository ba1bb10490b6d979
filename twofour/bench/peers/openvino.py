"""OpenVINO on the CPU: latency hint, one stream, tensors shared with numpy.

The precision it computes float models in is its own choice (bfloat16 where the CPU has it) unless
asked otherwise, and is named in the setting. Input and output tensors are set once and shared: a
call copies nothing. Several callers get a stream each: requests of one stream would take turns.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from twofour.bench.inputs import model_inputs, require_feeds
from twofour.bench.timing import Array, Contestant, Feeds
from twofour.core.errors import InputError


def prepare(
    model: Path, feeds: Feeds, threads: int, precision: str = "", callers: int = 1
) -> Contestant:
    """An infer request with shared input tensors for each caller.

    Args:
        model: an ONNX file.
        feeds: input name -> array.
        threads: at most so many compute one call.
        precision: that floats are computed in, such as "f32" or "bf16"; "" for its own choice.
        callers: so many call at once.

    Raises:
        InputError: OpenVINO refuses the file or the input.
    """
    require_feeds(feeds, model_inputs(model), model)
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads * callers}
    if callers > 1:
        config["NUM_STREAMS"] = str(callers)
    if precision:
        config["INFERENCE_PRECISION_HINT"] = precision
    try:
        core = openvino.Core()
        network = core.read_model(str(model))
        network.reshape({name: list(array.shape) for name, array in feeds.items()})
        compiled = core.compile_model(network, "CPU", config)
        requests = [_request(compiled, feeds) for _ in range(callers)]
    except RuntimeError as e:
        raise InputError(f"OpenVINO cannot run {model}", [str(e).strip().splitlines()[-1]]) from e

    def outputs() -> dict[str, Array]:
        calls[0]()
        return {port.get_any_name(): requests[0].get_tensor(port).data for port in compiled.outputs}

    calls = [partial(request.infer, share_outputs=True) for request in requests]

    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    setting = f"threads {threads}, latency hint, floats as {precision}, shared tensors"
    if callers > 1:
        setting += f", {callers} streams"
    version = str(openvino.__version__).partition("-")[0]
    return Contestant("OpenVINO", version, setting, calls[0], outputs, tuple(calls[1:]))


def _request(compiled: Any, feeds: Feeds) -> Any:
    """An infer request that has run once."""
    request = compiled.create_infer_request()
    for name, array in feeds.items():
        tensor = openvino.Tensor(np.ascontiguousarray(array), shared_memory=True)
        request.set_tensor(name, tensor)
    request.infer(share_outputs=True)
    return request
