"""The moving average of a model: what is in it, and that the model's own values come back."""

import dataclasses

import pytest
import torch
from torch import nn

from twofour.train import Schedule, Sparsifier, finetune, load_checkpoint
from twofour.train.average import Average


def test_the_average_by_hand():
    model = nn.Linear(4, 1, bias=False)
    average = Average(model, 0.5)
    expected = model.weight.detach().clone().double()
    for t in range(12):
        with torch.no_grad():
            model.weight.normal_()
        average.update()
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    last = model.weight.detach().clone()
    with average.inside():
        torch.testing.assert_close(model.weight.detach().double(), expected)
    assert torch.equal(model.weight, last)


class Tied(nn.Module):
    """Two layers of one weight, and a buffer that has no mean."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("causal", torch.full((8, 8), -torch.inf).triu(1))

    def forward(self, x):
        return self.second(self.first(x).relu()) + self.causal.exp().mean()


def batches(epoch):
    random = torch.Generator().manual_seed(epoch)
    return [(part, part.argmax(1)) for part in torch.randn(4, 16, 8, generator=random)]


def test_a_shared_weight_is_averaged_once_and_comes_back():
    model = Tied()
    average = Average(model, 0.5)
    before = model.first.weight.detach().clone()
    with torch.no_grad():
        model.first.weight += 1
    average.update()
    for _ in range(2):
        with average.inside():
            torch.testing.assert_close(model.first.weight.detach(), before + 0.9)
        assert torch.equal(model.first.weight, before + 1)


def test_a_run_with_shared_weights_and_infinite_buffers(tmp_path):
    schedule = Schedule(epochs=2, lr=0.1, ema=0.9)
    plain, kept, averaged = Tied(), Tied(), Tied()
    finetune(plain, batches, dataclasses.replace(schedule, ema=0.0))
    finetune(kept, batches, dataclasses.replace(schedule, ema_stays=False))
    assert torch.equal(plain.first.weight, kept.first.weight), "keeping an average changes no step"
    path = tmp_path / "run.pt"
    finetune(averaged, batches, schedule, checkpoint=path)
    assert torch.equal(averaged.causal, plain.causal)
    loaded = Tied()
    load_checkpoint(path, loaded)
    assert torch.equal(loaded.first.weight, averaged.first.weight)
    assert not torch.equal(loaded.first.weight, plain.first.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_averages_do_not_stand_still(dtype):
    model = nn.Linear(4, 4).to(dtype)
    nn.init.ones_(model.weight)
    average = Average(model, 0.999)
    average.updates = 100_000
    nn.init.constant_(model.weight, 1.5)
    for _ in range(1000):
        average.update()
    with average.inside():
        expected = torch.full((4, 4), 1.5 - 0.5 * 0.999**1000, dtype=dtype)
        torch.testing.assert_close(model.weight.detach(), expected)
    assert (model.weight == 1.5).all()


def test_running_statistics_are_averaged_and_counters_are_not():
    model = nn.BatchNorm1d(4)
    average = Average(model, 0.5)
    model(torch.randn(16, 4) + 10)
    average.update()
    moved = model.running_mean.clone()
    with average.inside():
        torch.testing.assert_close(model.running_mean, 0.9 * moved)
        assert model.num_batches_tracked == 1


def test_what_is_no_tensor_in_a_state_is_left_alone():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": 1}

        def set_extra_state(self, state):
            pass

    model = Extra(8, 8)
    finetune(model, batches, Schedule(epochs=1, ema=0.9), method=Sparsifier(model).prune())
