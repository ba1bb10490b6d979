"""What each version of TensorRT is told, by a builder that keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.fake_tensorrt import GPU, plant
from tests.sample_models import conv_model
from twofour.compiler.build import build
from twofour.compiler.tensorrt.rules import rules_of
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.target import parse_target
from twofour.core.tensorrt import TensorRT
from twofour.engine import Engine
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize_with_report
from twofour.onnx_tools.tensorrt_table import read_table, scales_of
from twofour.runtime.session import Session

WEAK = ("8.6.1", "9.3.0.1", "10.9.0.34")
ALL = (*WEAK, "11.0.0.1")
DATA = {"x": np.random.default_rng(0).normal(size=(4, 4, 8, 8)).astype(np.float32)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conv_model(tmp_path_factory.mktemp("model") / "model.onnx")


def made(model: object, word: str = "tensorrt", **options: object) -> Engine:
    return build(model, target=parse_target(word), **options)


@pytest.mark.parametrize(
    ("version", "network"),
    [
        ("8.6.1", {"EXPLICIT_BATCH"}),
        ("9.3.0.1", {"EXPLICIT_BATCH"}),
        ("10.9.0.34", set()),
        ("11.0.0.1", {"STRONGLY_TYPED"}),
    ],
)
def test_kind_of_network(
    version: str, network: set[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = plant(monkeypatch, version)
    engine = made(model)
    assert module.told["network"] == network
    assert module.told["flags"] == ["SPARSE_WEIGHTS"]
    assert module.told["level"] == 3
    assert module.told["profiles"] == []
    gpu = engine.plan.target.tensorrt
    assert gpu == TensorRT("sm89", "tensorrt", version)
    assert engine.plan.target.model == GPU[0]
    assert engine.code["tensorrt"].tobytes() == b"engine"


@pytest.mark.parametrize("version", WEAK)
def test_implicit_quantization_is_by_our_own_scales(
    version: str, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, _ = plant(monkeypatch, version)
    engine = made(model, int8=True, data=DATA)
    assert module.told["flags"] == ["SPARSE_WEIGHTS", "INT8"]
    told = onnx.load_from_string(module.told["model"])
    kinds = {node.op_type for node in told.graph.node}
    assert "QuantizeLinear" not in kinds
    assert "Conv" in kinds
    head, _, _ = module.told["table"].partition(b"\n")
    number = {"8.6.1": 8601, "9.3.0.1": 9300, "10.9.0.34": 100900}[version]
    assert head == f"TRT-{number}-EntropyCalibration2".encode()
    assert module.told["batch"] is None, "it asks for no data"
    (tmp_path / "table").write_bytes(module.told["table"])
    symmetric = QuantizeOptions(activation="int8")
    expected = scales_of(quantize_with_report(load_model(model), DATA, symmetric).model)
    assert read_table(tmp_path / "table") == expected
    names = {name for node in told.graph.node for name in (*node.input, *node.output)}
    assert set(expected) <= names, "TensorRT finds each by its name"
    assert engine.plan.layers == ()


@pytest.mark.parametrize("version", WEAK)
def test_a_table_of_the_user_goes_to_tensorrt_as_it_is(
    version: str, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, _ = plant(monkeypatch, version)
    made(model, int8=True, data=DATA)
    table = tmp_path / "calibration.cache"
    table.write_bytes(module.told["table"])
    made(model, int8=True, calibration_cache=table)
    assert module.told["table"] == table.read_bytes()


def test_from_11_on_quantization_is_explicit_and_symmetric(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = plant(monkeypatch, "11.0.0.1")
    made(model, int8=True, data=DATA)
    assert module.told["flags"] == ["SPARSE_WEIGHTS"]
    assert "table" not in module.told
    told = onnx.load_from_string(module.told["model"])
    points = {
        tensor.name: tensor.data_type
        for tensor in told.graph.initializer
        if tensor.name.endswith("zero_point")
    }
    assert points
    assert set(points.values()) == {onnx.TensorProto.INT8}


@pytest.mark.parametrize("version", WEAK)
def test_a_quantized_model_needs_the_flag_and_no_table(
    version: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = plant(monkeypatch, version)
    symmetric = QuantizeOptions(activation="int8")
    made(quantize_with_report(load_model(model), DATA, symmetric).model)
    assert module.told["flags"] == ["SPARSE_WEIGHTS", "INT8"]
    assert "table" not in module.told


@pytest.mark.parametrize(
    ("version", "option", "flags"),
    [
        ("8.6.1", "fp16", ["FP16"]),
        ("9.3.0.1", "fp16", ["FP16"]),
        ("10.9.0.34", "fp16", ["FP16"]),
        ("9.3.0.1", "bf16", ["BF16"]),
        ("10.9.0.34", "bf16", ["BF16"]),
        ("11.0.0.1", "fp16", []),
        ("11.0.0.1", "bf16", []),
    ],
)
def test_16_bits_are_a_flag_or_a_cast(
    version: str, option: str, flags: list[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = plant(monkeypatch, version)
    made(model, **{option: True})
    assert module.told["flags"] == ["SPARSE_WEIGHTS", *flags]
    told = onnx.load_from_string(module.told["model"])
    assert ("Cast" in {node.op_type for node in told.graph.node}) == (not flags)
    assert {value.type.tensor_type.elem_type for value in told.graph.output} == {1}


def test_8_6_has_no_bfloat16(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "8.6.1")
    with pytest.raises(UnsupportedError, match=r"TensorRT 8.6.1 has no bfloat16"):
        made(model, bf16=True)


def test_older_versions_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match=r"8.5.3 is too old"):
        rules_of("tensorrt", "8.5.3")
    assert rules_of("tensorrt_rtx", "1.0").strongly_typed
    assert rules_of("tensorrt", "12.1").strongly_typed


@pytest.mark.parametrize("version", ALL)
def test_sparsity_follows_the_option(
    version: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = plant(monkeypatch, version)
    made(model, sparsity="disable")
    assert module.told["flags"] == []
    made(model, sparsity="force")
    assert module.told["flags"] == ["SPARSE_WEIGHTS"]
    told = onnx.load_from_string(module.told["model"])
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in told.graph.initializer}
    groups = weights["w"].transpose(0, 2, 3, 1).reshape(-1, 4)
    assert (np.count_nonzero(groups, axis=1) <= 2).all()


@pytest.mark.parametrize("version", ALL)
def test_shapes_workspace_and_effort(
    version: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = plant(monkeypatch, version)
    profiles = [
        {"x": ((1, 4, 8, 8), (2, 4, 8, 8), (4, 4, 8, 8))},
        {"x": ((5, 4, 8, 8), (8, 4, 8, 8), (9, 4, 8, 8))},
    ]
    engine = made(model, profiles=profiles, workspace_bytes=1 << 20, tuning_effort=0)
    assert module.told["profiles"] == [{"x": each["x"]} for each in profiles]
    assert module.told["workspace"] == ("WORKSPACE", 1 << 20)
    assert module.told["level"] == 0
    assert [p.symbols[0].most for p in engine.plan.profiles] == [4, 9]
    assert [str(info.shape) for info in engine.plan.outputs] == ["(4, 10)"]
    assert engine.plan.outputs[0].shape_at((3,)) == (3, 10)
    (told,) = onnx.load_from_string(module.told["model"]).graph.input
    assert [dim.dim_value for dim in told.type.tensor_type.shape.dim] == [0, 4, 8, 8]


def test_the_target_may_be_a_word(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "10.9.0.34")
    assert str(build(model, target="tensorrt:sm89").plan.target) == "tensorrt:sm89"
    with pytest.raises(InputError, match="unknown target 'gpu'"):
        build(model, target="gpu")


def test_one_shape_is_part_of_the_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = plant(monkeypatch, "10.9.0.34")
    engine = made(model, shapes={"x": (3, 4, 8, 8)})
    assert module.told["profiles"] == []
    assert engine.plan.outputs[0].shape == (3, 10)
    assert "open sizes became 1, as none were given: x[0]" in made(model).plan.notes


def test_the_timing_cache_is_one_for_each_version_and_gpu(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = tmp_path / "times"
    for version, written in (("8.6.1", b"!"), ("8.6.1", b"!!"), ("10.9.0.34", b"!")):
        plant(monkeypatch, version)
        made(model, timing_cache=cache)
        assert Path(f"{cache}.tensorrt-{version}-sm89").read_bytes() == written
    module, _ = plant(monkeypatch, "10.9.0.34")
    module.refuses_cache = True
    notes = made(model, timing_cache=cache).plan.notes
    assert "TensorRT refused the timing cache, which was begun anew" in notes
    assert Path(f"{cache}.tensorrt-10.9.0.34-sm89").read_bytes() == b"!"


def test_it_builds_on_the_gpu_that_the_engine_is_for(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = plant(monkeypatch, "10.9.0.34")
    assert made(model, "tensorrt:sm89").plan.target.tensorrt.gpu == "sm89"
    with pytest.raises(UnsupportedError, match="cannot build for sm80 here") as caught:
        made(model, "tensorrt:sm80")
    assert "--target tensorrt:ampere+" in caught.value.fix
    assert made(model, "tensorrt:ampere+").plan.target.tensorrt.gpu == "ampere+"
    assert module.told["compatible"].name == "AMPERE_PLUS"
    plant(monkeypatch, "10.9.0.34", gpu=None)
    with pytest.raises(UnsupportedError, match=r"TensorRT 10.9.0.34 cannot build here") as caught:
        made(model)
    assert "tensorrt-rtx" in caught.value.fix


def test_the_inspector_tells_which_kernels_are_sparse(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = plant(monkeypatch, "10.9.0.34")
    layer = {
        "Name": "conv + relu",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Dimensions": [1, 4, 8, 8], "Format/Datatype": "Half"}],
        "Outputs": [{"Name": "r", "Dimensions": [1, 8, 8, 8], "Format/Datatype": "Half"}],
        "TacticName": "sm80_xmma_fprop_sparse_conv_f16f16_f16f32_f32_sptensor16x8x32",
        "Metadata": "[ONNX Layer: conv][ONNX Layer: relu]",
    }
    dense = layer | {"Name": "linear", "LayerType": "gemm", "TacticName": "sm80_xmma_gemm_f16f16"}
    dense |= {"Metadata": "[ONNX Layer: linear]", "Outputs": []}
    module.report = json.dumps({"Layers": [layer, dense]})
    sparse, _ = prune(load_model(model))
    engine = made(sparse, fp16=True)
    first, second = engine.plan.layers
    assert (first.name, first.tactic, first.pattern) == ("conv", "2:4 tensorrt", "2:4")
    assert first.source == ("conv", "relu")
    assert first.macs == 8 * 8 * 8 * 4 * 9
    assert (second.tactic, second.precision, second.macs) == ("tensorrt", "float16", 0)
    assert "1 of 2 layers with 2:4 weights run on dense kernels" in engine.plan.notes


def test_the_builders_own_list_tells_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = plant(monkeypatch, "8.6.1")
    module.report = json.dumps({"Layers": [{"Name": "conv", "LayerType": "CaskConvolution",
                                            "Metadata": "[ONNX Layer: conv]"}]})  # fmt: skip
    module.lines = [
        "(Sparsity) Layers eligible for sparse math: conv",
        "(Sparsity) TRT inference plan picked sparse implementation for layers: conv",
    ]
    sparse, _ = prune(load_model(model))
    assert made(sparse, fp16=True).plan.layers[0].tactic == "2:4 tensorrt"


def test_progress_only_grows_and_a_break_stops_the_build(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, "10.9.0.34")
    seen: list[tuple[int, int | None, str]] = []
    made(model, progress=lambda *told: seen.append(told))
    parts = [done for done, _, _ in seen]
    assert parts == sorted(parts)
    assert parts[-1] == 999
    assert {total for _, total, _ in seen} == {1000}
    assert {what for _, _, what in seen} == {"Timing", "Building"}

    def stop(done: int, total: int | None, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(model, progress=stop)


def test_what_was_built_runs_by_the_same_session(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, cuda = plant(monkeypatch, "10.9.0.34")
    engine = made(model, shapes={"x": (1, 4, 8, 8)})
    session = Session(engine)
    assert [info.name for info in session.inputs] == ["x"]
    session.close()
    session.close()
    assert not cuda.streams
    assert module.told["flags"]
