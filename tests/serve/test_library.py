"""A repository as the fleet sees it: builds in nobody's way, and what went away meanwhile."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path

import pytest

from tests.serve.repository.sites import engine_bytes
from twofour.core.errors import EngineError, Error, InputError
from twofour.serve import library as libraries
from twofour.serve.library import Library
from twofour.serve.repository.config import ModelConfig
from twofour.serve.repository.opening import Opened
from twofour.serve.repository.rebuild import Builds
from twofour.serve.repository.store import Store

CONFIG = ModelConfig()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for place in ("ready/1/a.engine", "late/1/a.onnx", "late/2/a.onnx"):
        path = tmp_path / "repository" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(engine_bytes() if path.suffix == ".engine" else b"x")
    return tmp_path / "repository"


@pytest.fixture
def library(root: Path, tmp_path: Path) -> Library:
    return Library(Store(str(root), tmp_path / "cache"), Builds(tmp_path / "cache"))


def test_builds_wait_for_each_other_and_nothing_waits_for_them(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, opened, building = threading.Event(), libraries.open_engine, []

    def slow(store: Store, version: object, *rest: object) -> Opened:
        if version.model == "ready":  # type: ignore[attr-defined]
            return opened(store, version, *rest)  # type: ignore[arg-type]
        building.append(version)
        assert release.wait(60)
        raise EngineError("built nothing")

    async def main() -> None:
        monkeypatch.setattr(libraries, "open_engine", slow)
        await library.entries()
        late = [asyncio.ensure_future(library.load("late", n, CONFIG)) for n in (1, 2)]
        while not building:
            await asyncio.sleep(0.01)
        assert (await library.load("ready", 1, CONFIG)).engine
        assert "ready" in await library.entries()
        assert len(building) == 1
        release.set()
        assert all(
            isinstance(e, Error) for e in await asyncio.gather(*late, return_exceptions=True)
        )
        assert len(building) == 2

    asyncio.run(asyncio.wait_for(main(), 60))
    library.close()


def test_a_version_that_went_is_an_error(library: Library, root: Path) -> None:
    async def main() -> None:
        await library.entries()
        (root / "ready" / "1" / "a.engine").unlink()
        (root / "ready" / "1").rmdir()
        await library.entries()
        with pytest.raises(InputError, match="not in the repository any more"):
            await library.load("ready", 1, CONFIG)

    asyncio.run(main())
    library.close()


def test_what_changed_is_logged(
    library: Library, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        await library.entries()
        caplog.clear()
        (root / "late" / "2" / "a.onnx").unlink()
        (root / "late" / "config.yaml").write_text("load: first\n")
        await library.entries()

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    library.close()
    assert [record.getMessage() for record in caplog.records] == [
        "repository: model late changed",
        "repository: model late, version 2, changed",
    ]


def test_reasons_do_not_name_folders_of_this_machine(library: Library, root: Path) -> None:
    engine = root / "ready" / "1" / "a.engine"
    engine.write_bytes(engine.read_bytes()[:500])

    async def main() -> None:
        await library.entries()
        with pytest.raises(EngineError, match=r"a\.engine") as caught:
            await library.load("ready", 1, CONFIG)
        assert str(root.parent) not in str(caught.value)

    asyncio.run(asyncio.wait_for(main(), 60))
    library.close()
