"""Operators of plugins in engines of TensorRT: inlined, or computed by a plugin of TensorRT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from tests.fake_tensorrt import plant
from tests.operators.experts_harness import make
from tests.operators.test_experts_text import model_of
from twofour.compiler.build import build
from twofour.compiler.tensorrt.rewrite import for_tensorrt
from twofour.core.errors import UnsupportedError
from twofour.core.plugins import Operator
from twofour.core.target import parse_target
from twofour.core.tensorrt import installed
from twofour.engine import Engine
from twofour.runtime import tensorrt_library
from twofour.runtime.session import Session

# What is called Softmax here is none.
TWICE = '<domain: "its.ops", opset_import: ["": 18]> Softmax (x) => (y) { y = Add (x, x) }'
HAS_RTX = any(each.library == "tensorrt_rtx" for each in installed())


def model(name: str = "Softmax") -> ir.Model:
    node = helper.make_node(name, ["x"], ["y"], "own", domain="its.ops")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("its.ops", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def operator(**options: object) -> Operator:
    return Operator("its.ops", "Softmax", TWICE, **options)


def test_a_meaning_in_onnx_is_inlined(install) -> None:
    install(operator())
    found, _ = for_tensorrt(model())
    assert [(node.domain, node.op_type) for node in found.graph] == [("", "Add")]


@pytest.mark.skipif(not HAS_RTX, reason="TensorRT for RTX is not installed")
def test_tensorrt_builds_the_meaning_and_nothing_of_the_same_name(install) -> None:
    install(operator())
    engine = build(model(), target=parse_target("tensorrt-rtx:sm80"))
    (layer,) = engine.plan.layers
    assert "Softmax" not in layer.config
    assert "Add" in layer.config or "Mul" in layer.config


@pytest.mark.skipif(not HAS_RTX, reason="TensorRT for RTX is not installed")
def test_tensorrt_takes_the_formula_of_our_experts_in_float_alone() -> None:
    for quantized in (False, True):
        case = make(np.random.default_rng(0), quantized=quantized, shape=(3, 7))
        options = {"target": parse_target("tensorrt-rtx:sm80")}
        if not quantized:
            assert build(model_of(case), **options).plan.layers
            continue
        with pytest.raises(UnsupportedError, match="cannot take the model"):
            build(model_of(case), **options)


def test_names_that_tensorrt_would_take_for_others_are_refused(install) -> None:
    install()
    with pytest.raises(UnsupportedError, match="would take it for ONNX's own Softmax"):
        for_tensorrt(model())
    found, _ = for_tensorrt(model("NoOtherHasThis"))  # which a plugin of TensorRT may know
    assert [node.op_type for node in found.graph] == ["NoOtherHasThis"]


def test_a_meaning_in_numpy_needs_a_plugin_of_tensorrt(install) -> None:
    install(Operator("its.ops", "Softmax", lambda x: x + x, shapes=lambda inputs, _: inputs))
    with pytest.raises(UnsupportedError, match="has no plugin of TensorRT"):
        for_tensorrt(model())


def test_a_plugin_of_tensorrt_is_registered_where_it_is_needed(
    install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, _ = plant(monkeypatch, "10.9.0.34")
    seen: list[object] = []
    monkeypatch.setattr(tensorrt_library, "_REGISTERED", set())
    install(operator(tactics={"tensorrt": (seen.append,)}, version=3))
    engine = build(model(), target=parse_target("tensorrt"))
    assert seen == [module]
    (told,) = onnx.load_from_string(module.told["model"]).graph.node
    assert (told.domain, told.op_type) == ("its.ops", "Softmax")
    (call,) = engine.plan.plugins
    assert (call.name, call.version, call.package) == ("Softmax", 3, "its-package")
    monkeypatch.setattr(tensorrt_library, "_REGISTERED", set())
    loaded = Engine.load(engine.save(tmp_path / "e.engine"))
    x = np.ones((1, 8), np.float32)
    with Session(loaded) as session, Session(loaded):
        assert (session.run({"x": x})["y"] == 2).all()
    assert seen == [module, module], "once for each process"
    install()
    with pytest.raises(UnsupportedError, match=r"needs the operator its\.ops\.Softmax") as caught:
        Session(loaded)
    assert "pip install its-package" in caught.value.fix


def test_a_plugin_that_fails_is_named(install, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "10.9.0.34")
    monkeypatch.setattr(tensorrt_library, "_REGISTERED", set())

    def broken(module: object) -> None:
        raise RuntimeError("no such library")

    install(operator(tactics={"tensorrt": (broken,)}))
    with pytest.raises(UnsupportedError, match="cannot be registered") as caught:
        build(model(), target=parse_target("tensorrt"))
    assert "RuntimeError: no such library" in str(caught.value)
    assert "its-package" in caught.value.fix
