"""Operators that exist for one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from twofour.core import plugins
from twofour.core.plugins import Installed, Operator
from twofour.onnx_tools import plugins as files

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install(operator, ...): as if a package `its-package` had them, and no other were there."""

    def forget() -> None:
        files._operator.cache_clear()

    def put(*operators: Operator, package: str = "its-package") -> None:
        found = {(o.domain, o.name): o for o in operators}
        there = Installed(found, dict.fromkeys(found, package), ())
        monkeypatch.setattr(plugins, "installed", lambda: there)
        forget()

    yield put
    monkeypatch.undo()
    forget()
