"""The forms that a model can take on before anybody pruned or calibrated it: pattern x precision.

    form        weights                          activations
    f32         as they are                      float32
    bf16        as they are                      bfloat16, where the compiler finds it faster
    fp16        as they are                      float16, on a GPU
    int8        rounded                          Q/DQ with made-up ranges
    fp8         rounded                          likewise, in float8, on a GPU

Each also pruned to a pattern, by magnitude. Such an engine computes nothing of use, but takes the
time that the real one will take: times depend on patterns, never on values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from twofour.compiler.assemble import Progress
from twofour.compiler.build import BuildOptions, Model, compile_model, loaded
from twofour.compiler.importer import ASSUMED_KEY, import_graph
from twofour.compiler.requests import Shape
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.patterns import is_pattern
from twofour.core.target import Target, why_no_bf16
from twofour.engine import Engine
from twofour.kernels.cpu.tactic import tactics
from twofour.onnx_tools.eligible import is_quantized
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.placeholder import placeholder_quantize
from twofour.onnx_tools.prune import Pruned, prune
from twofour.onnx_tools.weights import layer_weights

F32, FP16, BF16, INT8, FP8 = "f32", "fp16", "bf16", "int8", "fp8"
PRECISIONS = (F32, BF16, INT8)
GPU_PRECISIONS = (F32, FP16, BF16, INT8, FP8)
"""Those of a GPU; of the last two all that is not quantized is float16."""
PATTERNS = ("2:4", "2:4/pair")
WORDS = {F32: "float32", FP16: "float16", BF16: "bfloat16", INT8: "INT8", FP8: "float8"}
_DTYPES = {F32: "float32", BF16: "bfloat16", INT8: "int8"}


@dataclass(frozen=True)
class Form:
    """One form.

    Attributes:
        precision: "f32", "bf16" or "int8"; on a GPU "fp16" or "fp8" too.
        pattern: of the weights; "" for dense.
    """

    precision: str
    pattern: str = ""

    def __str__(self) -> str:
        """In words: `INT8 2:4/pair`."""
        return f"{WORDS[self.precision]} {self.pattern or 'dense'}"


@dataclass(frozen=True)
class Layer:
    """A Conv, Gemm or MatMul with a constant weight, as the compiler names it.

    Attributes:
        name: of the node.
        skip: what `twofour prune --skip` calls it: the node's name in the file, else its weight's.
        pruned: whether its weight is 2:4 already.
    """

    name: str
    skip: str
    pruned: bool


@dataclass(frozen=True)
class Forms:
    """A model in its dense forms, ready to be pruned and built.

    Attributes:
        bases: the model of each precision, dense unless it came pruned.
        layers: what could be pruned.
        notes: what was found that the user should know, such as why a precision is left out.
        target: what to build for.
    """

    bases: Mapping[str, ir.Model]
    layers: tuple[Layer, ...]
    notes: tuple[str, ...]
    target: Target
    _reports: dict[str, tuple[Pruned, ...]] = field(default_factory=dict)

    @staticmethod
    def of(
        model: Model, shapes: Mapping[str, Shape], precisions: Sequence[str], target: Target
    ) -> Forms:
        """Reads a model and makes what its precisions need.

        Args:
            model: an ONNX file, or a model in memory; not changed.
            shapes: of inputs by name; an open first dimension left out becomes 1.
            precisions: those wanted.
            target: what to build for.

        Raises:
            InputError: the model or a shape is not usable, a size beside the batch is open, or no
                precision is left.
        """
        source = loaded(model)
        graph = import_graph(source, shapes)
        layers = _layers(source, graph)
        notes = _assumed(graph)
        if had := sum(layer.pruned for layer in layers):
            notes.append(
                f"{had} of {len(layers)} weights are 2:4 already; dense: as if they were not"
            )
        bases = {}
        for precision in precisions:
            try:
                bases[precision] = _base(graph, precision, target)
            except (InputError, UnsupportedError) as e:
                notes.append(f"no {WORDS[precision]}: {e.what}")
                notes += [f"  {reason}" for reason in e.reasons]
        if not bases:
            raise InputError("nothing is left to forecast", notes, "ask for another --precision")
        return Forms(bases, layers, tuple(notes), target)

    def list(self, patterns: Sequence[str]) -> tuple[Form, ...]:
        """All forms: of each precision the dense one first, then the patterns that have kernels."""
        return tuple(
            Form(precision, pattern)
            for precision in self.bases
            for pattern in ("", *(p for p in patterns if p in self._with_kernels(precision)))
        )

    def build(self, form: Form, options: BuildOptions, progress: Progress | None = None) -> Engine:
        """The engine of a form.

        Args:
            form: one of `list`.
            options: how to build; what the form decides is overruled.
            progress: told about each layer.

        Raises:
            UnsupportedError: the model cannot be compiled.
        """
        base = self.bases[form.precision]
        if form.pattern:
            base, self._reports[form.pattern] = prune(base, form.pattern)
        on_gpu = self.target.cuda is not None
        chosen = replace(
            options,
            sparsity="enable" if form.pattern else "disable",
            bf16=form.precision == BF16,
            fp16=on_gpu and form.precision in (FP16, INT8, FP8),
            fp8=form.precision == FP8,
            target=self.target if on_gpu else options.target,
            race=False,
        )
        return compile_model(base, chosen, progress)

    def _with_kernels(self, precision: str) -> set[str]:
        """The patterns that have kernels: a sparse tensor core takes any 2:4 alike."""
        return {"2:4"} if self.target.cuda is not None else _with_kernels(precision)

    def refusals(self, pattern: str) -> dict[str, str]:
        """Why layers could not be pruned to a pattern that was built, by their names."""
        held = {layer.name for layer in self.layers if layer.pruned}
        report = self._reports.get(pattern, ())
        return {e.node: e.reason for e in report if e.reason and e.node not in held}


def _assumed(graph: ir.Model) -> list[str]:
    """A note about first dimensions that became 1 unasked; others are refused."""
    assumed = json.loads(graph.metadata_props[ASSUMED_KEY])
    for value in graph.graph.inputs:
        dims = list(value.shape or ())
        opened = [f"{value.name}[{axis}]" in assumed for axis in range(len(dims))]
        if any(opened[1:]):
            sizes = "x".join("N" if o else str(d) for d, o in zip(dims, opened, strict=True))
            raise InputError(
                f"input {value.name!r} has open sizes",
                [f"a forecast is for one shape, and it leaves open {', '.join(assumed)}"],
                f"give them: --shapes {value.name}:{sizes}",
            )
    return [f"{', '.join(assumed)}: open in the model, forecast for 1"] if assumed else []


def _base(graph: ir.Model, precision: str, target: Target) -> ir.Model:
    """The dense model of a precision."""
    if is_quantized(graph):
        if precision in (INT8, FP8):
            return graph
        raise InputError("the model is quantized already, which decides what is INT8 in it")
    if precision == BF16 and target.cuda is None and (reason := why_no_bf16(target)):
        raise UnsupportedError(reason)
    if precision not in (INT8, FP8):
        return graph
    symmetric = QuantizeOptions(activation="int8") if target.cuda is not None else None
    return placeholder_quantize(graph, symmetric)


def _layers(source: ir.Model, graph: ir.Model) -> tuple[Layer, ...]:
    """The prunable layers of an imported model, with the names they have in its file."""
    names = {node.name for node, _ in layer_weights(source)}
    return tuple(
        Layer(
            node.name or "",
            (node.name if node.name in names else weight.name) or "",
            is_pattern(weight.values, "2:4"),
        )
        for node, weight in layer_weights(graph)
    )


def _with_kernels(precision: str) -> set[str]:
    """The patterns that have kernels; those of 2:4 that keep 4 of 8 in one step take 4:8 too."""
    found = {tactic.pattern for tactic in tactics() if tactic.dtype == _DTYPES[precision]}
    return found | ({"4:8"} if "2:4" in found else set())
