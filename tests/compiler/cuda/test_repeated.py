"""Layers that are alike but for their weights: chosen once, each with weights of its own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tests.compiler.cuda.test_interpreted import model_of
from twofour.compiler.build import build
from twofour.core.cuda_program import CudaProgram

LAYERS = 3
BLOCKS = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[4, 16] x0) => (float[4, 16] x3)
<float[16, 16] w1, float[16, 16] w2, float[16, 16] w3, float[16] g1, float[16] g2, float[16] g3,
 float[16] b1, float[16] b2, float[16] b3>
{
  n1 = LayerNormalization <axis = -1> (x0, g1, b1)
  x1 = MatMul (n1, w1)
  n2 = LayerNormalization <axis = -1> (x1, g2, b2)
  x2 = MatMul (n2, w2)
  n3 = LayerNormalization <axis = -1> (x2, g3, b3)
  x3 = MatMul (n3, w3)
}
"""


def test_each_has_its_own_constants_and_all_one_kernel() -> None:
    model = model_of(BLOCKS)
    engine = build(model, target="cuda:sm90", tuning_effort=0)
    program = CudaProgram.from_bytes(engine.subgraphs[engine.plan.steps[0].symbol].tobytes())
    held: dict[str, list[bytes]] = {}
    for launch in program.launches:
        op = engine.plan.layers[launch.layer].op
        places = [place for place in launch.places if place.block == "weights"]
        content = [engine.weights[p.offset : p.offset + p.size_bytes].tobytes() for p in places]
        held.setdefault(op, []).append(b"".join(content))
    assert sum(len(found) for found in held.values()) == 2 * LAYERS
    for found in held.values():
        assert len(set(found)) == len(found), "two layers read the same constants"
    whole = engine.weights.tobytes()
    for name in ("g1", "g2", "g3", "b1", "b2", "b3"):
        value = model.graph.initializers[name].const_value
        assert value is not None
        assert value.numpy().astype(np.float32).tobytes() in whole, name
    assert len(engine.plan.code) <= 2


def test_a_weight_that_has_no_pattern_beside_one_that_has() -> None:
    model = model_of(BLOCKS)
    weight = model.graph.initializers["w2"].const_value
    assert weight is not None
    array = weight.numpy().copy()
    array[1::4] = array[2::4] = 0  # along the channels of a MatMul's weight
    model.graph.initializers["w2"].const_value = ir.tensor(array, name="w2")
    engine = build(model, target="cuda:sm90", tuning_effort=0)
    reasons = [layer.notes[0] for layer in engine.plan.layers if layer.op.startswith("Gemm")]
    assert [reason.startswith("the weight is not 2:4") for reason in reasons] == [True, False, True]
