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


@pytest.mark.parametrize("pattern", ["2:4", "2:4/pair", "2:4/2d", "4:8"])
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


def test_the_two_lines_of_a_loop():
    model = network()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model).prune()
    sparsifier.attach(optimizer)
    train(model, optimizer, 1)
    sparsifier.verify()


def test_a_mapping_gives_each_layer_the_first_pattern_that_matches():
    model = network()
    sparsifier = Sparsifier(model, {"[12]": "2:4/pair", "1": "1:4", "4": "4:8"}).prune()
    entries = {entry.name: entry for entry in sparsifier.report()}
    assert [entries[name].pattern for name in "0124"] == ["dense", "2:4/pair", "2:4/pair", "4:8"]
    assert entries["0"].reason == "no pattern is given for its name"
    assert torch.equal(model[1].weight_mask[:16], model[1].weight_mask[16:])
    assert str(sparsifier.patterns["4"]) == "4:8"
    sparsifier.verify()
    with torch.no_grad():
        model[4].weight[0, :8] = 1.0
        model[1].weight[0, :, 0, 0] = model[1].weight_mask[0, :, 0, 0].logical_not()
    with pytest.raises(GateError) as caught:
        sparsifier.verify()
    assert caught.value.reasons == (
        "1: weight is not 2:4/pair: output channels 0 and 16 together, tap (0,0), channels 0-3 "
        "hold 4 nonzeros",
        "4: weight is not 4:8: output channel 0, channels 0-7 hold 8 nonzeros",
    )


def test_both_directions():
    model = network()
    sparsifier = Sparsifier(model, "2:4/2d").prune()
    assert sparsifier.report()[2].pattern == "2:4/2d"
    columns = model[1].weight_mask.reshape(8, 4, 32, 3, 3).sum(1)
    assert (columns == 2).all()
    sparsifier.verify()


def test_a_name_pattern_of_the_mapping_that_matches_nothing():
    with pytest.raises(InputError, match=r"'conv\*' matches no layer of the model"):
        Sparsifier(network(), {"conv*": "4:8", "*": "2:4"})


def test_a_weight_that_breaks_its_mask_but_not_its_pattern_is_named():
    model = network()
    sparsifier = Sparsifier(model).prune()
    with torch.no_grad():
        model[2].weight[3, 4:8, 1, 2] = model[2].weight_mask[3, 4:8, 1, 2].logical_not().float()
    channel = 4 + int(model[2].weight_mask[3, 4:8, 1, 2].logical_not().nonzero()[0])
    with pytest.raises(GateError) as caught:
        sparsifier.verify()
    assert caught.value.reasons == (
        "2: 2 values are not zero where the mask is, first output channel 3, tap (1,2), "
        f"channel {channel}",
    )


def test_prune_again_chooses_from_the_weights_as_they_are():
    model = network()
    sparsifier = Sparsifier(model).prune()
    first = model[4].weight_mask.clone()
    held = model[4].weight_mask
    sparsifier.prune()
    assert torch.equal(model[4].weight_mask, first)
    with torch.no_grad():
        model[4].weight.copy_(torch.randn_like(model[4].weight))
    sparsifier.prune()
    assert not torch.equal(model[4].weight_mask, first)
    assert model[4].weight_mask is held  # in place: graphs and averages keep it
    sparsifier.verify()


@pytest.mark.parametrize("how", ["option", "method", "option on a pruned model"])
def test_locked_masks_cannot_be_changed(how):
    model = network()
    if how == "option on a pruned model":
        Sparsifier(model).prune()
        sparsifier = Sparsifier(model, locked=True)
    else:
        sparsifier = Sparsifier(model, locked=how == "option").prune()
    if how == "method":
        sparsifier.lock()
    mask = model[4].weight_mask.clone()
    with pytest.raises(InputError, match="cannot choose masks anew: the masks are locked"):
        sparsifier.prune()
    with pytest.raises(InputError, match="cannot change masks: the masks are locked"):
        sparsifier.set_masks({"4": ~mask})
    assert torch.equal(model[4].weight_mask, mask)
    optimizer = sgd(model)
    sparsifier.attach(optimizer)
    train(model, optimizer, 1)
    sparsifier.verify()
    sparsifier.restore(_copied(model.state_dict()))  # its own masks are no change
    other = network()
    with torch.no_grad():
        other[4].weight.copy_(torch.randn_like(other[4].weight))
    Sparsifier(other).prune()
    with pytest.raises(InputError, match="4: another mask than the locked one"):
        sparsifier.restore(other.state_dict())
    model.load_state_dict(other.state_dict())
    with pytest.raises(GateError, match="4: its mask is not the one that was locked"):
        sparsifier.verify()


def test_removing_the_masks_ends_the_lock():
    sparsifier = Sparsifier(network(), locked=True).prune()
    sparsifier.remove()
    sparsifier.prune()


def test_masks_of_ones_own_for_some_layers():
    model = network()
    sparsifier = Sparsifier(model)
    mask = torch.tensor([True, False, False, True]).repeat(12, 128)
    sparsifier.set_masks({"4": mask})
    assert [entry.pruned for entry in sparsifier.report() if entry.name in "124"] == [
        False,
        False,
        True,
    ]
    assert (model[1].weight != 0).all()
    optimizer = sgd(model)
    sparsifier.attach(optimizer)
    train(model, optimizer, 1)
    assert (model[4].weight[~mask] == 0).all()
    sparsifier.verify()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"9": torch.ones(2, 2).bool()}, "9: the model has no such weight"),
        ({"0": torch.ones(32, 3, 3, 3).bool()}, "0: 3 input channels are not a multiple of 4"),
        ({"4": torch.ones(12, 512).bool()}, "4: mask is not 2:4: output channel 0, channels 0-3"),
        ({"4": torch.zeros(12, 8).bool()}, r"4: expected a mask of shape \(12, 512\), got"),
        ({"4": torch.zeros(12, 512)}, "4: expected a mask of dtype torch.bool, got torch.float32"),
        ({"4": None}, "4: expected a mask of dtype torch.bool, got NoneType"),
    ],
)
def test_masks_that_do_not_fit(masks, message):
    model = network()
    good = torch.zeros_like(model[1].weight, dtype=torch.bool)
    with pytest.raises(InputError, match=message):
        Sparsifier(model).set_masks({"1": good, **masks})
    assert not any("mask" in name for name in model.state_dict())


def test_removed_masks_are_no_longer_held():
    model = network()
    sparsifier = Sparsifier(model).prune()
    optimizer = sgd(model)
    sparsifier.attach(optimizer)
    sparsifier.remove()
    train(model, optimizer, 1)
    assert (model[1].weight != 0).all()
    assert not optimizer._optimizer_step_post_hooks


def test_the_table_tells_everything_in_100_columns():
    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.the_encoder_with_a_very_long_name = nn.ModuleDict({"layers_of_it_all": network()})
            self.tok = nn.Embedding(10, 8)
            self.lm_head = nn.Linear(8, 10)
            self.lm_head.weight = self.tok.weight
            self.attention = nn.MultiheadAttention(8, 2)

    text = Sparsifier(Long(), {"*": "2:4/pair"}, exclude=["*.2"]).prune().table()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == ["pruned", "weight", "pattern", "nonzero", "energy"]
    assert sum(line.startswith("...") and "layers_of_it_all.1 " in line for line in lines) == 1
    row = next(line for line in lines if line.startswith("attention.in_proj_weight"))
    assert row.split()[1:4] == ["[24,8]", "2:4/pair", "50.0%"]
    assert "  tok [10,8]: shared by tok and lm_head: an embedding is a table of rows" in text
    assert "excluded by '*.2'" in text
    assert "3 input channels are not a multiple of 4" in " ".join(text.split())
    assert lines[-1].startswith("total: 4 of 7 weights pruned, 15,616 of 18,864 values (82.8%)")
    assert lines[-1].endswith("50.0% of those nonzero")


def test_a_model_with_nothing_to_prune():
    with pytest.raises(InputError, match="it has no linear layer, convolution or attention"):
        Sparsifier(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))).prune()
    with pytest.raises(InputError, match=r"0: an embedding is a table"):
        Sparsifier(nn.Sequential(nn.Embedding(4, 4))).prune()


def test_a_single_name_is_told_from_a_list():
    with pytest.raises(InputError, match=r"fix: exclude=\['conv1'\]"):
        Sparsifier(nn.Sequential(nn.Linear(8, 8)), exclude="conv1")
