"""BatchNorm statistics are averages over the batches, and all else stays as it was."""

import copy

import pytest
import torch
from torch import nn

from twofour.core.errors import InputError
from twofour.train import reestimate_batchnorm


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 5),
        nn.BatchNorm1d(5),
    )


def batches(count=3):
    torch.manual_seed(1)
    return [(torch.randn(8, 3, 6, 6) * (i + 1), None) for i in range(count)]


def test_statistics_are_the_averages_over_the_batches():
    model, data = network(), batches()
    told = []
    names = reestimate_batchnorm(model, iter(data), report=lambda *step: told.append(step))
    assert names == ["1", "5"]
    assert told == [(i, None, "BatchNorm re-estimation: batch") for i in (1, 2, 3)]
    means, variances, hidden = [], [], []
    with torch.no_grad():
        for x, _ in data:
            x = model[0](x)
            means.append(x.mean((0, 2, 3)))
            variances.append(x.var((0, 2, 3)))
            x = nn.functional.batch_norm(x, None, None, model[1].weight, model[1].bias, True)
            hidden.append(model[4](x.flatten(1)))  # no dropout
    torch.testing.assert_close(model[1].running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack(variances).mean(0))
    expected = torch.stack([x.var(0) for x in hidden]).mean(0)
    torch.testing.assert_close(model[5].running_var, expected)
    assert int(model[1].num_batches_tracked) == 3


@pytest.mark.parametrize("training", [True, False])
def test_all_else_stays(training):
    model, data = network().train(training), batches()
    model[1].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    reestimate_batchnorm(model, data)
    assert [m.training for m in model] == [training, False, *[training] * 4]
    assert (model[1].momentum, model[5].momentum) == (0.3, 0.1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_layers_without_statistics_or_without_use_stay():
    class Extra(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
            self.free = nn.BatchNorm1d(4, track_running_stats=False)
            self.spare.running_mean.fill_(7.0)

        def forward(self, x):
            return self.free(self.used(x))

    model = Extra()
    assert reestimate_batchnorm(model, [torch.randn(8, 4) + 3]) == ["used"]
    assert (model.spare.running_mean == 7.0).all()
    assert (model.used.running_mean > 1).all()
    assert reestimate_batchnorm(nn.Linear(4, 4), [torch.randn(8, 4)]) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "BatchNorm re-estimation got no batches"),
        ([torch.full((8, 3, 6, 6), torch.nan)], "the running_mean of 1 is not finite"),
        ([torch.randn(8, 3, 6, 6) * 1e30], "the running_var of 1 is not finite"),
    ],
)
def test_after_an_error_statistics_are_as_before(data, message):
    model = network()
    reestimate_batchnorm(model, batches())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        reestimate_batchnorm(model, data)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert model[1].momentum == 0.3
