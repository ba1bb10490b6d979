"""Products that quantize their input at run time: the functions mean what core/dynamic.py says."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.compiler.test_ops import ATTRIBUTES, activated
from twofour.compiler import ops
from twofour.compiler.bases import DYNAMIC
from twofour.core.dynamic import quantize_rows, quantize_tensor
from twofour.core.numerics import integer_matmul

DEFINED = {"RowGemm": quantize_rows, "TensorGemm": quantize_tensor}
ROWS, K, N = (2, 3), 40, 6
EPS = float(np.finfo(np.float32).eps)


def inputs(variant):
    """Rows of different sizes, one of zeros."""
    random = np.random.default_rng(3)
    x = random.normal(0.5, 1, (*ROWS, K)) * np.exp(random.normal(0, 2, (*ROWS, 1)))
    x[0, 1] = 0
    arrays = {
        "x": x.astype(np.float32),
        "w": random.integers(-127, 128, (N, K)).astype(np.int8),
        "w_scale": random.uniform(0.01, 0.02, N).astype(np.float32),
        "bias": random.normal(size=N).astype(np.float32),
    }
    res = random.normal(size=(*ROWS, N)).astype(np.float32)
    return arrays | ({"res": res} if variant.add else {})


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("variant", [v for v in ops.variants() if v.base in DYNAMIC], ids=str)
def test_the_function_means_what_numpy_says(variant, opset):
    arrays = inputs(variant)
    values = {n: ir.val(n, ir.DataType.from_numpy(a.dtype), a.shape) for n, a in arrays.items()}
    node = ops.make_node(variant, values, ATTRIBUTES, ir.node("MatMul", [], name="layer1"))
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape((*ROWS, N))
    graph = ir.Graph(
        list(values.values()), node.outputs, nodes=[node], opset_imports={"": opset}, name="g"
    )
    model = ir.Model(graph, ir_version=10)
    ops.attach_functions(model)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (got,) = ort.InferenceSession(proto.SerializeToString(), options).run(None, arrays)
    q = DEFINED[variant.base](arrays["x"])
    zero = int(q.zero_point.flat[0])
    sums = integer_matmul(q.bytes.reshape(-1, K), arrays["w"], zero).reshape(*ROWS, N)
    value = sums * q.scale.astype(np.float64) * arrays["w_scale"] + arrays["bias"]
    # Three roundings of the product and the sums before an activation, whose slope is below 1.2.
    bound = 4 * EPS * (np.abs(value) + np.abs(arrays["bias"]) + 4)
    want = activated(variant.activation, value + arrays.get("res", 0))
    assert (np.abs(got - want) <= 1.2 * bound).all()
