"""When requests are due: the right number of them, the same each time, as a trace says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofour.bench.load.schedule import Arrivals, read_trace
from twofour.core.errors import InputError


@given(rate=st.floats(10, 2000), seed=st.integers(0, 1 << 30))
def test_poisson_arrivals_have_their_rate(rate: float, seed: int) -> None:
    """Counts of a Poisson process have its mean as variance: 6 deviations are never exceeded."""
    seconds = 4000 / rate
    due = Arrivals(rate, "poisson", seed).between(0.0, seconds)
    assert abs(len(due) - 4000) < 6 * 4000**0.5
    assert (np.diff(due) >= 0).all()
    assert due[-1] < seconds * 1e9


def test_poisson_gaps_are_exponential() -> None:
    """Their standard deviation is their mean, and 1 - 1/e of them are shorter."""
    gaps = np.diff(Arrivals(1000.0, "poisson", 3).between(0.0, 40.0)) / 1e9
    assert gaps.mean() == pytest.approx(1e-3, rel=0.03)
    assert gaps.std() == pytest.approx(1e-3, rel=0.05)
    assert (gaps < 1e-3).mean() == pytest.approx(1 - np.exp(-1), abs=0.01)


def test_a_seed_gives_the_same_times_and_another_gives_others() -> None:
    one, same, other = (Arrivals(100.0, "poisson", seed) for seed in (1, 1, 2))
    assert np.array_equal(one.between(0, 1), same.between(0, 1))
    assert not np.array_equal(one.between(0, 1)[:50], other.between(0, 1)[:50])
    assert not np.array_equal(one.between(0, 1)[:50], one.between(1, 2)[:50])


@given(rate=st.floats(0.5, 1e4), seconds=st.floats(0.01, 10))
def test_constant_arrivals_are_even(rate: float, seconds: float) -> None:
    due = Arrivals(rate, "constant").between(0.0, seconds)
    assert abs(len(due) - rate * seconds) <= 1
    assert (np.abs(np.diff(due) - 1e9 / rate) <= 1).all()


def test_a_trace_comes_as_it_came(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("seconds,rows\n10.0,1\n10.5,2\n10.5,1\n12.0,3\n\n")
    trace = read_trace(path)
    assert trace.rate == 2.0
    assert (trace.between(0.0, 1.0) / 1e9).tolist() == [0.0, 0.5, 0.5]
    assert (trace.between(1.0, 3.0) / 1e9).tolist() == [1.0]


@pytest.mark.parametrize("text", ["", "1.0\n", "2\n1\n", "1\nx\n", "1\n1\n", "nan\n1\n"])
def test_what_is_no_trace_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(InputError, match="is no trace"):
        read_trace(path)
    with pytest.raises(InputError, match="cannot read"):
        read_trace(tmp_path / "none.csv")
