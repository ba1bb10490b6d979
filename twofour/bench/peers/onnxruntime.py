"""ONNX Runtime on the CPU: all graph optimisations, one operator after another, bound buffers.

Open sizes of the file are fixed to those of the input, so that the optimiser knows them. Input and
output are bound once: a call copies nothing and allocates nothing. Several callers share a session,
each with buffers of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process

from twofour.bench.inputs import model_inputs, require_feeds
from twofour.bench.timing import Array, Call, Contestant, Feeds
from twofour.core.errors import InputError

_REFUSED = (
    onnxruntime.capi.onnxruntime_pybind11_state.Fail,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph,
    onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented,
    onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException,
)


def prepare(model: Path, feeds: Feeds, threads: int, callers: int = 1) -> Contestant:
    """A session with bound input and output.

    Args:
        model: an ONNX file.
        feeds: input name -> array.
        threads: at most so many compute one call.
        callers: so many call at once.

    Raises:
        InputError: ONNX Runtime refuses the file or the input.
    """
    declared = model_inputs(model)
    require_feeds(feeds, declared, model)
    # Its threads help all callers, of whom each computes itself too.
    options = _options(1 + callers * (threads - 1))
    for each in declared:
        for dim, size in zip(each.dims, feeds[each.name].shape, strict=True):
            if isinstance(dim, str):
                options.add_free_dimension_override_by_name(dim, size)
    try:
        session = _session(model, options)
        names = [output.name for output in session.get_outputs()]
        first = dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except _REFUSED as e:
        raise InputError(f"ONNX Runtime cannot run {model}", [str(e).splitlines()[0]]) from e
    bound = [_bound(session, feeds, first) for _ in range(callers)]
    setting = f"threads {threads}, all graph optimisations, sequential, bound buffers"
    if callers > 1:
        setting += f", one session for {callers} callers"
    call, outputs = bound[0]
    more = tuple(call for call, _ in bound[1:])
    return Contestant("ONNX Runtime", onnxruntime.__version__, setting, call, outputs, more)


def predictor(model: Path, name: str, threads: int) -> Callable[[Array], Array]:
    """The first output as a function of the input `name`, for any size that the file leaves open.

    Raises:
        InputError: ONNX Runtime refuses the file.
    """
    try:
        session = _session(model, _options(threads))
    except _REFUSED as e:
        raise InputError(f"ONNX Runtime cannot run {model}", [str(e).splitlines()[0]]) from e

    def predict(x: Array) -> Array:
        first: Array = session.run(None, {name: np.ascontiguousarray(x)})[0]
        return first

    return predict


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return options


def _session(model: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def _bound(
    session: onnxruntime.InferenceSession, feeds: Feeds, first: dict[str, Array]
) -> tuple[Call, Callable[[], dict[str, Array]]]:
    """A call, and what gives its outputs, with buffers of the sizes that a first run showed."""
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in feeds.items()}
    results = {name: onnxruntime.OrtValue.ortvalue_from_numpy(y) for name, y in first.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in results.items():
        binding.bind_ortvalue_output(name, value)

    def call() -> None:
        session.run_with_iobinding(binding)

    def outputs() -> dict[str, Array]:
        call()
        return {name: value.numpy() for name, value in results.items()}

    return call, outputs


def write_dynamic(model: Path, path: Path) -> None:
    """Writes a float model with weights as int8 per channel, activations quantized at run time.

    Raises:
        InputError: ONNX Runtime's quantizer refuses the file.
    """
    temporary, prepared = (path.with_name(path.name + end) for end in (".part", ".prepared"))
    try:
        quant_pre_process(model, prepared, skip_symbolic_shape=True)
        quantize_dynamic(prepared, temporary, per_channel=True, weight_type=QuantType.QInt8)
        temporary.replace(path)
    except (*_REFUSED, ValueError) as e:
        raise InputError(f"ONNX Runtime cannot quantize {model}", [str(e).splitlines()[0]]) from e
    finally:
        temporary.unlink(missing_ok=True)
        prepared.unlink(missing_ok=True)


def reference(model: Path, feeds: Feeds, threads: int) -> dict[str, Array]:
    """What the file means: its outputs without any graph optimisation.

    Raises:
        InputError: ONNX Runtime refuses the file or the input.
    """
    options = _options(threads)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = _session(model, options)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except _REFUSED as e:
        raise InputError(f"ONNX Runtime cannot run {model}", [str(e).splitlines()[0]]) from e
