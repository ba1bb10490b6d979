"""The growing penalty shrinks what a mask would remove, so that removing it does little harm."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.train.resuming import stopped_and_resumed
from twofour.core.errors import InputError
from twofour.train import Schedule, Sgd, Shrink, Sparsifier, finetune
from twofour.train.masks import mask_of


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


def batches(epoch=0, count=10):
    random = torch.Generator().manual_seed(epoch)
    x = torch.randn(count, 32, 8, generator=random)
    return [(part, part[:, :4].argmax(1)) for part in x]


def test_one_step_by_hand():
    model = nn.Linear(8, 4, bias=False)
    before = model.weight.detach().clone()
    shrink = Shrink(Sparsifier(model), 20, 0.5, ceiling=0.4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    shrink.attach(optimizer)
    model.weight.grad = torch.zeros_like(before)
    optimizer.step()
    removed = ~mask_of(before.square(), "2:4")
    expected = before - 0.1 * (0.4 / 10) * before * removed
    torch.testing.assert_close(model.weight.detach(), expected)
    assert [shrink.penalty(i) for i in (0, 9, 10)] == pytest.approx([0.04, 0.4, 0.0])


def test_removing_what_was_shrunk_changes_little():
    lost = {}
    for ceiling in (1e-9, 2.0):
        model = network()
        shrink = Shrink(Sparsifier(model), 200, 0.75, ceiling=ceiling)
        optimizer = Sgd(weight_decay=0.0).build(model, 0.05)
        shrink.attach(optimizer)
        for x, labels in batches(count=200):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
        kept = [entry.energy_kept for entry in shrink.sparsifier.report()]
        lost[ceiling] = 1 - min(kept)
        shrink.finish().verify()
    assert lost[2.0] < 0.02 * lost[1e-9]


def test_in_the_loop_and_resumed_bit_for_bit(tmp_path):
    def prepare():
        model = network()
        return model, Shrink(Sparsifier(model), 5 * 137, 0.7)

    stopped_and_resumed(prepare, lambda epoch: batches(epoch, 137), Schedule(5, 0.1), tmp_path, 2)


def test_refusals():
    model = network()
    for end, ceiling in ((0.0, 1.0), (1.5, 1.0), (0.5, 0.0)):
        with pytest.raises(InputError, match="cannot shrink weights like this"):
            Shrink(Sparsifier(model), 100, end, ceiling=ceiling)


def test_fused_steps_that_unscale_gradients_get_the_penalty_in_their_scale():
    weights = []
    for fused in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
        Shrink(Sparsifier(model), 20, ceiling=1.0).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for x, labels in batches(count=8):
            optimizer.zero_grad()
            scaler.scale(functional.cross_entropy(model(x), labels)).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(model[0].weight.detach())
    torch.testing.assert_close(*weights)


def test_it_is_attached_once():
    model = network()
    shrink = Shrink(Sparsifier(model), 10)
    finetune(model, batches, Schedule(epochs=1), method=shrink)
    with pytest.raises(InputError, match="or was before\n  fix: make a new one"):
        shrink.attach(torch.optim.SGD(model.parameters(), 0.1))
