"""SparseGPT of PyTorch models: each layer is settled on what the pruned ones before it give."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from twofour.core.errors import InputError
from twofour.core.patterns import Pattern
from twofour.core.sparsegpt import sparsegpt
from twofour.train import ReconstructOptions, Sparsifier
from twofour.train.calibration import Calibration
from twofour.train.layers import find_weights
from twofour.train.reconstruct import reconstruct


class Counting(nn.Linear):
    """A linear layer that counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def correlated(*shape, seed=0):
    """Random values whose channels (the last axis) depend on each other."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(shape[-1], shape[-1], generator=random) / shape[-1] ** 0.5
    return torch.randn(*shape, generator=random) @ (mixing + 0.3)


def chain(count=3, size=16):
    torch.manual_seed(0)
    return nn.Sequential(*[Counting(size, size) for _ in range(count)])


def settle(model, data, pattern="2:4", options=None, **given):
    weights = find_weights(model)
    patterns = {weight.name: Pattern.parse(pattern) for weight in weights}
    return reconstruct(model, weights, patterns, Calibration(data, **given), options)


def expected_of(weight, rows, pattern="2:4"):
    """What the definition makes of a weight and the rows that it multiplies."""
    rows = rows.detach().double().reshape(-1, rows.shape[-1]).numpy()
    return sparsegpt(weight.detach().numpy(), rows.T @ rows, pattern)


def assert_near(found, expected):
    values, mask = expected
    assert np.array_equal(found.detach().numpy() != 0, mask)
    # The Gram matrices differ by rounding, so refit may stop a step earlier or later.
    np.testing.assert_allclose(found.detach().numpy(), values, atol=2e-3)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "2:4/pair", "2:4/2d"])
def test_each_layer_sees_what_the_pruned_ones_before_it_give(pattern):
    model, data = chain(3, 32), [correlated(20, 32, seed=seed) for seed in range(3)]
    original = copy.deepcopy(model)
    pruned = settle(model, data, pattern)
    x = torch.cat(data)
    for before, layer in zip(original, model, strict=True):
        assert_near(layer.weight, expected_of(before.weight, x, pattern))
        x = layer(x).detach()
    for name, mask in pruned.masks.items():
        assert torch.equal(mask, model[int(name)].weight != 0)
    assert all(0.5 < kept < 1 for kept in pruned.energy_kept.values())


def test_all_at_once_sees_what_the_dense_layers_give():
    model, data = chain(), [correlated(20, 16)]
    original = copy.deepcopy(model)
    settle(model, data, options=ReconstructOptions(sequential=False))
    x = data[0]
    for before, layer in zip(original, model, strict=True):
        assert_near(layer.weight, expected_of(before.weight, x))
        x = before(x).detach()


def test_outputs_change_less_than_by_magnitude():
    data = [correlated(200, 16)]
    dense, error = chain(), {}
    for criterion in ("magnitude", "sparsegpt"):
        model = copy.deepcopy(dense)
        given = () if criterion == "magnitude" else (data,)
        sparsifier = Sparsifier(model, criterion=criterion).prune(*given)
        sparsifier.verify()
        error[criterion] = (model(data[0]) - dense(data[0])).square().sum().item()
        (entry, *_) = sparsifier.report()
        assert entry.density == 0.5
        assert 0.5 < entry.energy_kept < 1
    assert error["sparsegpt"] < error["magnitude"] / 3


def test_runs_end_at_the_layer_they_are_for():
    model = chain(4)
    settle(model, [correlated(8, 16)] * 2)
    # The survey runs one batch through all; layer i then runs for the layers behind it.
    assert [layer.calls for layer in model] == [1 + 2 * behind for behind in (3, 2, 1, 0)]


@pytest.mark.parametrize(("memory_bytes", "runs"), [(3 * 8 * 16**2, 1), (8 * 16**2, 3)])
def test_memory_bounds_the_layers_of_a_run(memory_bytes, runs):
    model, seen = chain(3), []
    options = ReconstructOptions(sequential=False, memory_bytes=memory_bytes)
    settle(model, lambda: seen.append(1) or [correlated(8, 16)], options=options)
    assert len(seen) == 1 + runs  # and the survey


def test_layers_that_read_the_same_tensor_share_a_run():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            return self.out(self.q(x) * self.k(x) + self.v(x))

    seen = []
    settle(Attention(), lambda: seen.append(1) or [correlated(8, 8)])
    assert len(seen) == 1 + 2


def test_grouped_convolution_group_by_group():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 6, 3, groups=2, padding=1))
    before, x = model[0].weight.detach().clone(), torch.randn(3, 8, 6, 6)
    settle(model, [x])
    for group in range(2):
        part = x[:, group * 4 : group * 4 + 4]
        columns = nn.functional.unfold(part, 3, padding=1)  # channels, then taps
        rows = columns.movedim(1, 2).reshape(-1, 4, 9).movedim(1, 2).reshape(-1, 36)
        kept = slice(group * 3, group * 3 + 3)
        assert_near(model[0].weight[kept], expected_of(before[kept], rows))


def test_attention_with_three_inputs():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    original = copy.deepcopy(attention)
    q, k, v = (correlated(4, 5, 16, seed=seed) for seed in range(3))
    settle(attention, [(q, k, v)], forward=lambda model, batch: model(*batch))
    found, before = attention.in_proj_weight, original.in_proj_weight
    for part, x in enumerate((q, k, v)):
        rows = slice(part * 16, part * 16 + 16)
        assert_near(found[rows], expected_of(before[rows], x))
    with torch.no_grad():
        attention.out_proj.weight.copy_(torch.eye(16))
        x = attention.eval()(q, k, v)[0]  # its bias is zero
    rows = expected_of(original.out_proj.weight, x)
    assert np.array_equal(settle_out(original, attention, (q, k, v)) != 0, rows[1])


def settle_out(original, pruned, inputs):
    """The output projection that SparseGPT makes behind pruned q, k and v."""
    with torch.no_grad():
        original.in_proj_weight.copy_(pruned.in_proj_weight)
    out = [weight for weight in find_weights(original) if weight.name == "out_proj"]
    data = Calibration([inputs], forward=lambda model, batch: model(*batch))
    reconstruct(original, out, {"out_proj": Pattern(2, 4)}, data)
    return original.out_proj.weight.detach().numpy()


def test_a_layer_called_twice_adds_up_both():
    layer = nn.Linear(16, 16)
    before, x = layer.weight.detach().clone(), correlated(30, 16)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    settle(model, [x])
    with torch.no_grad():
        second = torch.tanh(x @ before.T + layer.bias)
    assert_near(layer.weight, expected_of(before, torch.cat([x, second])))


def test_given_masks_stay_and_the_rest_makes_up():
    data, dense = [correlated(200, 16)], chain(1)
    model = copy.deepcopy(dense)
    sparsifier = Sparsifier(model).prune()
    by_magnitude = (model(data[0]) - dense(data[0])).square().sum()
    masks = {weight.name: weight.mask for weight in sparsifier.weights}
    updated = copy.deepcopy(dense)
    weights = find_weights(updated)
    pruned = reconstruct(updated, weights, sparsifier.patterns, Calibration(data), masks=masks)
    assert torch.equal(updated[0].weight != 0, masks["0"])
    assert torch.equal(pruned.masks["0"], masks["0"])
    assert (updated(data[0]) - dense(data[0])).square().sum() < 0.7 * by_magnitude


@pytest.mark.parametrize("half", ["weights", "autocast"])
def test_half_precision(half):
    model, x = chain(1), correlated(30, 16)
    before = copy.deepcopy(model[0].weight)
    if half == "weights":
        model, x = model.bfloat16(), x.bfloat16()
        before = model[0].weight.detach().float()

    def forward(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
            model(batch)

    settle(model, [x], forward=forward)
    values, mask = expected_of(before, x.float())
    found = model[0].weight.detach().float().numpy()
    assert np.array_equal(found != 0, mask)
    np.testing.assert_allclose(found, values, rtol=2**-7 if half == "weights" else 1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((x for x in [torch.ones(1, 16)]), "SparseGPT runs through the batches several times"),
        ([], "SparseGPT got no batches"),
        (torch.ones(3, 16), "put a single batch in a list"),
    ],
)
def test_batches_that_do_not_do(data, message):
    with pytest.raises(InputError, match=message):
        settle(chain(), data)


def test_what_cannot_be_settled_is_refused_before_anything_is_done():
    model = chain(2)
    before = copy.deepcopy(model.state_dict())
    options = ReconstructOptions(memory_bytes=1000)
    with pytest.raises(InputError, match="0: its Gram matrices take 2,048 bytes"):
        settle(model, [correlated(8, 16)], options=options)
    conv = nn.Sequential(nn.Conv2d(8, 96, 1, groups=2))
    with pytest.raises(InputError, match="0: each 48 output channels have inputs of their own"):
        settle(conv, [torch.randn(1, 8, 4, 4)], "2:4/pair")
    settle(conv, [torch.randn(1, 8, 4, 4)], "2:4/2d")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_interrupted_run_leaves_the_weights_as_they_were():
    model = chain(3)
    before = copy.deepcopy(model.state_dict())

    def report(done, total, what):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        settle(model, [correlated(8, 16)], report=report)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_progress_counts_layers_and_names_them():
    told = []
    settle(chain(2), [correlated(8, 16)] * 2, report=lambda *step: told.append(step))
    assert told == [
        (0, 2, "SparseGPT: 0, batch 1"),
        (0, 2, "SparseGPT: 0, batch 2"),
        (1, 2, "SparseGPT: 0"),
        (1, 2, "SparseGPT: 1, batch 1"),
        (1, 2, "SparseGPT: 1, batch 2"),
        (2, 2, "SparseGPT: 1"),
    ]
