"""The masks hold through optimizer steps and checkpoints, and a lost mask is named."""

import pytest
import torch
from torch import nn

from twofour.core.errors import GateError, InputError
from twofour.train import Sparsifier


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding=1, groups=4),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 12),
    )


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        loss = model(torch.randn(4, 3, 4, 4)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def sgd(model):
    return torch.optim.SGD(
        model.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=1e-2
    )


@pytest.mark.parametrize("pattern", ["2:4", "2:4/pair", "4:8"])
@pytest.mark.parametrize("make", [sgd, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3)])
def test_masks_hold_and_optimizer_state_is_masked(pattern, make):
    model = network()
    sparsifier = Sparsifier(model, pattern).prune()
    optimizer = make(model)
    sparsifier.attach(optimizer)
    before = model[1].weight.clone()
    train(model, optimizer, 3)
    sparsifier.verify()
    removed = ~model[1].weight_mask
    assert removed.float().mean() == 0.5
    assert (model[1].weight[removed] == 0).all()
    assert (model[1].weight[~removed] != before[~removed]).any()
    states = [v for v in optimizer.state[model[1].weight].values() if v.shape == removed.shape]
    assert states
    for value in states:
        assert (value[removed] == 0).all()
        assert (value[~removed] != 0).any()


def test_unattached_training_is_caught_and_named():
    model = network()
    sparsifier = Sparsifier(model, exclude=["4"]).prune()
    train(model, sgd(model), 1)
    with pytest.raises(GateError, match=r"1: weight is not 2:4: output channel 0, tap \(0,0\)"):
        sparsifier.verify()
    sparsifier.apply()
    sparsifier.verify()


def test_detached_masks_no_longer_hold():
    model = network()
    sparsifier = Sparsifier(model).prune()
    optimizer = sgd(model)
    handle = sparsifier.attach(optimizer)
    handle.remove()
    train(model, optimizer, 1)
    with pytest.raises(GateError):
        sparsifier.verify()


def test_masks_survive_a_checkpoint_and_training_resumes_bit_for_bit():
    straight = network()
    optimizer = sgd(straight)
    Sparsifier(straight).prune().attach(optimizer)
    train(straight, optimizer, 2)
    saved = {"model": straight.state_dict(), "optimizer": optimizer.state_dict()}
    saved = {name: _copied(state) for name, state in saved.items()}
    train(straight, optimizer, 2, first=2)

    resumed = nn.Sequential(*[m for m in network()])
    with torch.no_grad():
        resumed[1].weight.copy_(torch.randn_like(resumed[1].weight))
    sparsifier = Sparsifier(resumed).prune()
    assert not torch.equal(resumed[1].weight_mask, straight[1].weight_mask)
    optimizer = sgd(resumed)
    sparsifier.attach(optimizer)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, 2, first=2)
    sparsifier.verify()
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def _copied(state):
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return state


def test_report_names_each_layer_and_the_reason_it_stayed_dense():
    sparsifier = Sparsifier(network(), "2:4", include=["[0-2]", "4"], exclude=["2"])
    assert [entry.reason for entry in sparsifier.report()] == [
        "3 input channels are not a multiple of 4",
        "not pruned yet",
        "excluded by '2'",
        "not pruned yet",
    ]
    entries = {entry.name: entry for entry in sparsifier.prune().report()}
    assert entries["1"].pruned
    assert entries["1"].pattern == "2:4"
    assert entries["1"].density == 0.5
    assert 0.5 < entries["1"].energy_kept < 1
    assert entries["1"].shape == (32, 32, 3, 3)
    assert not entries["0"].pruned
    assert entries["0"].pattern == "dense"
    assert entries["0"].density == 1.0
    only = Sparsifier(network(), include=["1"]).prune().report()
    assert [entry.reason for entry in only][2:] == ["not matched by include"] * 2


def test_remove_gives_back_the_old_state_names():
    model = network()
    names = set(model.state_dict())
    sparsifier = Sparsifier(model).prune()
    assert "1.weight_mask" in model.state_dict()
    sparsifier.remove()
    assert set(model.state_dict()) == names
    assert (model[1].weight == 0).float().mean() == 0.5
    with pytest.raises(InputError, match="no masks"):
        sparsifier.verify()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2of4"}, "unknown sparsity pattern '2of4'"),
        ({"criterion": "luck"}, "unknown pruning criterion 'luck'"),
        ({"exclude": ["layer9.*"]}, "'layer9.\\*' matches no layer of the model"),
        ({"include": ["lin"]}, "the layers are: 0, 1, 2, 4"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        Sparsifier(network(), **options)


def test_nothing_to_prune_says_why():
    with pytest.raises(InputError, match="0: 3 input channels are not a multiple of 4"):
        Sparsifier(network(), include=["0"]).prune()


def test_a_weight_that_is_not_finite_is_named_and_no_layer_is_touched():
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"not finite\n  2: 1 of its values are NaN"):
        Sparsifier(model).prune()
    assert not any("mask" in name for name in model.state_dict())
    assert (model[1].weight != 0).all()


def test_optimizer_of_another_model():
    sparsifier = Sparsifier(network()).prune()
    with pytest.raises(InputError, match="holds none of the pruned weights"):
        sparsifier.attach(sgd(network()))


def test_attach_before_prune():
    model = network()
    with pytest.raises(InputError, match="the model has no masks"):
        Sparsifier(model).attach(sgd(model))
