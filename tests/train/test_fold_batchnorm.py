"""A folded model computes the same; a frozen BatchNorm does not change in training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from twofour.core.errors import InputError
from twofour.core.ranges import RangeOptions
from twofour.train import Sparsifier, reestimate_batchnorm
from twofour.train.fake_quant import FakeQuant
from twofour.train.fold_batchnorm import fold_batchnorm, freeze_batchnorm
from twofour.train.quantize import Quantizer


class Network(nn.Module):
    """BatchNorm that can be folded, and four that cannot: read twice, run twice, before, shared."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.read_twice, self.bn1 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.run_twice, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.bn3, self.after = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.fc, self.bn4 = nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False)
        self.tokens, self.bn5 = nn.Linear(8, 6), nn.BatchNorm1d(2)
        for norm in (self.stem[1], self.bn1, self.bn2, self.bn3):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.read_twice(x)
        x = self.bn1(y) + y
        x = self.bn2(self.run_twice(x)) + self.run_twice(-x)
        x = self.bn4(self.fc(self.after(torch.relu(self.bn3(x))).mean((2, 3))))
        return self.bn5(self.tokens(torch.stack([x, -x], 1)))


@pytest.fixture
def model() -> Network:
    torch.manual_seed(0)
    made = Network()
    for _ in range(3):
        made(torch.randn(8, 4, 6, 6))
    return made.eval()


def test_folded_model_computes_the_same(model: Network) -> None:
    x = torch.randn(5, 4, 6, 6)
    Sparsifier(model, include=["stem.0", "fc"]).prune()
    before = model(x)
    weight = model.stem[0].weight
    assert fold_batchnorm(model, x) == ["stem.1", "bn4"]
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert isinstance(model.bn4, nn.Identity)
    assert model.stem[0].weight is weight
    Sparsifier(model, include=["stem.0", "fc"]).verify()
    assert fold_batchnorm(model, x) == []


def test_folding_changes_no_integer_but_its_sign(model: Network) -> None:
    x = torch.randn(5, 4, 6, 6)
    quants = [FakeQuant(RangeOptions(), axis=0) for _ in range(2)]
    before = quants[0].integers(model.stem[0].weight)
    sign = torch.sign(model.stem[1].weight).reshape(-1, 1, 1, 1)
    fold_batchnorm(model, x)
    after = quants[1].integers(model.stem[0].weight)
    assert (before * sign - after).abs().max() <= 1, "a value between two steps may go either way"
    assert ((before * sign) == after).float().mean() > 0.99


def test_what_is_not_finite_or_quantized_is_refused(model: Network) -> None:
    x = torch.randn(5, 4, 6, 6)
    broken = copy.deepcopy(model)
    broken.stem[1].running_var.fill_(-1.0)
    with pytest.raises(InputError, match=r"cannot fold stem\.1"):
        fold_batchnorm(broken, x)
    Quantizer(model, x)
    with pytest.raises(InputError, match="Quantizer"):
        fold_batchnorm(model, x)


def test_frozen_statistics_do_not_move(model: Network) -> None:
    names = freeze_batchnorm(model, affine=False)
    assert names == ["stem.1", "bn1", "bn2", "bn3", "bn4", "bn5"]
    assert freeze_batchnorm(model) == names
    model = copy.deepcopy(model)
    state = {n: v.clone() for n, v in model.state_dict().items()}
    x = torch.randn(6, 4, 6, 6)
    expected = model.eval()(x)
    assert torch.equal(model.train()(x), expected)
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())
    assert reestimate_batchnorm(model, [x]) == []
    freeze_batchnorm(model, affine=False)
    assert not model.bn1.weight.requires_grad
