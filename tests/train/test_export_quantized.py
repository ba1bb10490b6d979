"""A fake-quantized model and its file: the same integers, weights int8, BatchNorm folded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from tests.train.quantized_models import (
    Quantized,
    Residual,
    Tokens,
    run_with_integers,
    stored,
    torch_integers,
)
from twofour.core import patterns
from twofour.core.errors import GateError, InputError
from twofour.core.promises import KEY, from_text
from twofour.core.ranges import Range, RangeOptions
from twofour.train import Sparsifier, export_onnx
from twofour.train.fake_quant import FakeQuant

SHAPES = {Residual: (4, 4, 12, 12), Tokens: (4, 6, 8)}


def make(kind: type[Quantized], activation: str = "int8", learned: bool = False) -> Quantized:
    torch.manual_seed(1)
    model = kind(activation, learned)
    for _ in range(3):
        model(torch.randn(SHAPES[kind]))
    return model.calibrate(torch.randn(SHAPES[kind]), torch.randn(SHAPES[kind]))


def example(kind: type[Quantized]) -> Tensor:
    return torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(2))


def require_same(model: nn.Module, path: Path, x: Tensor) -> None:
    """All integers within 1 of torch's, nearly all equal, and outputs as near as that lets them."""
    expected, integers = torch_integers(model, x)
    found, rounded = run_with_integers(path, x)
    assert len(rounded) == len(integers)
    for (name, ours), theirs in zip(rounded.items(), integers, strict=True):
        assert ours.shape == theirs.shape, name
        assert np.abs(ours - theirs).max() <= 1, name
        assert (ours != theirs).mean() < 0.005, name
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("kind", [Residual, Tokens])
@pytest.mark.parametrize(("form", "activation"), [("int8", "int8"), ("float", "uint8")])
def test_same_integers(kind: type[Quantized], form: str, activation: str, tmp_path: Path) -> None:
    model, path = make(kind, activation), tmp_path / "model.onnx"
    export_onnx(model, example(kind)[:1], path, weights=form)  # type: ignore[arg-type]
    onnx.checker.check_model(path, full_check=True)
    require_same(model, path, example(kind))


def test_learned_scales_are_written_with_their_factors(tmp_path: Path) -> None:
    model, path = make(Residual, learned=True), tmp_path / "model.onnx"
    for quant in model.quantizers.values():
        assert isinstance(quant, FakeQuant)
        assert quant.log_factor is not None
        quant.log_factor.data.uniform_(-0.2, 0.2)
    export_onnx(model, example(Residual)[:1], path)
    require_same(model, path, example(Residual))


def test_file_has_the_form_of_quantize_and_names_of_the_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(make(Residual), example(Residual)[:1], path)
    graph, held = onnx.load(path).graph, stored(path)
    counts = Counter(node.op_type for node in graph.node)
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (6, 6 + 5)
    assert counts["BatchNormalization"] == counts["Transpose"] == 0
    assert {node.domain for node in graph.node} == {""}
    assert [o.domain for o in onnx.load(path).opset_import] == [""]
    layers = ("conv", "conv2", "depthwise", "linear", "head")
    for name in layers:
        assert held[f"{name}.weight_quantized"].dtype == np.int8
        assert f"{name}.weight" not in held
        assert held[f"{name}.bias"].dtype == np.float32
    assert set(layers) <= {node.name for node in graph.node}
    read = {name for node in graph.node for name in node.input}
    assert set(held) <= read, "no constant is left behind"


def test_batchnorm_flips_signs_of_integers_and_goes_into_the_scale(tmp_path: Path) -> None:
    model, path = make(Residual), tmp_path / "model.onnx"
    export_onnx(model, example(Residual)[:1], path)
    held, norm = stored(path), model.bn
    w8 = model.quantizers["conv_weight"].integers(model.conv.weight).numpy()
    g = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach().double().numpy()
    assert (g < 0).any()
    assert (g > 0).any()
    sign = np.sign(g).reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(held["conv.weight_quantized"], w8 * sign)
    scale = model.quantizers["conv_weight"].scale.numpy() * np.abs(g)
    np.testing.assert_allclose(
        held["conv.weight_scale"], np.where(g == 0, 1, scale), rtol=1e-6, atol=0
    )


def test_a_weight_of_several_layers_is_scaled_for_each(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(make(Tokens), example(Tokens)[:1], path)
    held = stored(path)
    kept = sorted(name for name in held if name.endswith("_quantized"))
    assert kept[:2] == ["conv.weight_1_quantized", "conv.weight_quantized"]
    assert len([name for name in kept if held[name].shape == (8, 8)]) == 3 + 1
    assert not [n.op_type for n in onnx.load(path).graph.node if n.op_type == "Split"]


@pytest.mark.parametrize("form", ["int8", "float"])
def test_patterns_are_promised_and_in_the_integers(form: str, tmp_path: Path) -> None:
    model, path = make(Residual), tmp_path / "model.onnx"
    Sparsifier(model).prune()
    checked = export_onnx(model, example(Residual)[:1], path, weights=form)  # type: ignore[arg-type]
    names = ("conv", "conv2", "linear", "head")
    assert checked == dict.fromkeys(names, "2:4")
    suffix = "weight_quantized" if form == "int8" else "weight"
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    promised, _ = from_text(metadata[KEY])
    assert promised == {f"{name}.{suffix}": "2:4" for name in names}
    for name in promised:
        assert patterns.is_pattern(stored(path)[name], "2:4")
    require_same(model, path, example(Residual))


def test_parts_of_a_pruned_weight_are_found(tmp_path: Path) -> None:
    model = make(Tokens)
    Sparsifier(model, exclude=["attention.out_proj"]).prune()
    checked = export_onnx(model, example(Tokens)[:1], tmp_path / "model.onnx")
    assert set(checked) >= {"shared", "attention.in_proj_weight", "conv"}


def test_a_weight_that_lost_its_zeros_on_the_way_leaves_no_file(tmp_path: Path) -> None:
    class Shifted(Quantized):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act("x", x)
            return nn.functional.linear(x, self.weight(self.linear) + 1, self.linear.bias)

    model = Shifted()
    Sparsifier(model).prune()
    model.calibrate(torch.randn(4, 8))
    with pytest.raises(GateError, match="linear: its 2:4 weight is not in the file"):
        export_onnx(model, torch.randn(1, 8), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_shared_scale_and_a_tensor_rounded_again(tmp_path: Path) -> None:
    class Joined(Quantized):
        def forward(self, x: Tensor) -> Tensor:
            a, b = self.act("x", x), self.act("x", torch.relu(x))
            return self.act("x", self.act("x", torch.cat([a, b], 1)))

    model, path = Joined().calibrate(torch.randn(4, 8)), tmp_path / "model.onnx"
    export_onnx(model, torch.randn(1, 8), path)
    graph = onnx.load(path).graph
    assert Counter(n.op_type for n in graph.node)["QuantizeLinear"] == 3
    assert [o.name for o in graph.output] == ["y"]
    assert len(stored(path)) == 2, "one scale, one zero point"
    x = torch.randn(4, 8)
    assert torch.equal(run_with_integers(path, x)[0], model(x))


def test_what_is_not_calibrated_or_not_float32_is_refused(tmp_path: Path) -> None:
    model, path = Residual(), tmp_path / "model.onnx"
    model(example(Residual))
    with pytest.raises(InputError, match="not calibrated"):
        export_onnx(model, example(Residual), path)
    model.calibrate(example(Residual))
    model.quantizers["a"].mode = "collect"
    with pytest.raises(InputError, match=r"first quantizers\.a"):
        export_onnx(model, example(Residual), path)
    half = FakeQuant(RangeOptions())
    half.set_range(Range(-1, 1))
    half.mode = "on"
    with pytest.raises(InputError, match="float32"):
        export_onnx(nn.Sequential(half), torch.randn(2, 4).bfloat16(), path)
    assert not path.exists()


def test_export_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = make(Residual)
    before = model(example(Residual))
    export_onnx(model, example(Residual)[:1], tmp_path / "model.onnx")
    assert torch.equal(model(example(Residual)), before)
    assert all(quant.mark is None for quant in model.quantizers.values())
