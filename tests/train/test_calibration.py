"""Batches in all the forms that people have them, and a model that is left as it was."""

from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from twofour.core.errors import InputError
from twofour.train.batches import forward
from twofour.train.calibration import (
    as_it_was,
    bare,
    batches_of,
    count_of,
    require_repeatable,
)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, x, shift=0.0):
        return self.weight * x + shift


class Stream(IterableDataset):
    def __len__(self):
        raise TypeError("no length")

    def __iter__(self):
        return iter([torch.ones(1)])


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2),
        (torch.ones(2), torch.tensor([0, 1])),
        [torch.ones(2), "name"],
        {"x": torch.ones(2), "shift": 0.0},
        ({"x": torch.ones(2)}, torch.tensor(0)),
    ],
)
def test_each_kind_of_batch_runs(batch):
    assert torch.equal(forward(Scaled(), batch), torch.full((2,), 3.0))


def test_batches_come_from_lists_loaders_functions_and_generators():
    data = [torch.zeros(1), torch.ones(1)]
    loader = DataLoader(data, batch_size=None)
    for batches in (data, loader, lambda: iter(data), (x for x in data)):
        assert [float(x) for x in batches_of(batches, Scaled(), "Wanda")] == [0.0, 1.0]
    for batches in (data, loader, lambda: iter(data)):
        require_repeatable(batches, "SparseGPT")
    assert [count_of(b) for b in (data, loader, lambda: data, iter(data))] == [2, 2, None, None]
    assert count_of(DataLoader(Stream(), batch_size=None)) is None


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, "Wanda needs calibration data"),
        ([], "Wanda got no batches"),
        (lambda: iter(()), "Wanda got no batches"),
        (torch.ones(2, 3), r"got a Tensor\n  fix: put a single batch in a list: \[batch\]"),
        ({"x": torch.ones(2)}, "got a dict"),
        (3, "got a int"),
    ],
)
def test_batches_that_are_none(batches, message):
    with pytest.raises(InputError, match=message):
        list(batches_of(batches, Scaled(), "Wanda"))


def test_an_iterator_cannot_be_run_through_twice():
    with pytest.raises(InputError, match="got a generator, which can be run through only once"):
        require_repeatable((x for x in [1]), "SparseGPT")
    once = iter([1])
    assert list(batches_of(lambda: once, Scaled(), "SparseGPT")) == [1]
    with pytest.raises(InputError, match="an iterator that was run through before is empty too"):
        list(batches_of(lambda: once, Scaled(), "SparseGPT"))


def test_modes_and_randomness_come_back_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2), nn.Linear(2, 2)).train()
    model[1].eval()
    state = torch.random.get_rng_state()

    def used_wrongly():
        with as_it_was(model):
            assert not any(module.training for module in model.modules())
            assert not torch.backends.mha.get_fastpath_enabled()
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        used_wrongly()
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()


def test_wrappers_are_taken_off():
    model = Scaled()
    assert bare(nn.DataParallel(torch.compile(model))) is model
    assert bare(model) is model


class Encoding(UserDict):
    """As tokenizers give them: moved in place, and read by attributes."""

    def to(self, device):
        self.data = {name: value.to(device) for name, value in self.data.items()}
        return self


Pair = namedtuple("Pair", "x labels")


def test_batches_get_to_the_device_of_the_model_and_keep_their_type():
    x = torch.ones(3, 2)
    packed = nn.utils.rnn.pack_sequence([x])
    given = [x, (x, 0), [x], {"x": x}, Pair(x, 0), Encoding(x=x), packed]
    moved = list(batches_of(given, Scaled().to("meta"), "Wanda"))
    assert [type(batch) for batch in moved] == [type(batch) for batch in given]
    firsts = [moved[0], moved[1][0], moved[2][0], moved[3]["x"], moved[4].x, moved[5]["x"]]
    assert all(value.is_meta for value in [*firsts, moved[6].data])
    assert not given[5]["x"].is_meta, "the user's own batch stays where it was"
