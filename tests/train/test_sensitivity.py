"""Each weight of a PyTorch model pruned alone: what the score says, and the model afterwards."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from twofour.core.errors import InputError
from twofour.core.sensitivity import Sensitivity
from twofour.train import Sparsifier, sensitivity


class Net(nn.Module):
    """Two convolutions with a BatchNorm, attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(self.norm(self.first(x)))).flatten(2).transpose(1, 2)
        found: Tensor = self.head(self.attn(x, x, x)[0].mean(1))
        return found


WEIGHTS = ["conv", "attn.in_proj_weight", "attn.out_proj", "head"]


def make() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def images() -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def nearness(expected: Tensor, model: nn.Module) -> float:
    """Less is worse: minus the distance from the outputs of the dense model."""
    with torch.no_grad():
        return -float((model(images()) - expected).square().mean())


def near(model: nn.Module) -> functools.partial[float]:
    with torch.no_grad():
        return functools.partial(nearness, model(images()))


def drops(found: Sensitivity) -> dict[tuple[str, str], float]:
    return {(case.layer, case.pattern): case.drop for case in found.cases}


def test_the_score_is_that_of_the_model_with_one_weight_pruned() -> None:
    model = make()
    score = near(model)
    found = sensitivity(model, score, ["2:4", "1:4"])
    assert [case.layer for case in found.cases] == [*WEIGHTS, *WEIGHTS]
    assert (found.model, found.metric, found.dense, found.samples) == ("Net", "score", 0.0, None)
    for case in found.cases:
        other = make()
        sparsifier = Sparsifier(other, case.pattern, include=[case.layer]).prune()
        assert case.figure == score(other)
        assert case.drop == -score(other) > 0
        (entry,) = [each for each in sparsifier.report() if each.pruned]
        assert case.energy_kept == entry.energy_kept
    (left,) = [each for each in found.left if each.pattern == "2:4"]
    assert (left.layer, left.reason) == ("first", "3 input channels are not a multiple of 4")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_the_model_is_put_back_bit_for_bit(criterion: str) -> None:
    """Also what the score changes: statistics of a BatchNorm, and modes."""
    model = make()
    model.conv.train()
    before, parameters = state(model), list(map(id, model.parameters()))

    def score(given: nn.Module) -> float:
        given.train()
        return float(given(images()).detach().sum())

    batches = None if criterion == "magnitude" else [images()]
    sensitivity(model, score, criterion=criterion, batches=batches)
    after = state(model)
    assert list(after) == list(before)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert [module for module in model.modules() if module.training] == [model.conv]
    assert list(map(id, model.parameters())) == parameters
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_is_put_back_after_an_error() -> None:
    model = make()
    before = state(model)
    calls = []

    def score(given: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise ArithmeticError("a bug of the score")
        return 0.0

    with pytest.raises(ArithmeticError):
        sensitivity(model, score)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert list(before) == list(model.state_dict())


def test_each_score_draws_the_same_numbers_and_leaves_the_generator() -> None:
    model = make()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = sensitivity(model, lambda given: float(torch.rand(1)))
    assert {case.drop for case in found.cases} == {0.0}
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_change_no_figure() -> None:
    model = make()
    one = sensitivity(model, near(model))
    two = sensitivity(model, near(model), jobs=2)
    assert drops(one) == pytest.approx(drops(two), rel=1e-4)
    assert [case.layer for case in two.cases] == WEIGHTS


def test_a_scan_goes_on_where_it_stood(tmp_path: Path) -> None:
    model, calls = make(), []
    near_it = near(model)

    def score(given: nn.Module) -> float:
        calls.append(1)
        return near_it(given)

    cached = functools.partial(sensitivity, model, score, cache=tmp_path / "c", key="images")
    first = cached(include=["conv"])
    assert len(calls) == 2  # the dense model, and one weight
    second = cached()
    assert len(calls) == 6
    assert second.cases[0] == first.cases[0]
    assert cached().cases == second.cases
    assert len(calls) == 7
    cached(key="other images")
    assert len(calls) == 12
    with torch.no_grad():
        model.head.bias[0] += 1
    cached()
    assert len(calls) == 17


def test_less_may_be_better() -> None:
    model = make()
    near_it = near(model)
    found = sensitivity(model, lambda given: -near_it(given), higher_is_better=False)
    assert all(case.drop > 0 for case in found.cases)
    assert drops(found) == drops(sensitivity(model, near_it))


def test_include_and_exclude() -> None:
    model = make()
    found = sensitivity(model, near(model), include=["attn*", "head"], exclude=["head"])
    assert [case.layer for case in found.cases] == WEIGHTS[1:3]
    assert {each.layer: each.reason for each in found.left}["head"] == "excluded by 'head'"


def zero(model: nn.Module) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "4:2"}, "unknown sparsity pattern"),
        ({"pattern": "7:16"}, "no layer of the model can be pruned"),
        ({"criterion": "luck"}, "unknown pruning criterion 'luck'"),
        ({"exclude": ["nothing"]}, "'nothing' matches no"),
        ({"scorer": 1}, "sensitivity has no option 'scorer'"),
        ({"cache": "c"}, "a cache needs a key"),
        ({"cache": "no/such/c", "key": "k"}, "cannot write the cache"),
    ],
)
def test_what_cannot_be_scanned_is_refused_before_any_score(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sensitivity(make(), lambda model: pytest.fail("no score"), **options)  # type: ignore[arg-type]


def test_a_pruned_model_is_refused() -> None:
    model = make()
    Sparsifier(model, include=["conv"]).prune()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="the model is pruned already"):
        sensitivity(model, zero)
    assert list(before) == list(model.state_dict())


def test_a_score_that_cannot_be_sent_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be sent to other processes"):
        sensitivity(make(), lambda model: 0.0, jobs=2)


def test_a_model_of_nothing_that_can_be_pruned() -> None:
    with pytest.raises(InputError, match="no layer of the model can be pruned"):
        sensitivity(nn.Sequential(nn.ReLU()), zero)
