"""Progress: how a long operation tells whoever started it how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Report(Protocol):
    """Called by a long operation after each piece of work."""

    def __call__(self, done: int, total: int | None, what: str) -> None:
        """`done` of `total` pieces (None: nobody knows), now at `what`."""


Stage = Callable[[str], AbstractContextManager[Report]]
"""Opens one named stage of a longer flow; it ends with the `with` block."""


def silent(done: int, total: int | None, what: str) -> None:
    """A `Report` that nobody listens to."""


@contextmanager
def unseen(name: str) -> Iterator[Report]:
    """A `Stage` that nobody watches."""
    yield silent
