"""From samples to the inputs of a run: batches, whole inputs, numbers, and what does not fit."""

import numpy as np
import pytest

from twofour.core.data import as_data
from twofour.core.errors import InputError
from twofour.core.feeds import Form, runs

F32 = "float32"


def fed(forms, most=64, limit=None, **arrays):
    """The feeds of every run."""
    data = as_data(arrays, [form.name for form in forms])
    return [run.feeds for run in runs(data, forms, most, limit)]


def floats(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def refused(*parts):
    return pytest.raises(InputError, match="(?s)" + ".*".join(parts))


def test_samples_lie_along_an_open_batch_axis():
    x = floats(5, 3)
    got = fed([Form("x", F32, ("n", 3))], most=2, x=x)
    assert [len(feeds["x"]) for feeds in got] == [2, 2, 1]
    assert np.array_equal(np.concatenate([feeds["x"] for feeds in got]), x)


def test_a_fixed_batch_is_filled_up():
    x = floats(6, 3)
    first, last = fed([Form("x", F32, (4, 3))], x=x)
    assert np.array_equal(first["x"], x[:4])
    assert np.array_equal(last["x"], x[[4, 5, 4, 5]])


def test_one_axis_more_gives_whole_inputs():
    x, state = floats(3, 7), floats(3, 2, 1, 4)
    forms = [
        Form("x", F32, ("n", "length")),
        Form("state", F32, (2, "n", 4)),
        Form("rate", "int64", ()),
    ]
    for rate in (np.array([8, 8, 8]), np.array(8)):
        got = fed(forms, x=x, state=state, rate=rate)
        assert len(got) == 3
        for i, feeds in enumerate(got):
            assert np.array_equal(feeds["x"], x[i : i + 1])
            assert np.array_equal(feeds["state"], state[i])
            assert feeds["rate"].shape == ()
            assert feeds["rate"] == 8


def test_whole_inputs_keep_their_own_batch():
    x = floats(3, 4, 2)
    got = fed([Form("x", F32, (4, 2))], x=x)
    assert [feeds["x"].tolist() for feeds in got] == x.tolist()


def test_runs_know_their_samples_and_labels():
    arrays = {"x": floats(3, 1, 2), "labels": np.arange(3)}
    got = list(runs(as_data(arrays, ["x"]), [Form("x", F32, (1, 2))], 64, limit=2))
    assert [(run.batch.start, len(run.batch), run.batch.labels.tolist()) for run in got] == [
        (0, 1, [0]),
        (1, 1, [1]),
    ]


def test_an_input_of_unknown_rank_takes_batches():
    (feeds,) = fed([Form("x", "", None)], x=floats(2, 3, 4))
    assert feeds["x"].shape == (2, 3, 4)


def test_a_state_without_an_axis_for_the_samples_is_refused():
    forms = [Form("x", F32, (1, 4)), Form("state", F32, (2, 1, 3))]
    with refused(
        r"state: expected float32 \[samples, 2, 1, 3\], got float32 \[6, 1, 3\]", "axis in front"
    ):
        fed(forms, x=floats(6, 4), state=floats(6, 1, 3))
    with refused("do not match", "x 3, state 2", "axis in front"):
        fed(forms, x=floats(3, 4), state=floats(2, 1, 3))


def test_sizes_of_one_name_agree():
    forms = [Form("x", F32, ("n", 4)), Form("state", F32, (2, "n", 3))]
    with refused(r"n is 2 in x\[0\] of a run, 1 in state\[1\]", "axis in front"):
        fed(forms, x=floats(6, 4), state=floats(6, 1, 3))


def test_a_type_or_size_that_does_not_fit_is_refused():
    form = Form("ids", "int64", ("n", 4))
    with refused(r"ids: expected int64 \[n, 4\], got int32 \[2, 4\]"):
        fed([form], ids=np.zeros((2, 4), np.int32))
    with refused(r"ids: expected int64 \[n, 4\], got int64 \[2, 5\]"):
        fed([form], ids=np.zeros((2, 5), np.int64))


def test_numbers_alone_count_no_samples():
    with refused("do not match", "a scalar"):
        fed([Form("rate", "int64", ())], rate=np.array(3))


def test_a_file_with_a_number(tmp_path):
    np.savez(tmp_path / "d.npz", x=floats(3, 2), rate=np.int64(5))
    forms = [Form("x", F32, ("n", 2)), Form("rate", "int64", ())]
    data = as_data(tmp_path / "d.npz", ["x", "rate"])
    got = list(runs(data, forms, 2))
    assert [run.feeds["rate"].item() for run in got] == [5, 5, 5]
    assert [run.feeds["x"].shape for run in got] == [(1, 2)] * 3
