"""The digits network learns real scans, and pruning it leaves the dense one alone."""

import dataclasses

import numpy as np
import pytest
import torch

from twofour.train import Schedule, digits, evaluate


@pytest.fixture
def few(monkeypatch):
    """A quarter of the scans and short schedules."""
    monkeypatch.setattr(digits, "TRAINING", Schedule(epochs=8, lr=0.1))
    monkeypatch.setattr(digits, "RECOVERY", Schedule(epochs=2, lr=0.02))
    scans = digits.load_digits()
    return dataclasses.replace(scans, train_x=scans.train_x[:320], train_y=scans.train_y[:320])


def test_split_is_fixed_and_disjoint():
    a, b = digits.load_digits(), digits.load_digits()
    assert a.train_x.shape == (1297, 1, 8, 8)
    assert a.test_x.shape == (500, 1, 8, 8)
    assert a.calibration_x.shape == (256, 1, 8, 8)
    assert a.train_x.dtype == np.float32
    assert (a.train_x.min(), a.train_x.max()) == (0, 1)
    np.testing.assert_array_equal(a.test_x, b.test_x)
    train = {scan.tobytes() for scan in a.train_x}
    assert not train & {scan.tobytes() for scan in a.test_x}
    assert np.bincount(a.test_y, minlength=10).min() > 30


def test_an_epoch_holds_each_scan_once_moved_by_at_most_a_pixel():
    scans = digits.load_digits()
    epoch = list(digits.ShiftedEpoch(scans, 3))
    assert len(epoch) == len(digits.ShiftedEpoch(scans, 3)) == 1297 // 64
    x = torch.cat([x for x, _ in epoch])
    shifted = {}
    for index, scan in enumerate(np.pad(scans.train_x[:, 0], ((0, 0), (1, 1), (1, 1)))):
        for row in range(3):
            for column in range(3):
                key = np.ascontiguousarray(scan[row : row + 8, column : column + 8]).tobytes()
                shifted[key] = index
    found = [shifted[scan.numpy().tobytes()] for scan in x[:, 0].contiguous()]
    assert len(set(found)) == len(found)
    np.testing.assert_array_equal(torch.cat([y for _, y in epoch]), scans.train_y[found])
    other = torch.cat([x for x, _ in digits.ShiftedEpoch(scans, 4)])
    assert not torch.equal(x, other)


def test_trains_and_prunes(few):
    model = digits.train_digits(few, seed=1)
    x, y = torch.from_numpy(few.test_x), torch.from_numpy(few.test_y)
    assert evaluate(model, x, y) > 0.7
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparse, sparsifier = digits.finetune_digits(model, few, "2:4/pair")
    sparsifier.verify()
    assert {r.name for r in sparsifier.report() if not r.pruned} == {"conv1", "linear"}
    assert evaluate(sparse, x, y) > 0.5
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
