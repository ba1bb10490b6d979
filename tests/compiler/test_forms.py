"""The forms of a model: what is made of it, what is left out, and what layers are called."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.onnx_tools.networks import option_a
from twofour.compiler.build import BuildOptions
from twofour.compiler.forms import PATTERNS, PRECISIONS, Form, Forms
from twofour.core.errors import InputError
from twofour.core.plan import is_sparse
from twofour.core.target import ISAS, Target, detect_host, host_target, why_no_bf16
from twofour.onnx_tools.placeholder import placeholder_quantize
from twofour.onnx_tools.prune import prune

QUICK = BuildOptions(tuning_effort=0)


def forms(model, shapes=None, precisions=PRECISIONS, target=None) -> Forms:
    return Forms.of(model, shapes or {}, precisions, target or host_target())


def test_dense_comes_first_and_patterns_without_kernels_are_left_out() -> None:
    found = [str(form) for form in forms(option_a(), precisions=("f32", "int8")).list(PATTERNS)]
    assert found == ["float32 dense", "float32 2:4", "INT8 dense", "INT8 2:4", "INT8 2:4/pair"]


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_a_dense_form_has_no_sparse_kernel_and_a_pruned_one_has(precision: str) -> None:
    each = forms(option_a(), precisions=(precision,))

    def sparse(pattern: str) -> list[str]:
        plan = each.build(Form(precision, pattern), QUICK).plan
        assert {layer.precision for layer in plan.layers if layer.pattern} == {
            "int8" if precision == "int8" else "float32"
        }
        return [layer.name for layer in plan.layers if is_sparse(layer.tactic)]

    assert sparse("") == []
    assert sparse("2:4")
    assert each.refusals("2:4/pair") == {}  # not built
    assert all(name not in sparse("2:4") for name in each.refusals("2:4"))


def test_of_a_quantized_model_only_int8_is_left() -> None:
    found = forms(placeholder_quantize(option_a()))
    assert list(found.bases) == ["int8"]
    assert any("quantized already" in note for note in found.notes)
    with pytest.raises(InputError, match="nothing is left to forecast"):
        forms(placeholder_quantize(option_a()), precisions=("f32",))


def test_a_pruned_model_is_said_to_be_one_and_its_dense_form_does_not_use_it() -> None:
    found = forms(prune(option_a())[0], precisions=("f32",))
    assert any("are 2:4 already" in note for note in found.notes)
    plan = found.build(Form("f32"), QUICK).plan
    assert not any(is_sparse(layer.tactic) for layer in plan.layers)
    found.build(Form("f32", "2:4"), QUICK)
    assert not any("already" in reason for reason in found.refusals("2:4").values())


def test_a_precision_that_the_target_lacks_is_left_out_with_the_reason() -> None:
    host = detect_host()
    plain = Target(ISAS[-1], host.arch, host.model)
    assert why_no_bf16(plain)
    found = forms(option_a(), precisions=("f32", "bf16"), target=plain)
    assert list(found.bases) == ["f32"]
    assert found.notes[-1].startswith("no bfloat16: bfloat16 needs AVX-512")


def nameless(dims: list[int | str]) -> onnx.ModelProto:
    """x -> MatMul, its node without a name."""
    w = numpy_helper.from_array(np.ones((16, 32), np.float32), "deep.weight")
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, dims),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "deep.weight"], ["y"])], "g",
                              ends[:1], ends[1:], [w])  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_nodes_without_a_name_are_skipped_by_their_weight() -> None:
    (layer,) = forms(nameless([4, 16]), precisions=("f32",)).layers
    assert (layer.name, layer.skip, layer.pruned) == ("deep", "deep.weight", False)


def test_an_open_batch_becomes_one_and_other_open_sizes_are_asked_for() -> None:
    found = forms(nameless(["n", 16]), precisions=("f32",))
    assert found.notes == ("x[0]: open in the model, forecast for 1",)
    with pytest.raises(InputError, match="--shapes x:NxNx16"):
        forms(nameless(["n", "m", 16]))
    assert forms(nameless(["n", "m", 16]), {"x": (1, 4, 16)}, ("f32",)).notes == ()
