"""Which nodes of the fused graph kernels of the GPU take; the others run on the host, with reasons.

A node is read as for the CPU (compiler/schedule.py): the same description of what it means. What is
left out here is what has no kernel on the GPU yet.
"""

from __future__ import annotations

import onnx_ir as ir

from twofour.compiler import native_rows, ops, schedule
from twofour.compiler.cuda.plugins import read_plugin
from twofour.compiler.native import ConvOp, NativeOp, NotNative
from twofour.core.dynamic import TENSOR
from twofour.onnx_tools.plugins import plugin_of

_ATTENTION = ("Attention", "QAttention", "BAttention")


def read(node: ir.Node) -> NativeOp | str:
    """The node as an operator for kernels of the GPU, or why it is none."""
    found = _read(node)
    if isinstance(found, str):
        return found
    return _missing(found) or found


def _read(node: ir.Node) -> NativeOp | str:
    if ops.is_fused(node) and ops.parse_op(node).base in _ATTENTION:
        try:
            return native_rows.attention_op(ops.parse_op(node))
        except NotNative as reason:
            return str(reason)
    if plugin_of(node) is not None:
        return read_plugin(node)
    return schedule.read(node)


def _missing(op: NativeOp) -> str:
    """What the GPU has no kernel for; "" if it has one."""
    if isinstance(op, ConvOp) and op.dynamic == TENSOR:
        return "a product that quantizes its whole input at run time has no GPU kernel"
    return ""
