"""What TensorRT says of its layers, read: its builder's text, its inspector's JSON, its log."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.graphs import graph
from twofour.compiler.tensorrt import plan_layers as plans
from twofour.compiler.tensorrt.layers import Sparsity, dtype_of, read_layers, read_sparsity
from twofour.compiler.tensorrt.plan_layers import plan_layers
from twofour.core.plan import CHOSEN_LATER

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "tensorrt"
SPARSE_KERNEL = (
    "sm80_xmma_sparse_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x128_stage4_warpsize2x2x1_"
    "sptensor16x8x64"
)
DENSE_KERNEL = "sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x64_stage4_warpsize2x2x1"
# In the form of versions before the types of tensors had a field of their own.
OLD = (
    "Name: conv + relu, LayerType: CaskConvolution, Inputs: [ { Name: a, b, Location: Device, "
    "Dimensions: [-1,4,8,8], Format/Datatype: Channel major FP16 format where channel % 8 == 0 }], "
    "Outputs: [ { Name: r, Location: Device, Dimensions: [-1,8,8,8], Format/Datatype: Half }], "
    'ParameterType: Convolution, Kernel: [3,3], Weights: {"Type": "Half", "Count": 288}, '
    f"HasSparseWeights: 1, TacticName: {DENSE_KERNEL}, StreamId: 0, "
    "Metadata: [ONNX Layer: conv][ONNX Layer: a[0]]"
)


def test_the_text_of_a_real_build(golden) -> None:
    """As TensorRT for RTX 1.7 wrote it, of a quantized MatMul for SM80."""
    text = (GOLDEN / "rtx_int8_matmul.txt").read_text()
    found = read_layers(text)
    lines = [
        f"{each.kind} {each.name}\n  {each.precision} {each.inputs[0].shape} -> "
        f"{each.outputs[0].shape}, {len(each.constants)} constants\n"
        f"  of {', '.join(each.sources)}\n  {each.tactic}{' (open)' if each.is_open else ''}"
        for each in found
    ]
    golden("tensorrt/rtx_int8_matmul_layers", "\n".join(lines) + "\n")


def test_text_of_older_versions() -> None:
    (found,) = read_layers(f"Layers:\n{OLD}\n\nBindings:\nx\n")
    assert (found.name, found.kind) == ("conv + relu", "CaskConvolution")
    assert [(p.name, p.shape, p.dtype) for p in found.inputs] == [
        ("a, b", (-1, 4, 8, 8), "float16")
    ]
    assert found.outputs[0].shape == (-1, 8, 8, 8)
    assert found.sources == ("conv", "a[0]")
    assert found.is_product
    assert not found.is_sparse
    assert not found.is_open


def test_json_of_the_inspector() -> None:
    layer = {
        "Name": "mm",
        "LayerType": "gemm",
        "Inputs": [{"Name": "x", "Dimensions": [2, 4], "Datatype": "Int8"}],
        "Outputs": [
            {"Name": "y", "Dimensions": [2, 8], "Format/Datatype": "Row major linear FP32"}
        ],
        "TacticName": SPARSE_KERNEL,
        "Metadata": "[ONNX Layer: mm]\x1f[ONNX Layer: q]",
    }
    first, second = read_layers(json.dumps({"Layers": [layer, "only a name"], "Bindings": []}))
    assert first.is_sparse
    assert first.sources == ("mm", "q")
    assert (first.inputs[0].dtype, first.outputs[0].dtype) == ("int8", "float32")
    assert (second.name, second.kind, second.inputs) == ("only a name", "", ())


@pytest.mark.parametrize("text", ["", "nothing of the kind", "{", "[]", '{"Layers": 3}', "{}"])
def test_what_is_no_report_has_no_layers(text: str) -> None:
    assert read_layers(text) == ()


def test_the_builders_lists() -> None:
    old = [
        "(Sparsity) Layers eligible for sparse math: conv1, conv2 + relu",
        "something else",
        "(Sparsity) TRT inference plan picked sparse implementation for layers: conv2 + relu",
    ]
    expected = Sparsity(frozenset({"conv1", "conv2 + relu"}), frozenset({"conv2 + relu"}))
    assert read_sparsity(old) == expected
    new = [
        "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: conv1, conv2 + relu",
        "(Sparsity) Chose 1 layer(s) using sparse tactics: conv2 + relu",
    ]
    assert read_sparsity(new) == expected
    none = ["(Sparsity) Layers eligible for sparse math:", "(Sparsity) x"]
    assert read_sparsity(none) == Sparsity(frozenset(), None)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Half", "float16"),
        ("BF16", "bfloat16"),
        ("BFloat16", "bfloat16"),
        ("Float", "float32"),
        ("Row major linear FP32", "float32"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("N/A due to dynamic shapes", ""),
    ],
)
def test_types_in_its_words(text: str, name: str) -> None:
    assert dtype_of(text) == name


def one(tactic: str, kind: str, sparsity: Sparsity, allowed: bool = True, quantized: bool = True):
    """The layer of a MatMul with a 2:4 weight, as a report with this kernel and type has it.

    And what is warned of.
    """
    q = "f = DequantizeLinear (q, s, z) q = QuantizeLinear (x, s, z)".split(" q = ")
    body = f"q = {q[1]} {q[0]} y = MatMul (f, w)" if quantized else "y = MatMul (x, w)"
    weight = "w = DequantizeLinear (k, s, z)" if quantized else "w = Identity (k)"
    k = [[1], [0], [0], [2]]
    array = np.tile(np.array(k, np.int8 if quantized else np.float32), (2, 8))
    model = graph(
        "(float[2,8] x) => (float[2,8] y) <float s = {0.05}, int8 z = {0}> "
        f"{{ {weight} {body} }}",
        k=array,
    )
    layer = {
        "Name": "mm [plus]",
        "LayerType": "gemm",
        "Inputs": [{"Name": "x", "Dimensions": [2, 8], "Datatype": kind}],
        "Outputs": [{"Name": "y", "Dimensions": [2, 8], "Datatype": "Float"}],
        "TacticName": tactic,
        "Metadata": "[ONNX Layer: y]",
    }
    (found,) = plan_layers(model, json.dumps({"Layers": [layer]}), sparsity, allowed)
    assert plans.warnings_of(model, ()) == (
        "of 1 of 1 layers with 2:4 weights TensorRT does not say how they run: y",
    )
    return found, plans.warnings_of(model, (found,))


NOTHING = Sparsity()


def test_a_sparse_kernel_is_told_by_its_name_or_by_the_builders_list() -> None:
    for found, warnings in (
        one(SPARSE_KERNEL, "Int8", NOTHING),
        one(DENSE_KERNEL, "Int8", Sparsity(frozenset(), frozenset({"mm [plus]"}))),
    ):
        assert found.tactic == "2:4 tensorrt"
        assert found.notes == ()
        assert (found.pattern, found.precision, found.macs) == ("2:4", "int8", 2 * 8 * 8)
        assert warnings == ()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((DENSE_KERNEL, "Int8", NOTHING), plans.SLOWER),
        ((DENSE_KERNEL, "Half", NOTHING, True, False), plans.SLOWER),
        ((DENSE_KERNEL, "Int8", Sparsity(frozenset({"other"}))), plans.UNSEEN),
        ((DENSE_KERNEL, "Int8", Sparsity(frozenset({"mm [plus]"}))), plans.SLOWER),
        ((DENSE_KERNEL, "Float", NOTHING), plans.LOST_QDQ),
        (("__myelin_CASK_STUB", "Float", NOTHING), plans.LOST_QDQ),
        ((DENSE_KERNEL, "Float", NOTHING, True, False), plans.FLOAT),
        ((DENSE_KERNEL, "Int8", NOTHING, False), plans.DISABLED),
        (("__myelin_CASK_STUB", "Int8", NOTHING, False), plans.DISABLED),
    ],
)
def test_a_dense_kernel_on_a_sparse_weight_has_a_reason(arguments, reason: str) -> None:
    found, warnings = one(*arguments)
    assert found.tactic == "tensorrt"
    assert found.notes == (reason,)
    lost = ", 1 of them because of where Q/DQ stands" if reason is plans.LOST_QDQ else ""
    assert warnings == (f"1 of 1 layers with 2:4 weights run on dense kernels{lost}",)


def test_a_kernel_that_is_chosen_when_loaded_is_neither() -> None:
    found, warnings = one("__myelin_CASK_STUB", "Int8", NOTHING)
    assert found.tactic == CHOSEN_LATER
    assert found.notes == (plans.LATER,)
    assert warnings == ()
