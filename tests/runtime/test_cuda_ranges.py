"""Ranges for NVIDIA's profilers, by libraries that are made up."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from twofour.runtime.cuda import ranges
from twofour.runtime.cuda.ranges import named_range


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    ranges.ranges.cache_clear()
    yield
    ranges.ranges.cache_clear()


def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)


def test_the_package_is_told_begin_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    package = SimpleNamespace(push_range=told.append, pop_range=lambda: told.append("end"))
    monkeypatch.setattr(importlib, "import_module", lambda name: package)
    with named_range("outer"), named_range("inner"):
        told.append("work")
    assert told == ["outer", "inner", "work", "end", "end"]
    assert ranges.ranges().by == "nvtx"


def test_a_range_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    package = SimpleNamespace(push_range=told.append, pop_range=lambda: told.append("end"))
    monkeypatch.setattr(importlib, "import_module", lambda name: package)
    with pytest.raises(ValueError, match="broken"), named_range("layer"):
        raise ValueError("broken")
    assert told == ["layer", "end"]


def test_the_library_of_older_versions_takes_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    without_package(monkeypatch)
    told: list[Any] = []

    class Push:
        argtypes: tuple[Any, ...] = ()

        def __call__(self, name: bytes) -> int:
            told.append(name)
            return 0

    library = SimpleNamespace(nvtxRangePushA=Push(), nvtxRangePop=lambda: told.append("end"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    with named_range("größe"):
        pass
    assert told == ["größe".encode(), "end"]
    assert library.nvtxRangePushA.argtypes == (ctypes.c_char_p,)


def test_without_either_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    without_package(monkeypatch)

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert ranges.ranges() is None
    with named_range("layer"):
        pass
