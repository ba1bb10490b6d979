"""Real builds by TensorRT for RTX, which needs no GPU for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.graphs import graph
from tests.sample_models import conv_model
from twofour.cli import app
from twofour.compiler.build import build
from twofour.compiler.tensorrt import plan_layers as plans
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.plan import CHOSEN_LATER
from twofour.core.target import parse_target
from twofour.core.tensorrt import TensorRT, installed
from twofour.engine import Engine
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize
from twofour.runtime.cuda.memory import gpu_here
from twofour.runtime.session import Session

HAS_RTX = any(each.library == "tensorrt_rtx" for each in installed())
pytestmark = pytest.mark.skipif(not HAS_RTX, reason="TensorRT for RTX is not installed")
needs_no_gpu = pytest.mark.skipif(
    gpu_here() is not None, reason="a GPU is here, so kernels are chosen at build"
)
DATA = {"x": np.random.default_rng(0).normal(size=(4, 4, 8, 8)).astype(np.float32)}
SYMMETRIC = QuantizeOptions(activation="int8")


def made(model: object, word: str = "tensorrt-rtx:sm80", **options: object) -> Engine:
    return build(model, target=parse_target(word), **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conv_model(tmp_path_factory.mktemp("rtx") / "model.onnx")


@pytest.mark.parametrize("gpu", ["sm80", "sm86", "sm89", "sm120", "ampere+"])
def test_it_builds_for_gpus_that_are_not_here(gpu: str, model: Path, tmp_path: Path) -> None:
    engine = made(model, f"tensorrt-rtx:{gpu}")
    found = engine.plan.target.tensorrt
    assert (found.gpu, found.library) == (gpu, "tensorrt_rtx")
    assert found.version.count(".") >= 2
    assert engine.code["tensorrt"].size > 1000
    loaded = Engine.load(engine.save(tmp_path / "e.engine"))
    assert loaded.plan == engine.plan
    assert (loaded.code["tensorrt"] == engine.code["tensorrt"]).all()


def test_without_a_gpu_named_it_is_for_all_from_ampere_on(model: Path) -> None:
    assert made(model, "tensorrt-rtx").plan.target.tensorrt.gpu == "ampere+"


def test_gpus_it_does_not_know_are_refused(model: Path) -> None:
    with pytest.raises(UnsupportedError, match="does not build for sm90") as caught:
        made(model, "tensorrt-rtx:sm90")
    assert "sm89" in str(caught.value)
    with pytest.raises(InputError, match="unknown GPU 'ada'"):
        parse_target("tensorrt:ada")


@needs_no_gpu
def test_int8_layers_are_told_in_the_models_names(model: Path) -> None:
    sparse, _ = prune(load_model(model))
    engine = made(quantize(sparse, DATA, SYMMETRIC))
    by_name = {layer.name: layer for layer in engine.plan.layers if layer.pattern}
    assert set(by_name) == {"conv", "linear"}
    for layer in by_name.values():
        assert (layer.precision, layer.tactic) == ("int8", CHOSEN_LATER)
        assert layer.notes == (plans.LATER,)
    assert by_name["conv"].macs == 8 * 8 * 8 * 4 * 9
    assert "conv" in by_name["conv"].source
    assert not any("dense kernels" in note for note in engine.plan.notes)


@needs_no_gpu
def test_float32_products_are_dense_and_16_bits_are_not_known(model: Path) -> None:
    sparse, _ = prune(load_model(model))
    engine = made(sparse)
    products = [layer for layer in engine.plan.layers if layer.pattern == "2:4"]
    assert products
    assert {layer.notes for layer in products} == {(plans.FLOAT,)}
    count = len(products)
    assert f"{count} of {count} layers with 2:4 weights run on dense kernels" in engine.plan.notes
    for option, kind in (("fp16", "float16"), ("bf16", "bfloat16")):
        halves = [each for each in made(sparse, **{option: True}).plan.layers if each.pattern]
        assert {layer.precision for layer in halves} == {kind}
        assert {each.tactic for each in halves if each.name == "conv"} == {CHOSEN_LATER}
        assert {each.notes for each in halves} <= {(plans.LATER,), (plans.SLOWER,)}
    dense = [
        each for each in made(sparse, fp16=True, sparsity="disable").plan.layers if each.pattern
    ]
    assert {layer.notes for layer in dense} == {(plans.DISABLED,)}


@needs_no_gpu
@pytest.mark.parametrize(
    "before", ["f = Identity (x)", "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z)"
    " f = Softmax (d)"], ids=["none", "not right before"]
)  # fmt: skip
def test_int8_that_is_lost_to_where_qdq_stands_is_said(before: str) -> None:
    weight = np.tile(np.array([[1], [0], [0], [2]], np.int8), (16, 64))
    source = graph(
        "(float[64,64] x) => (float[64,64] y) <float s = {0.05}, int8 z = {0}>"
        f"{{ {before} w = DequantizeLinear <axis = 1> (k, ks, kz) y = MatMul (f, w) }}",
        k=weight,
        ks=np.linspace(0.01, 0.02, 64).astype(np.float32),
        kz=np.zeros(64, np.int8),
    )
    engine = made(source)
    (product,) = [layer for layer in engine.plan.layers if layer.pattern]
    assert (product.pattern, product.precision) == ("2:4/pair", "float32")
    assert product.notes == (plans.LOST_QDQ,)
    (warning,) = [note for note in engine.plan.notes if "dense kernels" in note]
    assert warning.endswith(", 1 of them because of where Q/DQ stands")


def test_int8_with_fp16_keeps_its_products_in_int8(model: Path) -> None:
    engine = made(model, int8=True, fp16=True, data=DATA)
    products = [layer for layer in engine.plan.layers if layer.pattern]
    assert {layer.precision for layer in products} == {"int8"}
    outputs = engine.plan.outputs
    assert [(info.name, info.dtype) for info in outputs] == [("y", "float32")]


def test_biases_of_int32_and_uint8_around_its_middle_are_taken() -> None:
    source = graph(
        "(float[2,8] x) => (float[2,16] y) <float s = {0.05}, uint8 z = {128}>"
        "{ q = QuantizeLinear (x, s, z) f = DequantizeLinear (q, s, z)"
        " w = DequantizeLinear <axis = 0> (k, ks) c = DequantizeLinear <axis = 0> (b, bs)"
        " y = Gemm <transB = 1> (f, w, c) }",
        k=np.ones((16, 8), np.int8),
        ks=np.full(16, 0.01, np.float32),
        b=np.arange(16, dtype=np.int32),
        bs=np.full(16, 0.0005, np.float32),
    )
    notes = made(source).plan.notes
    assert "1 biases of int32 became float32" in notes
    assert "1 tensors of uint8 with zero point 128 became int8" in notes


def test_progress_of_a_real_build_only_grows(model: Path) -> None:
    seen: list[tuple[int, int | None, str]] = []
    made(model, progress=lambda *told: seen.append(told))
    parts = [done for done, _, _ in seen]
    assert parts == sorted(parts)
    assert (parts[0] < 100, parts[-1], {total for _, total, _ in seen}) == (True, 999, {1000})
    assert len({what for _, _, what in seen}) > 3


def test_profiles_with_open_shapes(model: Path) -> None:
    shapes = {"x": ((1, 4, 8, 8), (4, 4, 8, 8), (8, 4, 8, 8))}
    engine = made(model, shapes=shapes, workspace_bytes=1 << 26)
    (profile,) = engine.plan.profiles
    assert [(s.least, s.usual, s.most) for s in profile.symbols] == [(1, 4, 8)]
    assert engine.plan.outputs[0].shape_at((3,)) == (3, 10)


def test_sizes_that_are_rounded_up_are_not_made_up(data_folder: Path) -> None:
    """A detector of text halves its image five times and doubles it again."""
    shapes = {"x": ((1, 3, 32, 32), (1, 3, 640, 640), (4, 3, 960, 960))}
    engine = made(data_folder / "onnx" / "ppocrv2_det.onnx", shapes=shapes)
    (output,) = engine.plan.outputs
    assert not output.known
    assert [symbol.most for symbol in engine.plan.profiles[0].symbols] == [4, 960, 960]


def test_an_operator_it_lacks_is_named() -> None:
    source = graph("(float[4,4] x) => (float[4,4] y) { d = Det (x) y = Add (x, d) }")
    with pytest.raises(UnsupportedError, match="cannot take the model") as caught:
        made(source)
    assert "Det" in str(caught.value)


@needs_no_gpu
def test_its_engines_are_refused_without_a_gpu(model: Path) -> None:
    with pytest.raises(UnsupportedError, match="missing: GPU for sm80") as caught:
        Session(made(model))
    assert "tensorrt-rtx-cu13==" in caught.value.fix


def test_the_timing_cache_is_of_no_use_and_it_is_said(model: Path, tmp_path: Path) -> None:
    engine = made(model, timing_cache=tmp_path / "times")
    assert any("the timing cache is of no use" in note for note in engine.plan.notes)
    assert list(tmp_path.iterdir()) == []


def test_a_real_network_on_the_command_line(data_folder: Path, tmp_path: Path) -> None:
    """From the float file to the engine: prune, quantize symmetrically, build, explain."""
    source = data_folder / "onnx" / "mlperftiny_resnet8.onnx"
    images = np.random.default_rng(0).random((8, 3, 32, 32)).astype(np.float32) * 255
    np.savez(tmp_path / "data.npz", input_1=images)
    names = {name: str(tmp_path / name) for name in ("sparse.onnx", "int8.onnx", "u8.onnx", "e")}
    data = ("--data", str(tmp_path / "data.npz"))

    def told(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    told("prune", str(source), "-o", names["sparse.onnx"])
    told("quantize", names["sparse.onnx"], "-o", names["u8.onnx"], *data)
    told("quantize", names["sparse.onnx"], "-o", names["int8.onnx"], *data, "--activation", "int8")
    with pytest.raises(UnsupportedError, match="not quantized as it wants"):
        build(names["u8.onnx"], target=parse_target("tensorrt-rtx:sm80"))
    target = ("--target", "tensorrt-rtx:sm80")
    text = told("build", names["int8.onnx"], "-o", names["e"], *target)
    assert "for tensorrt-rtx:sm80, by TensorRT for RTX" in " ".join(text.split())
    document = json.loads(told("explain", names["e"], "--json"))
    products = [each for each in document["layers"] if each["pattern"]]
    assert len(products) == 10
    assert {each["precision"] for each in products} == {"int8"}
    names_of_model = {node.name for node in load_model(source).graph}
    assert {each["name"] for each in products} <= names_of_model
    shown = told("explain", names["e"])
    assert "built for tensorrt-rtx:sm80 by TensorRT for RTX" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert "TensorRT runs them" in told("inspect", names["e"])


@pytest.mark.parametrize("name", ["openseeface_detection", "ultraface_slim_320", "fastestdet"])
def test_other_real_networks(name: str, data_folder: Path) -> None:
    """With operators of ONNX Runtime, with shapes that onnx does not find, with many branches."""
    engine = made(data_folder / "onnx" / f"{name}.onnx", fp16=True)
    assert all(info.known for info in engine.plan.outputs)
    convolutions = [layer for layer in engine.plan.layers if layer.pattern]
    assert len(convolutions) > 20
    assert {layer.precision for layer in convolutions} == {"float16"}


def test_what_is_of_no_use_together_is_refused(model: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "e.engine")
    both = ("--isa", "vector", "--target", "tensorrt")
    for arguments, message in (
        (("--fp16",), "float16 is for GPUs"),
        (both, "contradict each other"),
        (("--target", "gpu"), "unknown target 'gpu'"),
    ):
        call = ["build", str(model), "-o", output, *arguments]
        result = CliRunner().invoke(app, call)
        assert result.exit_code == 2
        assert message in result.output
    assert not (tmp_path / "e.engine").exists()


def test_a_file_with_external_data_and_metadata_is_taken(model: Path, tmp_path: Path) -> None:
    sparse, _ = prune(load_model(model))
    assert sparse.metadata_props
    save_model(sparse, tmp_path / "sparse.onnx")
    engine = made(tmp_path / "sparse.onnx", fp16=True)
    assert engine.plan.source_name == "sparse.onnx"
    assert engine.plan.target.tensorrt == TensorRT("sm80", *_who(engine))


def _who(engine: Engine) -> tuple[str, str]:
    found = engine.plan.target.tensorrt
    return found.library, found.version
