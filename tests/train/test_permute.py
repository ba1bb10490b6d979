"""More energy is kept, the model computes the same, and what cannot be done is told."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.train.channel_models import MODELS, Lambda, conv, images
from twofour.core.errors import GateError, InputError, UnsupportedError
from twofour.core.masks import magnitude_mask
from twofour.train import Sparsifier, folding
from twofour.train.networks.resnet import CifarResNet
from twofour.train.permute import permute


def made(name):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    return make().eval(), inputs()


def energy_kept(model, names, pattern):
    total = 0.0
    for name in names:
        weight = model.get_submodule(name).weight.detach().numpy()
        total += float(np.square(weight, dtype=np.float64)[magnitude_mask(weight, pattern)].sum())
    return total


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        *((name, "2:4") for name in ("c2f", "densenet", "resnext", "flattened", "encoder")),
        *(("residual", pattern) for pattern in ("4:8", "1:4", "2:4/pair", "2:4/2d")),
    ],
)
def test_masks_keep_what_the_report_says(name, pattern):
    model, x = made(name)
    with torch.no_grad():
        outputs = model(x)
    report = permute(model, x, pattern, effort=0)
    with torch.no_grad():
        torch.testing.assert_close(model(x), outputs, rtol=1e-4, atol=1e-4)
    pruned = Sparsifier(model, pattern).prune().weights
    kept = sum(float(weight.parameter.detach().double().square().sum()) for weight in pruned)
    assert kept == pytest.approx(report.after, rel=1e-5)
    assert report.after >= report.before
    if pattern == "2:4":
        assert report.after > report.before
        assert 0 < report.recovered < 1


def test_equal_seeds_give_equal_models():
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        model = CifarResNet(8).eval()
        permute(model, torch.randn(1, 3, 8, 8), exclude=["conv1"], effort=0)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_training_goes_on_with_the_same_parameters():
    model, x = made("residual")
    model.train()
    parameters = list(model.parameters())
    permute(model, (x,), effort=0)
    assert model.training
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


def test_memory_format_and_dtype_stay():
    model, x = made("residual")
    model.to(memory_format=torch.channels_last).bfloat16()
    permute(model, x.bfloat16(), effort=0)
    assert model.b.weight.dtype == torch.bfloat16
    assert model.b.weight.is_contiguous(memory_format=torch.channels_last)


def test_layers_may_have_patterns_of_their_own():
    model, x = made("residual")
    report = permute(model, x, {"b": "2:4", "c": "4:8"}, effort=0)
    before, after = (sum(getattr(s, side) for s in report.spaces) for side in ("before", "after"))
    assert after > before
    assert energy_kept(model, ["b"], "2:4") + energy_kept(model, ["c"], "4:8") == pytest.approx(
        report.after, rel=1e-6
    )


def test_names_choose_what_counts():
    model, x = made("residual")
    report = permute(model, x, include=["c"], effort=0)
    assert [space.readers for space in report.spaces] == [("c",)]
    with pytest.raises(InputError, match="nothing_like_it"):
        permute(model, x, exclude=["nothing_like_it"])


def test_a_masked_model_is_refused():
    model, x = made("residual")
    sparsifier = Sparsifier(model, exclude=["a"]).prune()
    with pytest.raises(InputError, match="has masks"):
        permute(model, x)
    sparsifier.remove()
    assert permute(model, x, effort=0).spaces


def test_a_model_that_would_change_is_put_back(monkeypatch):
    model, x = made("residual")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fold = folding.Folded.fold

    def forgetful(self, space, order):
        kept = self.tensors["bn1.running_mean"]
        fold(self, space, order)
        self.tensors["bn1.running_mean"] = kept

    model.bn1.running_mean.normal_()
    before["bn1.running_mean"] = model.bn1.running_mean.clone()
    monkeypatch.setattr(folding.Folded, "fold", forgetful)
    with pytest.raises(GateError, match="left as it was"):
        permute(model, x, effort=0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_keyword_arguments_and_several_outputs():
    model = Lambda(
        lambda m, *, x, scale: {"y": m.b(m.a(x) * scale), "size": x.shape[0]},
        a=nn.Linear(8, 16), b=nn.Linear(16, 4),
    )  # fmt: skip
    inputs = {"x": torch.randn(3, 8), "scale": torch.tensor(2.0)}
    assert permute(model, inputs, effort=0).after > 0


def test_the_table_tells_why_channels_stay():
    model, x = made("residual")
    table = permute(model, x, effort=0).table()
    assert "reads an input, or what no rule follows" not in table  # 3 channels: not pruned at all
    assert max(len(line) for line in table.splitlines()) <= 100
    assert "b, head" in table
    narrow = nn.Sequential(conv(4, 8), nn.ReLU(), conv(8, 4)).eval()
    table = permute(narrow, images(4, 6, 6), effort=0).table()
    assert "reads an input, or what no rule follows: 0 (4)" in table
    assert "of what they removed" in table


def test_attention_of_a_module_is_permuted_inside_heads():
    model, x = made("encoder")
    report = permute(model, x, effort=0)
    readers = {name for space in report.spaces for name in space.readers}
    assert "body.layers.0.self_attn.in_proj_weight" in readers
    assert "body.layers.0.self_attn.out_proj" in readers
    assert "body.layers.1.linear2" in readers


def heads(forward):
    torch.manual_seed(0)
    return Lambda(forward, a=nn.Linear(8, 16), b=nn.Linear(16, 4), other=nn.Linear(16, 12))


def test_what_was_not_run_stays():
    model, x = heads(lambda m, x: m.b(torch.relu(m.a(x)))), torch.randn(2, 8)
    before = model.other.weight.detach().clone()
    report = permute(model, x, effort=0)
    assert torch.equal(model.other.weight, before)
    assert [(s.channels, s.reason) for s in report.stays if s.name == "other"] == [
        (16, "it was not run")
    ]


def test_a_head_of_training_only_moves_along():
    def forward(m, x):
        h = torch.nn.functional.dropout(torch.relu(m.a(x)), 0.5, m.training)
        return (m.b(h), m.other(h)) if m.training else m.b(h)

    model, x = heads(forward), torch.randn(3, 8)
    hidden, auxiliary = (lambda: torch.relu(model.a(x))), model.other
    expected = auxiliary(hidden()).detach()
    report = permute(model, x, effort=0)
    assert [space.readers for space in report.spaces] == [("b", "other")]
    assert report.after > report.before
    torch.testing.assert_close(auxiliary(hidden()), expected, rtol=1e-4, atol=1e-5)
    assert model.training


def test_a_head_that_the_training_graph_misreads_is_found_out(monkeypatch):
    def forward(m, x):
        h = torch.relu(m.a(x))
        return (m.b(h), m.other(h)) if m.training else m.b(h)

    fold = folding.Folded.fold

    def forgetful(self, space, order):
        kept = self.tensors["other.weight"]
        fold(self, space, order)
        self.tensors["other.weight"] = kept

    monkeypatch.setattr(folding.Folded, "fold", forgetful)
    with pytest.raises(GateError, match="in training mode"):
        permute(heads(forward), torch.randn(3, 8), effort=0)


def with_table(m, x):
    return m.b(torch.relu(m.a(x.to(torch.float32))) * torch.full((3, 1), 2.0))


def in_half(m, x):
    return m.b(torch.relu(m.a(x.to(torch.bfloat16))))


@pytest.mark.parametrize(("forward", "dtype"), [(with_table, None), (in_half, torch.bfloat16)])
def test_code_may_ask_for_a_type(forward, dtype):
    assert permute(heads(forward).to(dtype), torch.randn(3, 8), effort=0).recovered > 0


def test_outputs_may_be_flags_and_empty_and_infinite():
    def forward(m, x):
        y = m.b(torch.relu(m.a(x)))
        return {"y": y.masked_fill(torch.arange(4) > 2, -torch.inf), "on": y > 0, "no": x[:0]}

    assert permute(heads(forward), torch.randn(3, 8), effort=0).recovered > 0


@pytest.mark.parametrize("low", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
def test_a_masked_output_hides_no_difference(monkeypatch, low):
    def forward(m, x):
        return m.b(torch.relu(m.a(x))).masked_fill(torch.arange(4) > 2, low)

    fold = folding.Folded.fold

    def forgetful(self, space, order):
        kept = self.tensors["a.bias"]
        fold(self, space, order)
        self.tensors["a.bias"] = kept

    monkeypatch.setattr(folding.Folded, "fold", forgetful)
    with pytest.raises(GateError, match="output 0"):
        permute(heads(forward), torch.randn(3, 8), effort=0)


def test_a_model_that_cannot_be_copied_is_refused():
    model = heads(lambda m, x: m.b(torch.relu(m.a(x))))
    model.seen = model(torch.randn(2, 8))
    with pytest.raises(UnsupportedError, match="earlier calls"):
        permute(model, torch.randn(2, 8))


def test_shapes_that_depend_on_data_are_refused():
    model = heads(lambda m, x: m.b(torch.relu(m.a(x)))[x[:, 0] > 0])
    with pytest.raises(UnsupportedError, match="depends on data"):
        permute(model, torch.randn(2, 8))


def test_torchscript_is_refused():
    model = nn.Sequential(torch.jit.trace(nn.Linear(8, 16), torch.randn(2, 8)), nn.Linear(16, 4))
    with pytest.raises(UnsupportedError, match="TorchScript module: 0"):
        permute(model, torch.randn(2, 8))


def test_inputs_may_be_nested_and_doubled():
    model, seen = heads(lambda m, batch: m.b(torch.relu(m.a(batch["x"][0])))), []
    model.a.register_forward_hook(lambda m, given, out: seen.append(out.dtype))
    permute(model, ({"x": [torch.randn(2, 8)]},), effort=0)
    assert seen[-4:] == [torch.float64] * 4


def test_noise_is_the_same_twice_and_random_numbers_go_on():
    model = heads(lambda m, x: m.b(torch.relu(m.a(x))) + torch.randn(3, 4))
    state = torch.get_rng_state()
    assert permute(model, torch.randn(3, 8, generator=torch.Generator()), effort=0).recovered > 0
    assert torch.equal(torch.get_rng_state(), state)
