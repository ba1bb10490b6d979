"""Random numbers of tests: each test draws the same ones, whichever tests ran before it.

Many modules of tests share one generator among their tests. Tests run in an order of their own in
each run, on several workers, so what a test drew would depend on that; and a figure near its bound
would fail now and then. So each generator is put back to where it was after its module was
imported before each test; fixtures of more than one test draw numbers of their own.
"""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

TESTS = str(Path(__file__).parent)


class Draws:
    """The generators of all modules of tests, as they were after import."""

    def __init__(self) -> None:
        """Finds them."""
        found = {
            id(value): value
            for module in list(sys.modules.values())
            if _is_of_tests(module)
            for value in vars(module).values()
            if isinstance(value, np.random.Generator)
        }
        self._first = [(each, each.bit_generator.state) for each in found.values()]

    def begin_test(self) -> None:
        """Puts all generators back."""
        for generator, state in self._first:
            generator.bit_generator.state = state
        _seed_all(0)

    @contextmanager
    def of_fixture(self, name: str) -> Iterator[None]:
        """Draws of a fixture of several tests; those of the test that is about to begin stay."""
        before = [each.bit_generator.state for each, _ in self._first]
        seed = zlib.crc32(name.encode())
        for generator, _ in self._first:
            generator.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        _seed_all(seed)
        yield
        for (generator, _), state in zip(self._first, before, strict=True):
            generator.bit_generator.state = state
        _seed_all(0)


def _is_of_tests(module: ModuleType) -> bool:
    return (getattr(module, "__file__", None) or "").startswith(TESTS)


def _seed_all(seed: int) -> None:
    """The generators that libraries share among all who draw."""
    random.seed(seed)
    np.random.seed(seed)  # for those who use it
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(seed)
