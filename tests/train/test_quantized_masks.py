"""2:4 through quantization: masks hold in calibration, training, averages, files and engines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import twofour
from tests.train.quantized_models import run_with_integers, stored
from twofour.core import patterns
from twofour.core.errors import GateError
from twofour.train import (
    Progress,
    Schedule,
    Sgd,
    Sparsifier,
    export_onnx,
    finetune,
    reestimate_batchnorm,
)
from twofour.train.quantize import Quantizer, QuantizerOptions

PRUNED = ("conv1", "conv2", "fc")


class Network(nn.Module):
    """A residual block, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv1, self.bn1 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.relu(x + y).mean((2, 3)))


def data(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 16, 3, 8, 8, generator=generator)
    return [(part, part.mean((1, 2, 3)).gt(0).long()) for part in x]


def masked(learned: bool = False) -> tuple[Network, Sparsifier, Quantizer]:
    torch.manual_seed(0)
    model = Network()
    reestimate_batchnorm(model, data())
    sparsifier = Sparsifier(model, locked=True).prune()
    made = Quantizer(model, data()[0][0], QuantizerOptions(learned_scales=learned))
    return model, sparsifier, made


def require_held(model: nn.Module, quantizer: Quantizer) -> None:
    """Weights, and what they are rounded to, are zero where the masks are."""
    for name in PRUNED:
        module = model.get_submodule(name)
        mask = module.get_buffer("weight_mask")
        assert patterns.is_pattern(mask.numpy(), "2:4")
        rounded = quantizer.quantizers.get(f"{name}_weight").integers(module.weight)
        assert not module.weight[~mask].any()
        assert not rounded[~mask].any()
        assert rounded[mask].count_nonzero() > 0.9 * int(mask.sum())


def train(
    model: nn.Module,
    sparsifier: Sparsifier,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
    epochs: int = 2,
) -> None:
    schedule = Schedule(epochs=epochs, lr=0.05, ema=0.9, optimizer=Sgd(momentum=0.9))
    finetune(model, data, schedule, method=sparsifier, progress=progress, checkpoint=checkpoint)


@pytest.mark.parametrize("learned", [False, True])
def test_masks_hold_from_calibration_to_the_engine(learned: bool, tmp_path: Path) -> None:
    model, sparsifier, quantizer = masked(learned)
    before = {name: model.get_buffer(f"{name}.weight_mask").clone() for name in PRUNED}
    quantizer.calibrate([x for x, _ in data()])
    require_held(model, quantizer)
    weights = model.conv1.weight.detach().clone()
    train(model, sparsifier, checkpoint=tmp_path / "run.pt")
    assert not torch.equal(weights, model.conv1.weight)
    sparsifier.verify()
    quantizer.verify()
    require_held(model, quantizer)
    reestimate_batchnorm(model, data())
    require_held(model, quantizer)
    for name, mask in before.items():
        assert torch.equal(mask, model.get_buffer(f"{name}.weight_mask"))

    fresh, other, again = masked(learned)
    again.restore(copy.deepcopy(model.state_dict()))
    other.restore(model.state_dict())
    require_held(fresh, again)
    x = data(7)[0][0]
    assert torch.equal(fresh.eval()(x), model.eval()(x))

    path = tmp_path / "model.onnx"
    assert export_onnx(fresh, x[:1], path) == dict.fromkeys(PRUNED, "2:4")
    assert patterns.is_pattern(stored(path)["conv2.weight_quantized"], "2:4")
    found, _ = run_with_integers(path, x)
    torch.testing.assert_close(found, fresh(x).detach(), rtol=0, atol=0.05)
    engine = twofour.build(path, shapes={"x": (16, 3, 8, 8)}, tuning_effort=0)
    forms = {layer.name: (layer.precision, layer.pattern) for layer in engine.plan.layers}
    assert forms["stem"][0] == "int8"
    assert [forms[name] for name in PRUNED] == [("int8", "2:4")] * 3
    y = twofour.Session(engine).run({"x": x.numpy()})["y"]
    np.testing.assert_allclose(y, found.numpy(), rtol=0, atol=0.05)


def test_a_resumed_run_has_the_masks_and_scales_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, _, _ = states = masked(learned=True)
    states[2].calibrate([x for x, _ in data()])
    train(whole, states[1])
    path = tmp_path / "run.pt"

    class Stop(Exception):
        pass

    def stop(at: Progress) -> None:
        if at.epoch == 1:
            raise Stop

    broken = masked(learned=True)
    broken[2].calibrate([x for x, _ in data()])
    with pytest.raises(Stop):
        train(broken[0], broken[1], stop, path)
    resumed = masked(learned=True)
    resumed[2].calibrate([x for x, _ in data()])
    train(resumed[0], resumed[1], None, path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[name]), name


@torch.no_grad()
def unmask(model: Network) -> None:
    model.conv2.weight[~model.conv2.weight_mask] = 0.01


def test_an_unmasked_weight_is_named_by_calibration() -> None:
    model, _, quantizer = masked()
    unmask(model)
    with pytest.raises(GateError, match="conv2"):
        quantizer.calibrate([x for x, _ in data()])


def test_an_unmasked_projection_of_attention_is_named_by_calibration() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(2, 5, 16)
    Sparsifier(layer).prune()
    quantizer = Quantizer(layer, x).calibrate([x])
    layer.self_attn.in_proj_weight.data.fill_(0.1)
    with pytest.raises(GateError, match=r"in_proj_weight: .* values are not zero"):
        quantizer.verify()


def test_an_unmasked_weight_is_named_by_the_end_of_training() -> None:
    model, sparsifier, quantizer = masked()
    quantizer.calibrate([x for x, _ in data()])
    model.eval()

    def meddle(at: Progress) -> None:
        if at.epoch == 1 and at.batch == at.batches:
            unmask(model)

    schedule = Schedule(epochs=2, lr=0.01)
    with pytest.raises(GateError, match="conv2: weight is not 2:4"):
        finetune(model, data, schedule, method=sparsifier, progress=meddle)


def test_an_unmasked_weight_is_named_by_export_and_no_file_is_left(tmp_path: Path) -> None:
    model, _, quantizer = masked()
    quantizer.calibrate([x for x, _ in data()])
    unmask(model)
    with pytest.raises(GateError, match=r"conv2: .* not zero where the mask is"):
        export_onnx(model, data()[0][0], tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_another_mask_and_no_mask_are_named() -> None:
    model, sparsifier, quantizer = masked()
    quantizer.calibrate([x for x, _ in data()])
    with torch.no_grad():
        model.conv1.weight_mask.copy_(model.conv1.weight_mask.flip(1))
        model.conv1.weight.mul_(model.conv1.weight_mask)
    del model.fc.weight_mask
    with pytest.raises(GateError) as caught:
        sparsifier.verify()
    assert "conv1: its mask is not the one that was locked" in str(caught.value)
    assert "fc: its locked mask is gone" in str(caught.value)


def test_a_file_that_lost_its_zeros_is_not_built(tmp_path: Path) -> None:
    model, _, quantizer = masked()
    quantizer.calibrate([x for x, _ in data()])
    path = tmp_path / "model.onnx"
    export_onnx(model, data()[0][0], path)
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.name == "conv2.weight_quantized":
            dense = np.maximum(numpy_helper.to_array(tensor), 1)
            tensor.CopyFrom(numpy_helper.from_array(dense, tensor.name))
    onnx.save(proto, path)
    with pytest.raises(GateError, match="conv2"):
        twofour.build(path, shapes={"x": (16, 3, 8, 8)}, tuning_effort=0)
