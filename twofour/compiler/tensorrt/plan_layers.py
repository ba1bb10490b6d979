"""TensorRT's layers as those of a plan: in the source model's names, with the reasons for dense.

A product that could skip zeros and does not is noted with why: it is what is paid for and lost most
often, and what TensorRT says least about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from twofour.compiler.tensorrt.layers import Port, Reported, Sparsity, read_layers
from twofour.core.patterns import held
from twofour.core.plan import CHOSEN_LATER, is_sparse
from twofour.engine import Layer
from twofour.onnx_tools.weights import layer_weights

TACTIC, SPARSE_TACTIC = "tensorrt", "2:4 tensorrt"
_SPARSE_PATTERNS = ("2:4", "2:4/pair", "2:4/2d")
_SPARSE_TYPES = ("int8", "float16", "bfloat16")
_MOST_NAMES = 4
_DENSE = "the weight is 2:4, and the kernel is dense: "
LATER = "TensorRT for RTX chooses the kernel, dense or sparse, on the GPU when the engine is loaded"
LOST_QDQ = (
    f"{_DENSE}the model has the weight in int8, but TensorRT computes in float32: there is no "
    "Q/DQ pair right before its input, or Q/DQ stands where no kernel begins"
)
FLOAT = f"{_DENSE}sparse tensor cores take int8 and 16 bits: quantize the model, or build --fp16"
DISABLED = f"{_DENSE}sparsity is disabled"
UNSEEN = (
    f"{_DENSE}TensorRT did not find the pattern in this weight; what stands between the constant "
    "and the layer, a QuantizeLinear for instance, can hide it"
)
SLOWER = f"{_DENSE}TensorRT found it as fast, or fused the layer into one that has no sparse form"


@dataclass(frozen=True)
class _Product:
    """A layer of the model that has a weight.

    Attributes:
        name: of its node.
        pattern: the strictest that the weight has; "dense" for none.
        k: products of one sum.
        weight_bytes: as stored in the model.
        is_quantized: its weight is.
    """

    name: str
    pattern: str
    k: int
    weight_bytes: int
    is_quantized: bool


def plan_layers(
    model: ir.Model, report: str, sparsity: Sparsity, is_sparse_allowed: bool
) -> tuple[Layer, ...]:
    """The layers of an engine.

    Args:
        model: that was built, in the names of the source, before it was cast to 16 bits.
        report: what TensorRT says of its layers.
        sparsity: its lists.
        is_sparse_allowed: sparse kernels were allowed to compete.
    """
    layers = read_layers(report)
    names = {node.name or "" for node in model.graph.all_nodes()}
    sources = [tuple(dict.fromkeys(n for n in each.sources if n in names)) for each in layers]
    claims = _claims(layers, sources, _products(model))
    return tuple(
        _layer(reported, source, claims.get(index), sparsity, is_sparse_allowed)
        for index, (reported, source) in enumerate(zip(layers, sources, strict=True))
    )


def warnings_of(model: ir.Model, layers: Sequence[Layer]) -> tuple[str, ...]:
    """What is worth a warning of weights that are 2:4: kernels that are dense, or not told.

    Args:
        model: as for `plan_layers`.
        layers: of the plan.
    """
    could = [product.name for product in _products(model) if product.pattern in _SPARSE_PATTERNS]
    found = [layer for layer in layers if layer.pattern in _SPARSE_PATTERNS]
    dense = [each for each in found if not is_sparse(each.tactic) and each.tactic != CHOSEN_LATER]
    lost = [each for each in dense if LOST_QDQ in each.notes]
    notes = []
    if dense:
        why = f", {len(lost)} of them because of where Q/DQ stands" if lost else ""
        count = f"{len(dense)} of {len(could)} layers with 2:4 weights"
        notes.append(f"{count} run on dense kernels{why}")
    told = {name for layer in layers for name in layer.source}
    untold = [name for name in could if name not in told]
    if untold:
        names = ", ".join(untold[:_MOST_NAMES]) + ", ..." * (len(untold) > _MOST_NAMES)
        count = f"{len(untold)} of {len(could)} layers with 2:4 weights"
        notes.append(f"of {count} TensorRT does not say how they run: {names}")
    return tuple(notes)


def _claims(
    layers: Sequence[Reported], sources: Sequence[tuple[str, ...]], products: Sequence[_Product]
) -> dict[int, _Product]:
    """The layer that computes each product, by index: one of that kind, else with most constants.

    A layer that only scales or rounds what a product made names its node too.
    """
    claims: dict[int, _Product] = {}
    for product in products:
        own = [i for i, source in enumerate(sources) if product.name in source and i not in claims]
        likely = [i for i in own if layers[i].is_product] or own
        if likely:
            claims[max(likely, key=lambda i: _constant_count(layers[i]))] = product
    return claims


def _constant_count(reported: Reported) -> int:
    return sum(abs(math.prod(port.shape)) for port in reported.constants)


def _products(model: ir.Model) -> list[_Product]:
    found = []
    for node, weight in layer_weights(model):
        patterns = held(weight.values)
        is_quantized = weight.scale is not None
        k = math.prod(weight.values.shape[1:])
        pattern = patterns[0] if patterns else "dense"
        found.append(_Product(node.name or "", pattern, k, weight.stored.nbytes, is_quantized))
    return found


def _layer(
    reported: Reported,
    source: tuple[str, ...],
    product: _Product | None,
    sparsity: Sparsity,
    is_sparse_allowed: bool,
) -> Layer:
    tactic, notes = TACTIC, tuple[str, ...]()
    if product is not None:
        tactic = _tactic(reported, product, sparsity, is_sparse_allowed)
        notes = tuple(filter(None, [_why(reported, product, tactic, sparsity, is_sparse_allowed)]))
    outputs = [math.prod(port.shape) for port in reported.outputs[:1]]
    return Layer(
        name=product.name if product is not None else (source or (reported.name,))[0],
        op=reported.kind or "layer",
        tactic=tactic,
        config="" if reported.is_open else reported.tactic,
        shape=_shape(reported),
        precision=reported.precision,
        pattern=product.pattern if product is not None else "",
        macs=product.k * abs(outputs[0]) if product is not None and outputs else 0,
        weight_bytes=product.weight_bytes if product is not None else 0,
        notes=notes,
        source=source,
    )


def _tactic(
    reported: Reported, product: _Product, sparsity: Sparsity, is_sparse_allowed: bool
) -> str:
    """Sparse, dense, or open: a kernel that is chosen later may be sparse where it can be."""
    if reported.is_sparse or reported.name in (sparsity.chosen or frozenset()):
        return SPARSE_TACTIC
    may_be = product.pattern in _SPARSE_PATTERNS and reported.precision in _SPARSE_TYPES
    return CHOSEN_LATER if reported.is_open and may_be and is_sparse_allowed else TACTIC


def _why(
    reported: Reported,
    product: _Product,
    tactic: str,
    sparsity: Sparsity,
    is_sparse_allowed: bool,
) -> str:
    """Why a product whose weight is 2:4 is not sparse; "" where it is, or cannot be."""
    if product.pattern not in _SPARSE_PATTERNS or tactic == SPARSE_TACTIC:
        return ""
    if not is_sparse_allowed:
        return DISABLED
    if reported.precision and reported.precision not in _SPARSE_TYPES:
        return LOST_QDQ if product.is_quantized else FLOAT
    if tactic == CHOSEN_LATER:
        return LATER
    if sparsity.eligible is not None and reported.name not in sparsity.eligible:
        return UNSEEN
    return SLOWER


def _shape(reported: Reported) -> str:
    """In words: 256x1024 -> 256x1024."""
    ends: tuple[tuple[Port, ...], ...] = (reported.inputs[:1], reported.outputs[:1])
    texts = ["x".join(map(str, port.shape)) for ports in ends for port in ports]
    return " -> ".join(texts)
