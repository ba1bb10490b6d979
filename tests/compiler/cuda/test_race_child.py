"""The child of a race: operands that are large enough, random, two of four 0, and freed."""

from __future__ import annotations

import functools
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.compiler.cuda.test_libraries import Clock
from tests.runtime.cuda.test_libraries import Fake, built, compiled
from twofour.compiler.cuda import race_child
from twofour.core.cuda_products import Product
from twofour.core.errors import UnsupportedError
from twofour.runtime.cuda import cublaslt, cusparselt
from twofour.runtime.cuda.libraries import CUBLASLT, CUSPARSELT

__all__ = ["built"]
INT8 = Product(m=32, n=64, k=128, x="int8", y="int8", x_row=128, y_row=64)


class Memory(Clock):
    """Memory whose every copy and fill has to lie inside; 50 us pass between two events."""

    def __init__(self) -> None:
        super().__init__()
        self.next = 4096
        self.broken = False

    def take(self, size_bytes: int, what: str = "memory") -> int:
        at, self.next = self.next, self.next + 4096 + -(-size_bytes // 4096) * 4096
        self.held[at] = size_bytes
        return at

    def give_back(self, address: int) -> None:
        del self.held[address]

    def to_gpu(self, to: int, array: np.ndarray[Any, Any], stream: int) -> None:
        begin = max(at for at in self.held if at <= to)
        assert to + array.nbytes <= begin + self.held[begin]

    def event(self) -> int:
        return 1

    def record(self, event: int, stream: int) -> None:
        assert (event, stream) == (1, 9)

    def elapsed_us(self, begin: int, end: int) -> float:
        return 50.0

    def fill(self, at: int, value: int, size_bytes: int, stream: int) -> None:
        assert size_bytes <= self.held[at]

    def wait(self, stream: int) -> None:
        if self.broken:
            raise UnsupportedError("an illegal instruction was encountered")


@pytest.fixture
def fake(built: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake(built)
    for module, wanted in ((cublaslt, CUBLASLT), (cusparselt, CUSPARSELT)):
        way = functools.partial(module.prepare, get=made.get(wanted))
        monkeypatch.setattr(module, "prepare", way)
    return made


@compiled
@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16", "float8e4m3fn"])
def test_operands_fit_one_product_after_the_other(fake: Fake, dtype: str) -> None:
    memory: Any = Memory()
    child = race_child.Child(memory)
    product = replace(INT8, x=dtype, y=dtype, bias="float32" if dtype == "int8" else "bfloat16")
    for k in (128, 2048, 64):
        for m in (32, 4096):
            wanted = replace(product, m=m, k=k, x_row=k)
            assert child.us(wanted, "cusparselt", 5) == 10.0
            assert child.us(wanted, "cublaslt", 5) == 10.0
    assert len(memory.held) <= 10  # what grew was freed


def test_operands_are_random_and_two_of_four_are_zero() -> None:
    memory: Any = Memory()
    child = race_child.Child(memory)
    values = child._random("float32").view(np.float32).reshape(-1, 4)
    assert ((values == 0).sum(axis=1) == 2).all()
    assert np.unique(values).size > 1000
    assert np.unique(child._random("int8").view(np.int8)).size > 200


@compiled
def test_requests_are_answered_until_the_context_breaks(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = Memory()
    monkeypatch.setattr(race_child, "open_device", lambda which: memory)
    settings = [INT8.to_json(), replace(INT8, n=20).to_json(), INT8.to_json()]
    request = json.dumps({"library": "cusparselt", "settings": settings, "runs": 2})
    monkeypatch.setattr("sys.stdin", io.StringIO(request + "\n"))
    race_child.main("GPU-1")
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each.get("us") for each in answers] == [25.0, None, 25.0]
    assert "n is 20; expected a multiple of 32" in answers[1]["error"]

    monkeypatch.setattr("sys.stdin", io.StringIO(request + "\n"))
    memory.broken = True
    with pytest.raises(UnsupportedError, match="illegal instruction"):
        race_child.main("GPU-1")
    assert capsys.readouterr().out == ""
