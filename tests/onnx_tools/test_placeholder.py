"""Made-up ranges: Q/DQ where calibration puts it, and engines that are as fast."""

import numpy as np
import onnx_ir as ir

from tests.onnx_tools.networks import option_a, samples
from twofour.compiler.build import build
from twofour.onnx_tools.eligible import is_quantized
from twofour.onnx_tools.placeholder import placeholder_quantize
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize


def nodes(model: ir.Model) -> list[tuple[str | None, str, list[str | None]]]:
    return [(n.name, n.op_type, [v and v.name for v in n.inputs]) for n in model.graph]


def scales(model: ir.Model) -> list[float]:
    steps = [n.inputs[1] for n in model.graph if n.op_type == "QuantizeLinear"]
    return [float(value.const_value.numpy()) for value in dict.fromkeys(steps)]


def test_the_graph_is_that_of_a_calibrated_model() -> None:
    model = option_a()
    made_up, calibrated = placeholder_quantize(model), quantize(model, {"x": samples()})
    assert nodes(made_up) == nodes(calibrated)
    assert is_quantized(made_up)
    assert not is_quantized(model)


def test_no_two_scales_are_equal() -> None:
    """Else values that calibration would round twice would be rounded once."""
    found = scales(placeholder_quantize(option_a()))
    assert len(found) > 3
    assert len(set(found)) == len(found)


def test_the_same_kernels_are_built() -> None:
    """Each layer computes the same: operator, type, shape, bounds, tables."""

    def built(model: ir.Model) -> list[object]:
        engine = build(prune(model)[0], tuning_effort=0)
        return [(x.name, x.op, x.tactic, x.shape, x.work) for x in engine.plan.layers]

    model = option_a()
    shaped = model.clone()
    shaped.graph.inputs[0].shape = ir.Shape((1, *np.shape(samples())[1:]))
    made_up = placeholder_quantize(shaped)
    assert built(made_up) == built(quantize(shaped, {"x": samples()}))
