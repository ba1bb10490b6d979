"""Files of a Quantizer, by family: what torch rounds, and the integer layers of a PTQ file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from tests.train.quantized_models import run_with_integers, torch_integers
from twofour import build
from twofour.onnx_tools.quantize import quantize
from twofour.train import Quantizer, export_onnx
from twofour.train.networks.mobilenet import MobileConfig, MobileNet
from twofour.train.networks.resnet import CifarResNet
from twofour.train.networks.seeded import seeded
from twofour.train.networks.vit import Vit, VitConfig


class Joined(nn.Module):
    """Branches that a concatenation joins, halves that are pooled and padded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.right, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(32, 16, 3)
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        y = self.last(nn.functional.pad(nn.functional.max_pool2d(y, 2), (1, 1, 1, 1)))
        return self.fc(torch.relu(y).mean((2, 3)))


VIT = VitConfig(layers=2, hidden=64, heads=2, intermediate=128, image=32, classes=8)
MOBILE = MobileConfig(stages=((1, 16, 1, 1), (4, 16, 2, 1)), stem=16, head=64, classes=8)
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: CifarResNet(8),
    "mobilenet": lambda: MobileNet(MOBILE),
    "vit": lambda: Vit(VIT),
    "concat": Joined,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_same_integers_and_the_integer_layers_of_ptq(family: str, tmp_path: Path) -> None:
    model = seeded(FAMILIES[family], (4, 3, 32, 32)).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain, path = tmp_path / "float.onnx", tmp_path / "model.onnx"
    export_onnx(model, x, plain)
    Quantizer(model, x).calibrate([x])
    export_onnx(model, x, path)

    expected, integers = torch_integers(model, x)
    found, rounded = run_with_integers(path, x)
    for (name, ours), theirs in zip(rounded.items(), integers, strict=True):
        assert np.abs(ours - theirs).max() <= 1, name
        assert (ours != theirs).mean() < 0.01, name
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()

    ir.save(quantize(ir.load(plain), {"x": x.numpy()}), tmp_path / "ptq.onnx")
    forms = []
    for file in (path, tmp_path / "ptq.onnx"):
        engine = build(file, shapes={"x": (2, 3, 32, 32)}, tuning_effort=0)
        assert not [layer for layer in engine.plan.layers if layer.tactic == "onnxruntime"]
        forms.append(sorted((layer.op, layer.precision) for layer in engine.plan.layers))
    assert forms[0] == forms[1]
    assert not [op for op, form in forms[0] if ("Conv" in op or "Gemm" in op) and form != "int8"]
