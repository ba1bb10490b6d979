"""Kernels are compiled once in a process, and a bounded number of them is kept."""

from __future__ import annotations

import pytest

from twofour.compiler.cuda import compiling
from twofour.kernels.cuda.kernel import Compiled, NvidiaSource


def source(number: int) -> NvidiaSource:
    return NvidiaSource(f"// {number}", f"k{number}", (("x", "float32"),), (1, 1, 1), 32)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Symbols in the order in which they are compiled; three are kept."""
    symbols: list[str] = []

    def compile_source(kernel: NvidiaSource, capability: int) -> Compiled:
        symbols.append(kernel.symbol)
        return Compiled(kernel.text.encode(), kernel.symbol, 32, 0)

    monkeypatch.setattr(compiling, "compile_source", compile_source)
    monkeypatch.setattr(compiling, "_known", {})
    monkeypatch.setattr(compiling, "_MOST_KNOWN", 3)
    return symbols


def codes(*numbers: int) -> list[str]:
    found = compiling.compile_all([source(number) for number in numbers], 90)
    assert all(isinstance(each, Compiled) for each in found)
    return [each.symbol for each in found if isinstance(each, Compiled)]


def test_known_kernels_are_not_compiled_again(made: list[str]) -> None:
    assert codes(1, 2, 1) == ["k1", "k2", "k1"]
    assert codes(2, 3) == ["k2", "k3"]
    assert made == ["k1", "k2", "k3"]


def test_the_oldest_are_forgotten_but_all_that_was_asked_for_is_there(made: list[str]) -> None:
    codes(1, 2, 3)
    assert codes(1, 4) == ["k1", "k4"]
    assert codes(4, 1) == ["k4", "k1"]
    assert made == ["k1", "k2", "k3", "k4", "k1"]
    for first in range(10, 20, 2):
        assert codes(first, first + 1) == [f"k{first}", f"k{first + 1}"]
    assert len(compiling._known) == 3
