"""Gradual pruning masks layer after layer, or group after group, and nothing comes back."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.train.resuming import stopped_and_resumed
from twofour.core.errors import InputError
from twofour.core.patterns import share_held
from twofour.train import Gradual, Schedule, Sgd, Sparsifier
from twofour.train.masks import mask_of

LAYERS = ("0", "2", "4", "6")


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 4),
    )
    with torch.no_grad():
        model[4].weight[:, 2::4] *= 0.01  # 2:4 does little harm here
        model[4].weight[:, 3::4] *= 0.01
    return model


def batches(epoch=0, count=10):
    random = torch.Generator().manual_seed(epoch)
    x = torch.randn(count, 32, 8, generator=random)
    return [(part, part[:, :4].argmax(1)) for part in x]


def train(model, gradual, steps):
    optimizer = Sgd().build(model, 0.05)
    gradual.attach(optimizer)
    for x, labels in batches(count=steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        yield optimizer


def masked(model):
    return [name for name in LAYERS if not model[int(name)].weight_mask.all()]


def test_layers_follow_in_order_on_a_cubic():
    model = network()
    sparsifier = Sparsifier(model)
    gradual = Gradual(sparsifier, 100, start=0.1, end=0.6)
    assert [gradual.share(i) for i in (0, 10, 60, 100)] == [0, 0, 1, 1]
    assert gradual.share(35) == pytest.approx(1 - 0.5**3)
    seen = {}
    for step, optimizer in enumerate(train(model, gradual, 100), 1):
        seen[step] = masked(model)
        for name in seen[step]:
            layer = model[int(name)]
            assert share_held(layer.weight.detach().numpy(), "2:4") == 1
            momentum = optimizer.state[layer.weight]["momentum_buffer"]
            assert not momentum[~layer.weight_mask].any()
    assert gradual.order[0] == "4", "the least harmed comes first"
    counts = [len(seen[step]) for step in sorted(seen)]
    assert counts == sorted(counts)
    turns = [next(step for step in seen if name in seen[step]) for name in gradual.order]
    # The smallest whole step at which 1 - (1 - p)^3 reaches a quarter of the layers, and so on.
    expected = [10 + int(np.ceil(50 * (1 - (1 - k / 4) ** (1 / 3)))) for k in (1, 2, 3, 4)]
    assert turns == expected
    kept = {entry.name: entry.energy_kept for entry in sparsifier.report()}
    assert kept["4"] > 0.95 > kept["2"] > 0.5, "of the weights when their turn came"
    assert gradual.finish() is sparsifier
    sparsifier.verify()
    with pytest.raises(InputError, match="locked"):
        sparsifier.prune()


def test_a_given_order():
    model = network()
    gradual = Gradual(Sparsifier(model), 8, end=1.0, order=["6", "0", "4", "2"])
    seen = [masked(model) for _ in train(model, gradual, 8)]
    assert seen[0] == ["6"]
    assert seen[-1] == list(LAYERS)
    with pytest.raises(InputError, match=r"order: expected 'energy' or each of \['0', '2'"):
        Gradual(Sparsifier(model), 8, order=["6", "0"])


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "2:4/pair", "2:4/2d"])
def test_groups_tighten_in_each_layer_and_never_come_back(pattern):
    model = network()
    sparsifier = Sparsifier(model, pattern)
    gradual = Gradual(sparsifier, 40, end=0.8, by="groups")
    size = {"2:4/pair": 32, "2:4/2d": 4}.get(pattern, 1) * (8 if pattern == "4:8" else 4)
    before = {name: torch.ones_like(model[int(name)].weight, dtype=torch.bool) for name in LAYERS}
    for step, _ in enumerate(train(model, gradual, 40), 1):
        for name in LAYERS:
            layer = model[int(name)]
            mask = layer.weight_mask.clone()
            assert not (mask & ~before[name]).any(), "removed weights stay removed"
            assert not layer.weight[~mask].any()
            units = -(-mask.numel() // size)
            removed = int((~mask).sum())
            if mask.shape[0] % 32 == 0:
                assert removed == int(gradual.share(step) * units + 1e-9) * size // 2
            before[name] = mask
    gradual.finish().verify()


def test_the_least_harmed_groups_come_first():
    model = nn.Linear(16, 1, bias=False)
    losing = [5.0, 0.1, 3.0, 0.5]
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[9.0, 9.0, loss, loss] for loss in losing]).view(1, 16))
    gradual = Gradual(Sparsifier(model), 8, end=1.0, by="groups")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    gradual.attach(optimizer)
    order = []
    for _ in range(8):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        full = model.weight_mask.view(4, 4).all(1)
        order += [i for i in range(4) if not full[i] and i not in order]
    assert [losing[i] for i in order] == [0.1, 0.5, 3.0, 5.0]
    best = mask_of(model.weight.detach().square(), "2:4")
    assert torch.equal(model.weight_mask, best)


@pytest.mark.parametrize("by", ["layers", "groups"])
def test_in_the_loop_and_resumed_bit_for_bit(tmp_path, by):
    def prepare():
        model = network()
        return model, Gradual(Sparsifier(model), 50, 0.1, 0.8, by=by)

    stopped_and_resumed(prepare, batches, Schedule(5, 0.1, ema=0.9), tmp_path, 3)


def test_refusals():
    model = network()
    for start, end in ((0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (0.0, 0.001)):
        with pytest.raises(InputError, match="start, end: expected shares, a step or more apart"):
            Gradual(Sparsifier(model), 100, start, end)
    with pytest.raises(InputError, match="by: expected layers or groups; got rows"):
        Gradual(Sparsifier(model), 100, by="rows")
    gradual = Gradual(Sparsifier(model), 100)
    gradual.attach(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(InputError, match="needs 50 steps of the optimizer\n  0 were done"):
        gradual.finish()


def test_the_order_is_that_of_the_run_it_goes_on_from():
    first, other = (Gradual(Sparsifier(network()), 100) for _ in range(2))
    nn.init.ones_(other.sparsifier.model[4].weight)
    for gradual in (first, other):
        gradual.attach(torch.optim.SGD(gradual.sparsifier.model.parameters(), 0.1))
    assert other.order != first.order
    other.load_state_dict(first.state_dict())
    assert other.order == first.order
