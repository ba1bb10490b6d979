"""Every weight with a pattern is found in the file, however the exporter spelled its module."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from twofour.core.errors import GateError
from twofour.core.masks import magnitude_mask
from twofour.core.promises import KEY
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.promises import check, require_kept
from twofour.train import export_onnx


class Attention(nn.Module):
    """Over its own tokens, or over those of others."""

    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True, **options)

    def forward(self, x, keys=None, values=None):
        keys = x if keys is None else keys
        return self.attn(x, keys, keys if values is None else values, need_weights=False)[0]


class Twice(nn.Module):
    """One linear layer, used twice: as a layer and as a function."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return nn.functional.linear(torch.relu(self.linear(x)), self.linear.weight)


def conv(kind, norm):
    return nn.Sequential(kind(8, 16, 3, padding=1), norm(16), nn.ReLU())


def tokens(*sizes):
    return [torch.randn(2, 5 + i, size) for i, size in enumerate(sizes)]


PARTS = ["attn.in_proj_weight", "attn.in_proj_weight_1", "attn.in_proj_weight_2"]
OUT = ["attn.out_proj.weight"]
LAYER = [
    "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"
]  # fmt: skip
CASES = {
    "attention": (Attention, tokens(32), "2:4/pair", PARTS[:1] + OUT),
    "over others": (Attention, [tokens(32)[0], torch.randn(2, 7, 32)], "2:4/2d", PARTS[:2] + OUT),
    "apart": (lambda: Attention(kdim=16, vdim=8), [
        torch.randn(2, 5, 32), torch.randn(2, 7, 16), torch.randn(2, 7, 8)], "1:4", PARTS + OUT),
    "layer": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), tokens(32), "4:8",
              LAYER),
    "conv1d": (lambda: conv(nn.Conv1d, nn.BatchNorm1d), [torch.randn(2, 8, 9)], "1:2",
               ["0.weight"]),
    "conv3d": (lambda: conv(nn.Conv3d, nn.BatchNorm3d), [torch.randn(2, 8, 5, 5, 5)], "3:8",
               ["0.weight"]),
    "twice": (Twice, [torch.randn(2, 16)], "2:4/2d", ["linear.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_patterns_are_found_promised_and_the_same_numbers(case, tmp_path):
    torch.manual_seed(0)
    make, inputs, pattern, names = CASES[case]
    model = make()
    for weight in model.parameters():
        if weight.ndim > 1:
            mask = magnitude_mask(weight.detach().numpy(), pattern)
            weight.data *= torch.from_numpy(mask)
    path = tmp_path / "m.onnx"
    feeds = [f"x{i}" for i in range(len(inputs))]
    checked = export_onnx(model, inputs, path, feeds)
    assert set(checked.values()) == {pattern}
    promised = {p.key: p.value for p in onnx.load(path).metadata_props}[KEY]
    assert json.loads(promised) == dict.fromkeys(names, pattern)
    found = check(load_model(path))
    assert {p.weight for p in found.entries if p.layers and not p.broken} == set(names)
    splits = (node for node in onnx.load(path).graph.node if node.op_type == "Split")
    assert not any("proj" in name for node in splits for name in node.input)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, dict(zip(feeds, (x.numpy() for x in inputs), strict=True)))
    with torch.no_grad():
        expected = model.eval()(*inputs)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_a_dense_model_promises_nothing(tmp_path):
    assert export_onnx(nn.Linear(8, 8), torch.randn(2, 8), tmp_path / "m.onnx") == {}
    assert not onnx.load(tmp_path / "m.onnx").metadata_props


def test_a_mask_broken_between_training_and_export_is_not_promised_and_later_told(tmp_path):
    layer = nn.Linear(8, 8)
    layer.weight.data *= torch.from_numpy(magnitude_mask(layer.weight.detach().numpy(), "2:4"))
    export_onnx(layer, torch.randn(2, 8), tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    (weight,) = (t for t in proto.graph.initializer if t.name == "weight")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[5, 4:8] = 1
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "weight"))
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(GateError, match="output channel 5, channels 4-7 hold 4 nonzeros"):
        require_kept(load_model(tmp_path / "m.onnx"))


def test_a_projection_that_is_not_used_is_named(tmp_path):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return nn.functional.linear(x, self.attn.in_proj_weight[:8])

    model = Half()
    packed = model.attn.in_proj_weight
    packed.data *= torch.from_numpy(magnitude_mask(packed.detach().numpy(), "2:4"))
    with pytest.raises(GateError) as caught:
        export_onnx(model, torch.randn(2, 8), tmp_path / "m.onnx")
    assert "attn.in_proj_weight: 16 output channels of its 2:4 weight" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
