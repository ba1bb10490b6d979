"""Whether products are computed in bfloat16: the passes for it, the target, and why not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial

import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import cast_bf16, fuse_plugin
from twofour.compiler.passes.pipeline import BF16, PIPELINE, Fused, Pass
from twofour.core.target import Target, why_no_bf16
from twofour.onnx_tools.plugins import plugin_of


def passes_for(
    target: Target, bf16: bool, floats: Mapping[str, str], chosen: Collection[str] = ()
) -> tuple[Pass, ...]:
    """The passes: those for bfloat16 too where it is allowed and the target has it.

    Args:
        target: what to build for.
        bf16: whether it is allowed.
        floats: why products stay float32 all the same, by their names.
        chosen: results of the imported graph whose products the user keeps in float32.
    """
    plain = tuple(
        replace(each, rule=partial(fuse_plugin.rule, target=target))
        if each.name == fuse_plugin.NAME
        else each
        for each in PIPELINE
    )
    if not bf16 or why_no_bf16(target):
        return plain
    cast, *others = BF16
    rule = partial(cast_bf16.rule, floats=floats, chosen=chosen)
    return (*plain, replace(cast, rule=rule), *others)


def target_of(target: Target, fused: Fused, bf16: bool) -> Target:
    """The target, with bfloat16 only if something uses it: else an engine runs without it.

    Args:
        target: what to build for.
        fused: the graph.
        bf16: whether it is allowed.
    """
    if bf16 and not why_no_bf16(target) and any(map(_multiplies_bf16, fused.model.graph)):
        return replace(target, bf16=True)
    values = (value for node in fused.model.graph for value in (*node.inputs, *node.outputs))
    used = any(v is not None and v.dtype == ir.DataType.BFLOAT16 for v in values)
    return replace(target, bf16=used)


def _multiplies_bf16(node: ir.Node) -> bool:
    """Whether a tactic of its plugin may multiply in bfloat16."""
    operator = plugin_of(node)
    return operator is not None and any(tactic.bfloat16 for tactic in operator.cpu)


def why_float(target: Target, fused: Fused, bf16: bool) -> Mapping[str, str]:
    """Why Convs and Gemms stay float32, by name; nothing where nobody asked for bfloat16."""
    if not bf16:
        return {}
    if reason := why_no_bf16(target):
        nodes = [node for node in fused.model.graph if ops.is_fused(node)]
        floats = [n for n in nodes if ops.parse_type(n.op_type).base in ("Conv", "Gemm")]
        return {node.name or "": f"not bfloat16: {reason}" for node in floats}
    found = [r for r in fused.refusals if r.rule == cast_bf16.NAME]
    return {r.node: f"not bfloat16: {r.reason}" for r in found}
