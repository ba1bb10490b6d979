"""Operators of plugins that run in Python: what the engine keeps of them."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from twofour.compiler.native import constant, name_of
from twofour.core.errors import UnsupportedError
from twofour.core.plan import CONSTANT, CONSTANT_ALIGNMENT, LEFT_OUT, PluginCall
from twofour.core.plugins import package_of
from twofour.engine import DTYPES, Bytes, TensorInfo
from twofour.onnx_tools.plugins import attributes_of, plugin_of


def python_call(symbol: str, node: ir.Node, inputs: Sequence[str]) -> tuple[PluginCall, Bytes]:
    """What a step asks of a plugin, and the constants of its node.

    Args:
        symbol: of the step.
        node: its operator is installed.
        inputs: names of what the step reads.

    Raises:
        UnsupportedError: it reads a constant of a type that engines do not hold.
    """
    operator = plugin_of(node)
    assert operator is not None
    operands, constants, data = [], [], bytearray()
    for value in node.inputs:
        if value is None:
            operands.append(LEFT_OUT)
        elif value.const_value is None:
            operands.append(list(inputs).index(name_of(value)))
        else:
            array = np.ascontiguousarray(constant(value))
            if array.dtype.name not in DTYPES:
                raise UnsupportedError(
                    f"an engine does not hold {value.name!r}, which is {array.dtype.name}",
                    [f"{operator} {node.name!r} runs in Python and reads it"],
                )
            operands.append(CONSTANT)
            constants.append(TensorInfo(name_of(value), array.dtype.name, array.shape))
            data += bytes(-len(data) % CONSTANT_ALIGNMENT) + array.tobytes()
    call = PluginCall(
        symbol,
        operator.domain,
        operator.name,
        operator.version,
        package_of(operator),
        json.dumps(dict(attributes_of(node, operator)), sort_keys=True),
        tuple(operands),
        tuple(constants),
    )
    return call, np.frombuffer(bytes(data), np.uint8)
