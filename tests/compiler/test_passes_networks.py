"""All passes on residual networks: what is left, in what names, and that nothing changed."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from tests.graphs import run
from tests.networks import FakeQuantized, export, images, with_statistics
from twofour.compiler import ops
from twofour.compiler.importer import import_graph
from twofour.compiler.passes import pipeline
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize

EXPORTERS = ["torchscript", "dynamo"]


def fuse(model):
    """The imported and the fused model."""
    imported = import_graph(model)
    return imported, pipeline.run_passes(imported)


def counts(model):
    return dict(Counter(node.op_type for node in model.graph))


def assert_equal(imported, fused, steps=0.0):
    """Equal results; or within some float roundings, relative to the largest result."""
    for want, got in zip(run(imported), run(fused.model), strict=True):
        assert np.abs(want - got).max() <= steps * 2.0**-23 * np.abs(want).max()


# Sums of K <= 64 products in another order, through 20 layers.
FLOAT_STEPS = 64 * 20


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_resnet20_float(resnet20, exporter):
    imported, fused = fuse(resnet20[exporter])
    assert counts(fused.model) == {
        "ConvRelu": 10,
        "ConvAddRelu": 9,
        "SlicePad": 2,
        "ReduceMean": 1,
        "Gemm": 1,
    }
    assert_equal(imported, fused, FLOAT_STEPS)


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("activation", ["int8", "uint8"])
def test_resnet20_quantized(resnet20, exporter, activation):
    options = QuantizeOptions(method="minmax", activation=activation)
    imported, fused = fuse(quantize(resnet20[exporter], images(), options))
    assert counts(fused.model) == {
        "QuantizeLinear": 1,
        "QConvRelu": 10,
        "QConvAddRelu": 9,
        "SlicePad": 2,
        "QGlobalAveragePool": 1,
        "QGemmF": 1,
    }
    assert not fused.refusals
    # Every rounding to integers is where it was; only the last layer's float sums differ.
    assert_equal(imported, fused, 64)
    for node in fused.model.graph:
        if ops.is_fused(node):
            op = ops.parse_op(node)
            assert all(v.shape.is_static() for v in [*op.inputs.values(), op.output])
            assert all(v.is_initializer() for k, v in op.inputs.items() if k not in ("x", "res"))


def test_resnet20_with_both_operands_of_add_quantized(resnet20):
    options = QuantizeOptions(method="minmax", add_inputs="both")
    imported, fused = fuse(quantize(resnet20["dynamo"], images(), options))
    assert counts(fused.model) == {
        "QuantizeLinear": 1,
        "QConvRelu": 10,
        "QConv": 9,
        "QAddRelu": 9,
        "SlicePad": 2,
        "QGlobalAveragePool": 1,
        "QGemmF": 1,
    }
    assert_equal(imported, fused, 64)


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("activations", ["QInt8", "QUInt8"])
def test_resnet20_of_onnxruntime(resnet20, quantize_onnxruntime, exporter, activations):
    imported, fused = fuse(quantize_onnxruntime(resnet20[exporter], activations))
    assert counts(fused.model) == {
        "QuantizeLinear": 1,
        "QConv": 19,
        "SlicePad": 2,
        "QAdd": 9,
        "QGlobalAveragePool": 1,
        "QGemm": 1,
        "DequantizeLinear": 1,
    }
    assert_equal(imported, fused)


def test_resnet20_names(resnet20):
    _, fused = fuse(resnet20["dynamo"])
    names = [node.name for node in fused.model.graph if node.op_type.startswith("Conv")]
    assert names[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert names[-1] == "layer3.2.conv2"
    _, fused = fuse(resnet20["torchscript"])
    names = [node.name for node in fused.model.graph if node.op_type.startswith("Conv")]
    assert names[:2] == ["/conv1/Conv", "/layer1/layer1.0/conv1/Conv"]


@pytest.mark.parametrize("exporter", ["torchscript", "unfolded"])
def test_resnet18_float(resnet18, exporter):
    imported, fused = fuse(resnet18[exporter])
    assert counts(fused.model) == {
        "ConvRelu": 4,
        "MaxPool": 1,
        "ConvAddRelu": 3,
        "Conv": 2,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
    }
    # Folded normalizations round each weight once more.
    assert_equal(imported, fused, FLOAT_STEPS * 4)


def test_resnet18_quantized(resnet18):
    options = QuantizeOptions(method="minmax")
    imported, fused = fuse(quantize(resnet18["torchscript"], images(), options))
    assert counts(fused.model) == {
        "QuantizeLinear": 1,
        "QConvRelu": 4,
        "QMaxPool": 1,
        "QConv": 2,
        "QConvAddRelu": 3,
        "QGlobalAveragePool": 1,
        "QGemmF": 1,
    }
    assert_equal(imported, fused, 64)


def test_resnet18_of_onnxruntime(resnet18, quantize_onnxruntime):
    imported, fused = fuse(quantize_onnxruntime(resnet18["torchscript"], "QInt8"))
    assert counts(fused.model) == {
        "QuantizeLinear": 1,
        "QConv": 9,
        "QMaxPool": 1,
        "QAdd": 3,
        "QGlobalAveragePool": 1,
        "QGemm": 1,
        "DequantizeLinear": 1,
    }
    assert_equal(imported, fused)


def test_asymmetric_weights_stay_float_and_say_so(resnet18, quantize_onnxruntime):
    quantized = quantize_onnxruntime(resnet18["torchscript"], "QUInt8", "QUInt8", False)
    imported, fused = fuse(quantized)
    products = [node for node in fused.model.graph if node.op_type in ("Conv", "Gemm")]
    reasons = {r.node: r.reason for r in fused.refusals if r.rule == "fuse_integer"}
    assert products
    assert set(reasons) == {node.name for node in products}
    assert all("expected int8 with zero point 0" in reason for reason in reasons.values())
    assert_equal(imported, fused)


def fake_quantized(model, convs):
    """Q and DQ of the float weights, as quantization-aware training writes them."""
    graph = model.graph
    for node in convs:
        w = node.inputs[1]
        array = w.const_value.numpy()
        scale = (np.abs(array).max((1, 2, 3)) / 127).astype(np.float32)
        constants = []
        for suffix, contents in (("scale", scale), ("zero", np.zeros(scale.shape, np.int8))):
            value = ir.val(f"{w.name}_{suffix}", const_value=ir.tensor(contents))
            graph.register_initializer(value)
            constants.append(value)
        q = ir.node("QuantizeLinear", [w, *constants], {"axis": 0}, name=f"{w.name}_q")
        dq = ir.node(
            "DequantizeLinear", [q.outputs[0], *constants], {"axis": 0}, name=f"{w.name}_dq"
        )
        graph.insert_before(node, [q, dq])
        node.replace_input_with(1, dq.outputs[0])


def test_unfolded_normalization_of_fake_quantized_weights(resnet18):
    """Quantization-aware training keeps BatchNormalization behind a Q/DQ weight."""
    model = import_graph(resnet18["unfolded"])
    convs = [node for node in model.graph if node.op_type == "Conv"]
    fake_quantized(model, convs)
    imported, fused = fuse(model)
    assert len(convs) == 9
    assert counts(imported)["BatchNormalization"] == 9
    assert "BatchNormalization" not in counts(fused.model)
    # No activation is quantized: the convolutions stay float, with the rounded weights.
    assert_equal(imported, fused, FLOAT_STEPS * 4)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_quantization_aware_training(exporter):
    # torch.export has no fake_quantize of a dynamic batch.
    network = with_statistics(FakeQuantized())
    model = export(network, dynamo=exporter == "dynamo", dynamic=False)
    imported, fused = fuse(model)
    assert counts(fused.model) == {
        "QuantizeLinear": 1,
        "QConvRelu": 1,
        "QGlobalAveragePool": 1,
        "QGemmF": 1,
    }
    assert not fused.refusals
    # The folded normalization may move a rounded activation by a step, seldom: 1 % of 5 outputs.
    want, got = run(imported)[0], run(fused.model)[0]
    assert np.abs(want - got).max() <= 0.01 * np.abs(want).max()
