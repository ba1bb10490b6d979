"""Races in a child process: one that breaks, hangs or does not start harms nobody else."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest

from twofour.compiler.cuda.race import Racer
from twofour.core.cuda_products import Product

PLAIN = Product(m=16, n=32, k=64, x="int8", y="int8", x_row=64, y_row=32, version=800)
CHILD = """
import json, sys, time
print(sys.argv[1], file=sys.stderr)
for line in sys.stdin:
    request = json.loads(line)
    for settings in request["settings"]:
        number = int(json.loads(settings)["algorithm"])
        if number == 13:
            sys.exit(3)
        if number == 14:
            time.sleep(60)
        told = {"error": "refused"} if number == 12 else {"us": 100 - number}
        print(json.dumps(told), flush=True)
"""


def racer(text: str = CHILD, seconds: float = 20.0) -> Racer:
    return Racer("GPU-1", (sys.executable, "-c", text), seconds)


def raced(made: Racer, numbers: list[int]) -> dict[str, tuple[float, str]]:
    products = [replace(PLAIN, algorithm=str(number)) for number in numbers]
    results = made.race(products, "cusparselt", 5)
    times = [result.us for result in results]
    assert times == sorted(times)
    assert sorted(result.product.algorithm for result in results) == sorted(map(str, numbers))
    return {result.product.algorithm: (result.us, result.error) for result in results}


def test_all_are_timed_by_one_child() -> None:
    made = racer()
    try:
        assert raced(made, [1, 2, 12]) == {
            "1": (99.0, ""),
            "2": (98.0, ""),
            "12": (math.inf, "refused"),
        }
        first = made._process
        raced(made, [3, 4])
        assert made._process is first
    finally:
        made.close()
    assert first is not None
    assert first.returncode is not None


def test_behind_one_that_breaks_it_goes_on() -> None:
    made = racer()
    try:
        found = raced(made, [1, 13, 2])
        assert found["1"][0] == 99.0
        assert found["2"][0] == 98.0
        assert found["13"] == (math.inf, "it breaks the GPU's context, or does not end")
        first = made._process
        again = raced(made, [13, 4])
        assert "broke the GPU's context before" in again["13"][1]
        assert (again["4"][0], made._process) == (96.0, first)  # it was not tried again
    finally:
        made.close()


def test_after_some_that_broke_none_is_tried_that_is_not_known() -> None:
    made = racer(CHILD.replace("number == 13", "13 <= number < 30").replace("number == 14", "0"))
    try:
        found = raced(made, [1, *range(13, 19), 30])
        assert found["1"][0] == 99.0
        assert found["30"][0] == math.inf
        assert "too many others" in found["30"][1]
        assert raced(made, [1, 30])["1"][0] == 99.0
    finally:
        made.close()


def test_what_did_no_harm_before_may_break_some_times_and_then_none_is_tried() -> None:
    """Those known from another product are tried again, but not for ever."""
    made = racer(CHILD.replace("number == 13", "number < 0"))
    try:
        assert raced(made, [1, 2, 3, 4, 5, 6])["6"][0] == 94.0
        made.close()
        made.command = racer(CHILD.replace("number == 13", "number < 7")).command
        found = raced(made, [1, 2, 3, 4, 5, 6])
        broke = [error for _, error in found.values() if "breaks the GPU's context" in error]
        assert len(broke) == 4
        assert "too many others" in found["5"][1]
        assert "too many others" in raced(made, [8])["8"][1]
    finally:
        made.close()


def test_one_that_does_not_end_is_ended() -> None:
    made = racer(seconds=3.0)
    try:
        found = raced(made, [1, 14])
        assert found["14"][0] == math.inf
    finally:
        made.close()


@pytest.mark.parametrize("text", ["import sys; sys.exit(1)", "raise SystemError"])
def test_a_child_that_does_not_start_gives_no_times(text: str) -> None:
    made = racer(text)
    found = raced(made, list(range(10)))
    assert {us for us, _ in found.values()} == {math.inf}
    assert "too many others" in found["9"][1]
