"""The whole model as one step on ONNX Runtime: for models that the compiler cannot take.

    whole_engine(source, requests, target, threads, "the model cannot be converted from ...")

The step holds the source model as it was given, so what ONNX Runtime runs, the engine runs. The
plan names the reason. Its outputs have a shape in the plan where that follows from the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from twofour.compiler.assemble import CODE
from twofour.compiler.fit import Fit
from twofour.compiler.importer import bind_inputs
from twofour.compiler.native import kind_of, static_shape
from twofour.compiler.origins import MODEL
from twofour.compiler.requests import Request
from twofour.compiler.second_opinion import require_taken, told
from twofour.compiler.writes import SourceNames
from twofour.core.errors import UnsupportedError
from twofour.core.sizes import Count
from twofour.core.target import Target
from twofour.core.version import __version__
from twofour.engine import (
    DTYPES,
    Bytes,
    Engine,
    Layer,
    Plan,
    Profile,
    Read,
    Step,
    TensorInfo,
    Write,
)
from twofour.kernels.cpu.llvm import Source, compile_object
from twofour.kernels.cpu.program import threads_text
from twofour.onnx_tools.infer import inferred
from twofour.onnx_tools.load import model_bytes

OP_TYPE = "Model"
"""What the one layer of each profile is called."""


def whole_engine(
    source: ir.Model, requests: Sequence[Request], target: Target, threads: int, why: str
) -> Engine:
    """The model as an engine of one step for each profile, all of them on ONNX Runtime.

    Args:
        source: the model as loaded; not changed.
        requests: one for each profile.
        target: what the engine is for.
        threads: that ONNX Runtime may use.
        why: the reason, for `explain`.

    Returns:
        The engine, without the name and hash of its source, and without times.

    Raises:
        InputError: ONNX Runtime refuses the model, or a shape contradicts it.
        UnsupportedError: an input or output is of a kind that engines do not pass on.
    """
    source = ir.external_data.load_to_model(source.clone())
    common.RemoveInitializersFromInputsPass()(source)
    subgraphs: dict[str, Bytes] = {}
    profiles, layers = [], []
    for index, request in enumerate(requests):
        model = source.clone()
        if request.symbols:
            inputs = _open_inputs(source, request)
        else:
            bind_inputs(model.graph, request.shapes_at(()))
            inputs = tuple(_info(v, _numbers(v.shape)) for v in model.graph.inputs)
        data = model_bytes(model)
        require_taken(data, why)
        outputs = _outputs(model)
        symbol = f"model{index}"
        symbol = next((key for key, held in subgraphs.items() if held.tobytes() == data), symbol)
        subgraphs[symbol] = np.frombuffer(data, np.uint8)
        ends = [tuple(info.name for info in infos) for infos in (inputs, outputs)]
        step = Step("onnxruntime", symbol, ends[0], ends[1], (index,))
        profiles.append(Profile(inputs, outputs, (), (step,), 8 * len(request.symbols), (),
                                request.symbols))  # fmt: skip
        name = source.graph.name or "model"
        writes = tuple(Write(info, info.name) for info in outputs)
        layers.append(Layer(name, OP_TYPE, "onnxruntime", notes=(f"whole on ONNX Runtime: {why}",),
                            source=SourceNames.of(source.graph).all, writes=writes,
                            reads=tuple(Read(MODEL, name) for name in ends[0])))  # fmt: skip
    code = compile_object([Source(threads_text(target.arch))], target)
    plan = Plan(
        target=target,
        version=__version__,
        source_sha256="",
        profiles=tuple(profiles),
        layers=tuple(layers),
        threads=threads,
        code=(CODE,),
        graph={"operators": len(source.graph), "fused": len(source.graph), "steps": 1},
    )
    return Engine(plan, np.zeros(0, np.uint8), {CODE: np.frombuffer(code, np.uint8)}, subgraphs)


def _open_inputs(source: ir.Model, request: Request) -> tuple[TensorInfo, ...]:
    """The inputs where dimensions are open."""
    fit = Fit.of(request.symbols)
    shapes = []
    for values in fit.points:
        graph = source.clone().graph
        bind_inputs(graph, request.shapes_at(values))
        shapes.append([_numbers(value.shape) for value in graph.inputs])
    return tuple(
        _info(value, [fit.count(sizes) for sizes in zip(*(s[i] for s in shapes), strict=True)])
        for i, value in enumerate(source.graph.inputs)
    )


def _outputs(model: ir.Model) -> tuple[TensorInfo, ...]:
    """The outputs, with shapes that follow from the operators; what the file declares may err."""
    proto = ir.to_proto(model)
    for end in proto.graph.output:
        if end.type.HasField("tensor_type"):
            end.type.tensor_type.ClearField("shape")
    opinions = told(proto, [value.name or "" for value in model.graph.outputs])
    found = {value.name: value for value in ir.from_proto(inferred(proto)).graph.outputs}
    infos = []
    for value in model.graph.outputs:
        opinion = opinions.get(value.name or "")
        dims = opinion.shape if opinion is not None else None
        if value.dtype is None and opinion is not None and opinion.dtype is not None:
            value.dtype = opinion.dtype
        infos.append(_info(value, dims or static_shape(found[value.name])))
    return tuple(infos)


def _numbers(shape: ir.Shape | None) -> tuple[int, ...]:
    """The dimensions of an input; of what is no tensor, and so refused, none."""
    return shape.numpy() if shape is not None and shape.is_static() else ()


def _info(value: ir.Value, dims: Sequence[Count] | None) -> TensorInfo:
    """An input or output; `dims` are None where the shape is not known."""
    name, kind = value.name or "", kind_of(value)
    if kind not in DTYPES:
        raise UnsupportedError(
            f"an engine does not pass on {name!r}, which is {kind}",
            [f"expected a tensor of {', '.join(sorted(DTYPES))}"],
            "cut the model so that this value is neither an input nor an output",
        )
    if dims is None:
        return TensorInfo(name, kind, (), known=False)
    return TensorInfo.of(name, kind, dims)
