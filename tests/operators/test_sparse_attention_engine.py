"""Sparse attention in files: its function is the definition, and engines compute it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import twofour
from twofour.core.attention import attention
from twofour.core.plugins import find
from twofour.core.sparse_attention import Pattern, blockwise, random_blocks, sparse_attention
from twofour.core.target import host_target, why_no_bf16
from twofour.onnx_tools.load import save_model
from twofour.onnx_tools.plugins import attach_meanings
from twofour.onnx_tools.quantize import quantize
from twofour.operators.sparse_attention import DOMAIN, NAME, reference


@dataclass(frozen=True)
class Shape:
    """Sequences, heads and channels of a head."""

    batch: int = 2
    heads: int = 3
    d: int = 8


PATTERNS = {
    "longformer": Pattern(70, 5, 2),
    "bigbird": Pattern(50, 4, 3, False, 16, random_blocks(50, 16, 1, 4, 3, 0)),
    "causal": Pattern(33, 7, 1, True),
    "blocks": Pattern(40, -1, 0, False, 8, np.array([[0], [-1], [2]], np.int32)),
    "one": Pattern(1, 0),
}


def model(pattern: Pattern, shape: Shape) -> ir.Model:
    """q, k and v are thirds of one input's channels; the mask of keys is another input."""
    width = shape.heads * shape.d
    nodes = [
        helper.make_node("Split", ["qkv"], ["q", "k", "v"], axis=2, num_outputs=3),
        helper.make_node(
            NAME,
            ["q", "k", "v", "keep", "blocks"],
            ["y"],
            "attention",
            domain=DOMAIN,
            heads=shape.heads,
            window=pattern.window,
            global_tokens=pattern.global_tokens,
            causal=int(pattern.causal),
            block=pattern.block,
        ),
    ]
    sizes = [shape.batch, pattern.length]
    inputs = [
        helper.make_tensor_value_info("qkv", TensorProto.FLOAT, [*sizes, 3 * width]),
        helper.make_tensor_value_info("keep", TensorProto.BOOL, sizes),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*sizes, width])]
    table = numpy_helper.from_array(pattern.blocks, "blocks")
    graph = helper.make_graph(nodes, "attention", inputs, outputs, [table])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    made = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    attach_meanings(made)
    return made


def feeds(pattern: Pattern, shape: Shape) -> dict[str, np.ndarray]:
    """Normal values; some keys of the first sequence are hidden, so that some queries see none."""
    random = np.random.default_rng(0)
    size = (shape.batch, pattern.length, 3 * shape.heads * shape.d)
    keep = random.random(size[:2]) < 0.8
    keep[0, : pattern.length // 2] = False
    return {"qkv": random.standard_normal(size, np.float32), "keep": keep}


def expected(pattern: Pattern, shape: Shape) -> np.ndarray:
    given = feeds(pattern, shape)
    tensors = tuple(np.ascontiguousarray(x) for x in np.split(given["qkv"], 3, 2))
    return sparse_attention(tensors, shape.heads, pattern, given["keep"])


@pytest.mark.parametrize("name", PATTERNS)
def test_the_function_is_the_definition(name):
    """Plain ONNX Runtime executes the file."""
    proto = ir.to_proto(model(PATTERNS[name], Shape()))
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, feeds(PATTERNS[name], Shape()))
    np.testing.assert_allclose(y, expected(PATTERNS[name], Shape()), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_reference_is_the_definition(name):
    """In bounded memory, with all attributes as a node gives them."""
    pattern, shape = PATTERNS[name], Shape()
    given = feeds(pattern, shape)
    y = reference(
        *np.split(given["qkv"], 3, 2),
        given["keep"],
        pattern.blocks,
        heads=shape.heads,
        window=pattern.window,
        global_tokens=pattern.global_tokens,
        causal=int(pattern.causal),
        block=pattern.block,
        scale=0.0,
    )
    np.testing.assert_allclose(y, expected(pattern, shape), rtol=0, atol=2e-6)


def test_blockwise_over_many_blocks_is_the_definition():
    """More queries than it takes at a time."""
    random = np.random.default_rng(0)
    pattern = Pattern(700, 30, 5, False, 64, random_blocks(700, 64, 2, 30, 5, 0))
    tensors = tuple(random.standard_normal((1, 700, 16), np.float32) for _ in range(3))
    y = blockwise(tensors, 2, pattern, lambda q, k, v, mask: attention(q, k, v, 0.3, mask))
    np.testing.assert_allclose(
        y, sparse_attention(tensors, 2, pattern, scale=0.3), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("name", PATTERNS)
def test_an_engine_runs_it_as_one_operator(name, tmp_path):
    """Natively, from slices of one tensor, and equal to ONNX Runtime on the same file."""
    path = tmp_path / "model.onnx"
    ir.save(model(PATTERNS[name], Shape()), path)
    engine = twofour.build(path, race=False, tuning_effort=0)
    layers = [layer for layer in engine.plan.layers if layer.op == NAME]
    assert layers[-1].tactic.startswith("lists")
    (y,) = twofour.Session(engine).run(feeds(PATTERNS[name], Shape())).values()
    np.testing.assert_allclose(y, expected(PATTERNS[name], Shape()), rtol=0, atol=1e-5)


@pytest.mark.skipif(bool(why_no_bf16(host_target())), reason="no AVX-512 with BF16 here")
def test_products_in_bfloat16_where_the_user_allows_that(tmp_path):
    """The engine needs a CPU that has it; else it is float32."""
    pattern, shape = PATTERNS["longformer"], Shape()
    path = tmp_path / "model.onnx"
    ir.save(model(pattern, shape), path)
    engine = twofour.build(path, race=False, tuning_effort=0, bf16=True)
    assert engine.plan.target.bf16
    assert {each.tactic for each in engine.plan.layers if each.op == NAME} == {"lists bfloat16"}
    (y,) = twofour.Session(engine).run(feeds(pattern, shape)).values()
    exact = expected(pattern, shape)
    assert 1e-5 < abs(y - exact).max() < 2**-6 * abs(exact).max()


def test_a_table_that_is_computed_runs_by_the_meaning(tmp_path):
    """No kernel takes it, so the function does."""
    made = model(PATTERNS["blocks"], Shape())
    table = made.graph.initializers["blocks"]
    made.graph.initializers.pop("blocks")
    table.const_value = None
    made.graph.inputs.append(table)
    path = tmp_path / "model.onnx"
    ir.save(made, path)
    engine = twofour.build(path, race=False, tuning_effort=0)
    assert not [layer for layer in engine.plan.layers if layer.op == NAME]
    given = {**feeds(PATTERNS["blocks"], Shape()), "blocks": PATTERNS["blocks"].blocks}
    (y,) = twofour.Session(engine).run(given).values()
    np.testing.assert_allclose(y, expected(PATTERNS["blocks"], Shape()), rtol=0, atol=1e-5)


def test_the_operator_is_built_in():
    """Found by its domain and name, with its own shape rule."""
    operator = find(DOMAIN, NAME)
    assert operator is not None
    assert operator.shapes is not None
    q = ((1, 4, 6), "float32")
    assert operator.shapes([q, q, q], {"heads": 2}) == [q]
    with pytest.raises(ValueError, match="divide"):
        operator.shapes([q, q, q], {"heads": 4})
    with pytest.raises(ValueError, match="expected q, k and v"):
        operator.shapes([q, ((1, 5, 6), "float32"), q], {"heads": 2})


@pytest.mark.parametrize("name", ["longformer", "bigbird"])
def test_a_quantized_file_runs_on_int8_kernels(name, tmp_path):
    """Its q, k and v are quantized where they are computed; checked to the last step in the build.

    Exponentials in bytes move a result by a small part of v's range, as in dense attention.
    """
    pattern, shape = PATTERNS[name], Shape(d=16)
    made = model(pattern, shape)
    width = shape.heads * shape.d
    x = next(value for value in made.graph.inputs if value.name == "qkv")
    weight = np.random.default_rng(1).standard_normal((3 * width, 3 * width), np.float32) / 12
    product = ir.node("MatMul", [x, constant(made, "weight", weight)], name="projection")
    product.outputs[0].type, product.outputs[0].shape = x.type, x.shape
    made.graph.insert_before(made.graph[0], product)
    made.graph[1].replace_input_with(0, product.outputs[0])
    given = [feeds(pattern, shape)]
    path = save_model(quantize(made, given), tmp_path / "model.onnx")
    engine = twofour.build(path, race=False, tuning_effort=0)
    assert [layer for layer in engine.plan.layers if layer.op == f"Quantized{NAME}F"]
    (y,) = twofour.Session(engine).run(given[0]).values()
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (exact,) = session.run(None, given[0])
    assert abs(y - exact).max() < 0.02 * abs(exact).max()
    assert (y != 0).any()


def constant(made: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """An initializer."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
    made.graph.register_initializer(value)
    return value
