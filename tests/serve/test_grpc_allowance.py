"""What a client may do for nothing: so much at once, and so much a second without end."""

from __future__ import annotations

import pytest

from twofour.serve.grpc.allowance import Allowance
from twofour.serve.grpc.frames import ConnectionFault


def test_at_the_rate_that_comes_back_it_never_ends() -> None:
    allowance = Allowance("calls", 10, 20.0)
    for turn in range(1000):
        allowance.spend(5.0 + turn / 20)


def test_slower_than_that_from_time_to_time_too() -> None:
    allowance = Allowance("calls", 10, 20.0)
    for turn in range(100):
        for _ in range(10):
            allowance.spend(1000.0 + turn)


def test_faster_it_ends() -> None:
    allowance = Allowance("calls", 10, 20.0)
    for turn in range(19):  # 10 at first, and one comes back for every two
        allowance.spend(5.0 + turn / 40)
    allowance.spend(5.5)
    with pytest.raises(ConnectionFault, match="too many calls"):
        allowance.spend(5.5)


def test_what_is_earned_is_never_more_than_the_most() -> None:
    allowance = Allowance("calls", 3, 0.0)
    allowance.earn(100)
    for _ in range(3):
        allowance.spend(1.0)
    with pytest.raises(ConnectionFault):
        allowance.spend(1.0)
    allowance.earn(2)
    allowance.spend(1.0)
