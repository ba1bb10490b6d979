"""The passes in their order, each with the reason for its place, and the driver that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from twofour.compiler import ops
from twofour.compiler.passes import (
    canonical_activation,
    canonical_batchnorm,
    canonical_conv,
    canonical_conv_1d,
    canonical_conv_transpose,
    canonical_gather,
    canonical_gemm,
    canonical_quantize,
    cast_bf16,
    drop_requantize,
    fold_batchnorm,
    fold_bias,
    fold_dequantize,
    fold_weight_quantize,
    fuse_attention,
    fuse_dynamic,
    fuse_epilogue,
    fuse_integer,
    fuse_integer_activation,
    fuse_integer_add,
    fuse_integer_mul,
    fuse_integer_norm,
    fuse_integer_pool,
    fuse_layer_norm,
    fuse_plugin,
    fuse_requantize,
    fuse_slice_pad,
    fuse_tokens,
    hold_bf16,
    lineage,
    merge_projections,
    merge_quantize,
    move_clip,
    move_dequantize,
    move_quantize,
    read_bf16,
    rewrite,
    split_projections,
    text,
    unfuse_conv,
    unfuse_gelu,
    unfuse_gemm,
    unfuse_norm,
    unfuse_qlinear,
)
from twofour.core.errors import Error
from twofour.onnx_tools.plugins import attach_meanings


@dataclass(frozen=True)
class Pass:
    """One entry of the list.

    Attributes:
        name: as refusals and dumps call it.
        rule: looks at one node.
        why: the reason for its place.
    """

    name: str
    rule: rewrite.Rule
    why: str


@dataclass(frozen=True)
class Fused:
    """What the passes made.

    Attributes:
        model: the fused graph; executable on ONNX Runtime.
        refusals: what was left as it was, and why.
    """

    model: ir.Model
    refusals: tuple[rewrite.Refusal, ...]


UNFUSE = (
    Pass(unfuse_conv.NAME, unfuse_conv.rule, "shapes and constants of what follows depend on it"),
    Pass(unfuse_gemm.NAME, unfuse_gemm.rule, "likewise"),
    Pass(unfuse_gelu.NAME, unfuse_gelu.rule, "likewise"),
    Pass(unfuse_norm.NAME, unfuse_norm.rule, "likewise"),
    Pass(unfuse_qlinear.NAME, unfuse_qlinear.rule, "likewise"),
)
"""Runs at import; that it stands in the list again tells why an operator was left."""

PIPELINE = (
    *UNFUSE,
    Pass(canonical_quantize.NAME, canonical_quantize.rule, "every later rule reads one spelling"),
    Pass(fold_weight_quantize.NAME, fold_weight_quantize.rule, "weights become constants"),
    Pass(canonical_conv_transpose.NAME, canonical_conv_transpose.rule, "what it makes is a Conv"),
    Pass(canonical_conv_1d.NAME, canonical_conv_1d.rule, "likewise, of every Conv over one axis"),
    Pass(canonical_conv.NAME, canonical_conv.rule, "needs constant weights"),
    Pass(canonical_gather.NAME, canonical_gather.rule, "what it makes constant may be a weight"),
    Pass(canonical_gemm.NAME, canonical_gemm.rule, "needs constant weights"),
    Pass(fuse_dynamic.NAME, fuse_dynamic.rule, "likewise, of those on integers"),
    Pass(
        canonical_activation.NAME,
        canonical_activation.rule,
        "before an Add of an activation could pass for a bias",
    ),
    Pass(fold_bias.NAME, fold_bias.rule, "before the Add could pass for a residual"),
    Pass(fold_batchnorm.NAME, fold_batchnorm.rule, "before Relu and Add are next to the Conv"),
    Pass(canonical_batchnorm.NAME, canonical_batchnorm.rule, "takes what no weight took"),
    Pass(split_projections.NAME, split_projections.rule, "needs products and their bias"),
    Pass(move_dequantize.NAME, move_dequantize.rule, "brings DQ to the operators that want bytes"),
    Pass(move_quantize.NAME, move_quantize.rule, "brings Q to the operators that store bytes"),
    Pass(merge_quantize.NAME, merge_quantize.rule, "the moves brought equal quantizers together"),
    Pass(move_clip.NAME, move_clip.rule, "brings Relu to the Conv, from behind its quantizer"),
    Pass(drop_requantize.NAME, drop_requantize.rule, "the moves put Q behind an equal DQ"),
    Pass(fuse_layer_norm.NAME, fuse_layer_norm.rule, "needs its constants beside it"),
    Pass(fuse_attention.NAME, fuse_attention.rule, "the moves brought Q and DQ to the products"),
    Pass(fuse_plugin.NAME, fuse_plugin.rule, "likewise, to the operators of plugins"),
    Pass(fuse_tokens.NAME, fuse_tokens.rule, "what attention reads through is gone by now"),
    Pass(fuse_slice_pad.NAME, fuse_slice_pad.rule, "the moves left Slice and Pad on bytes"),
    Pass(fuse_epilogue.NAME, fuse_epilogue.rule, "on float operators, so once for both kinds"),
    Pass(fuse_integer.NAME, fuse_integer.rule, "takes operators with their epilogue"),
    Pass(fuse_integer_add.NAME, fuse_integer_add.rule, "takes the Adds that no Conv took"),
    Pass(fuse_integer_mul.NAME, fuse_integer_mul.rule, "no activation is written as one any more"),
    Pass(
        fuse_integer_activation.NAME,
        fuse_integer_activation.rule,
        "takes the activations that neither Conv nor Add took",
    ),
    Pass(fuse_requantize.NAME, fuse_requantize.rule, "takes the quantizers that nobody else took"),
    Pass(fuse_integer_norm.NAME, fuse_integer_norm.rule, "needs the merged quantizers"),
    Pass(merge_projections.NAME, merge_projections.rule, "takes finished products and attention"),
    Pass(fuse_integer_pool.NAME, fuse_integer_pool.rule, "needs the moved quantizers"),
    Pass(fold_dequantize.NAME, fold_dequantize.rule, "what still reads a dequantized constant"),
)

BF16 = (
    Pass(cast_bf16.NAME, cast_bf16.rule, "takes the products that stayed float, fused and joined"),
    Pass(hold_bf16.NAME, hold_bf16.rule, "looks at who rounds a result"),
    Pass(read_bf16.NAME, read_bf16.rule, "takes what is held"),
)
"""What follows where products may be computed in bfloat16."""


def run_passes(
    model: ir.Model, dump: Path | None = None, passes: Sequence[Pass] = PIPELINE
) -> Fused:
    """Fuses an imported model.

    Args:
        model: as `import_graph` returns it; not changed.
        dump: a directory for the ONNX text of the graph before and after each pass, or None.
        passes: the list to run.

    Raises:
        Error: a pass does not come to rest, or leaves an invalid graph.
    """
    model = model.clone()
    lineage.mark(model.graph)
    signature = _signature(model)
    refusals: dict[rewrite.Refusal, None] = {}
    _dump(dump, 0, "imported", model)
    before: list[object] = []
    for index, entry in enumerate(passes, 1):
        found = rewrite.apply(entry.name, entry.rule, model.graph)
        refusals.update(dict.fromkeys(found))
        ops.attach_functions(model)
        attach_meanings(model)
        _dump(dump, index, entry.name, model)
        after = _wiring(model.graph)
        if after != before:
            _verify(model, entry.name, signature)
        before = after
    return Fused(model, tuple(refusals))


def _wiring(graph: ir.Graph) -> list[object]:
    """Equal for graphs of the same nodes with the same operands."""
    return [(id(node), node.op_type, tuple(map(id, node.inputs))) for node in graph]


def _signature(model: ir.Model) -> list[tuple[object, ...]]:
    """Names, types and shapes of the inputs and outputs."""
    values = [*model.graph.inputs, *model.graph.outputs]
    return [(value.name, value.dtype, value.shape) for value in values]


def _verify(model: ir.Model, name: str, signature: list[tuple[object, ...]]) -> None:
    """Raises Error where a pass broke the graph."""
    fix = "this is a defect of the compiler; report it with the model"
    if _signature(model) != signature:
        what = f"pass {name} changed the inputs or outputs of the model"
        raise Error(what, [f"expected {signature}", f"got {_signature(model)}"], fix)
    try:
        for node in model.graph:
            if ops.is_fused(node):
                ops.parse_op(node)
        common.CheckerPass()(model)
    except (ValueError, onnx.checker.ValidationError) as error:
        raise Error(f"pass {name} left an invalid graph", [str(error)], fix) from error


def _dump(directory: Path | None, index: int, name: str, model: ir.Model) -> None:
    """Writes the text of the graph to NN_name.txt."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{index:02}_{name}.txt"
        path.write_text(text.graph_text(model), encoding="utf-8")
