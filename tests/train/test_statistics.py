"""Wanda and Taylor: the sums are those of the definition, and the model is left as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from twofour.core.errors import InputError, UnsupportedError
from twofour.train import Sparsifier
from twofour.train.calibration import Calibration
from twofour.train.layers import find_weights
from twofour.train.statistics import collect


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 6),
    )


def batches(count=3):
    torch.manual_seed(1)
    return [(torch.randn(4, 4, 8, 8), torch.randint(6, (4,))) for _ in range(count)]


def loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def test_wanda_is_weight_squared_times_the_squares_of_its_inputs():
    model, data = network().eval(), batches()
    statistics = collect(model, find_weights(model), "wanda", Calibration(iter(data)))
    energies = {w.name: statistics.energy(w) for w in find_weights(model)}
    x = torch.cat([x for x, _ in data])
    with torch.no_grad():
        hidden = model[:3](x)
        last = model[:6](x)
    grouped = functional.unfold(hidden, 3).double().square().sum((0, 2)).reshape(2, 1, 4, 3, 3)
    expected = {
        "0": functional.unfold(x, 3, padding=1, stride=2).double().square().sum((0, 2)),
        "3": grouped.expand(2, 4, 4, 3, 3).reshape(8, 4, 3, 3),
        "6": last.double().square().sum(0),
    }
    for name, squares in expected.items():
        weight = model[int(name)].weight.detach().double()
        wanted = weight.square() * squares.reshape(-1, *weight.shape[1:])
        torch.testing.assert_close(energies[name], wanted, rtol=1e-5, atol=0)


def test_taylor_is_the_sum_over_batches_of_the_squared_product():
    model, data = network().eval(), batches()
    model[0].weight.requires_grad_(False)
    model[6].weight.grad = torch.ones_like(model[6].weight)
    weights = find_weights(model)
    statistics = collect(model, weights, "taylor", Calibration(data, loss=loss))
    assert not model[0].weight.requires_grad
    assert model[0].weight.grad is None
    assert (model[6].weight.grad == 1).all()
    model[0].weight.requires_grad_(True)
    for weight in weights:
        expected = 0
        for batch in data:
            model.zero_grad()
            loss(model, batch).backward()
            expected += (weight.parameter * weight.parameter.grad).double().square()
        torch.testing.assert_close(statistics.energy(weight), expected.detach(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("criterion", ["wanda", "taylor", "sparsegpt"])
def test_modes_buffers_gradients_and_randomness_stay(criterion):
    model, data = network().train(), batches()
    model[1].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    told = []
    given = {"loss": loss} if criterion == "taylor" else {}
    Sparsifier(model, criterion=criterion).prune(
        data, report=lambda *step: told.append(step), **given
    ).remove()
    assert [m.training for m in model] == [True, False, True, True, True, True, True]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or name in ("0.weight", "3.weight", "6.weight")
    assert told[-1][:2] == (3, 3)  # three batches; or of SparseGPT, three layers


@pytest.mark.parametrize("criterion", ["wanda", "taylor"])
def test_the_masks_follow_the_data(criterion):
    """Inputs of the first four channels of eight: the others' weights go, however large."""
    model = nn.Sequential(nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[:, [0, 3, 4, 7]] = 100.0
    x = torch.randn(16, 8)
    x[:, [0, 3, 4, 7]] = 0.0
    given = {"loss": lambda m, b: m(b).square().mean()} if criterion == "taylor" else {}
    Sparsifier(model, criterion=criterion).prune([x], **given)
    assert model[0].weight_mask.tolist() == [[False, True, True, False] * 2] * 4


def test_bfloat16_sums_are_exact():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16))
    data = [torch.full((1000, 4), 1.0, dtype=torch.bfloat16), torch.full((1, 4), 3.0).bfloat16()]
    statistics = collect(model, find_weights(model), "wanda", Calibration(data))
    assert statistics.sums["0"].tolist() == [[1009.0] * 4]
    assert statistics.energy(find_weights(model)[0]).dtype == torch.float64


@pytest.mark.parametrize("criterion", ["wanda", "taylor", "sparsegpt"])
def test_a_layer_that_no_batch_goes_through_is_named(criterion):
    class Extra(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Extra()
    before = model.used.weight.clone()
    given = {"loss": lambda m, b: m(b).sum()} if criterion == "taylor" else {}
    with pytest.raises(InputError, match="never used: spare\n  fix: exclude them"):
        Sparsifier(model, criterion=criterion).prune([torch.ones(1, 4)], **given)
    assert torch.equal(model.used.weight, before)
    assert not any("mask" in name for name in model.state_dict())


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_inputs_that_are_not_finite_are_named(criterion):
    class Log(nn.Module):
        def forward(self, x):
            return x.log()

    model = nn.Sequential(nn.Linear(4, 4), Log(), nn.Linear(4, 4), nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="the inputs of 2 are not finite"):
        Sparsifier(model, criterion=criterion).prune([-torch.ones(2, 4), torch.ones(2, 4)])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_gradients_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def steep(model, batch):
        return model(batch).sub(model(batch).detach()).abs().sum().sqrt()

    with pytest.raises(InputError, match=r"the gradients of \d are not finite"):
        Sparsifier(model, criterion="taylor").prune([torch.ones(2, 4)], loss=steep)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "Taylor needs the loss whose gradient it looks at"),
        (lambda m, b: 1.0, "expected a tensor, got a float"),
        (lambda m, b: m(b), r"expected a scalar, got shape \[2, 4\]"),
        (lambda m, b: m(b).sum().detach(), "it has no gradient"),
        (lambda m, b: m(b).sum() * float("nan"), "the loss of batch 0 .*\n  it is nan"),
    ],
)
def test_losses_that_rank_nothing(wrong, message):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(InputError, match=message):
        Sparsifier(model, criterion="taylor").prune([torch.ones(2, 4)], loss=wrong)


@pytest.mark.parametrize(
    ("criterion", "given", "message"),
    [
        ("magnitude", {"batches": [1]}, "the criterion magnitude takes no batches"),
        ("magnitude", {"forward": print}, "magnitude takes no forward"),
        ("wanda", {"batches": [1], "loss": print}, "wanda takes no loss"),
        ("taylor", {"batches": [1], "forward": print}, "taylor takes no forward"),
        ("wanda", {}, "Wanda needs calibration data"),
        ("taylor", {"loss": print, "batches": []}, "Taylor got no batches"),
        ("sparsegpt", {}, "SparseGPT needs calibration data"),
    ],
)
def test_data_that_a_criterion_does_not_take_or_lacks(criterion, given, message):
    with pytest.raises(InputError, match=message):
        Sparsifier(nn.Sequential(nn.Linear(4, 4)), criterion=criterion).prune(**given)


def test_distributed_weights_are_pruned_before_they_are_distributed(monkeypatch):
    monkeypatch.setattr("twofour.train.choose.DTensor", nn.Parameter)
    with pytest.raises(UnsupportedError, match="prune before fully_shard"):
        Sparsifier(nn.Sequential(nn.Linear(4, 4)), criterion="wanda").prune([torch.ones(1, 4)])
