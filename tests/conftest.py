"""What tests of all parts share: golden files, and the folder of real data sets."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.draws import Draws
from twofour.compiler import build as building

TESTS = Path(__file__).parent
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Of a shell's background job; what tests start would ignore Ctrl-C too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden from what is computed now"
    )
    parser.addoption(
        "--fuzz-seconds", type=float, default=0, help="for how long; by default about a minute"
    )
    parser.addoption("--fuzz-seed", type=int, default=0, help="the first one")


settings.register_profile("same", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
DRAWS = pytest.StashKey[Draws]()


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[DRAWS] = Draws()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[DRAWS].begin_test()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    if fixturedef.scope == "function":
        return (yield)
    with request.config.stash[DRAWS].of_fixture(f"{fixturedef.baseid} {fixturedef.argname}"):
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def no_race() -> Iterator[None]:
    """Builds take kernels, however fast ONNX Runtime is: `test_whole_race.py` is about that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "faster", lambda engine, whole, cache: engine)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_terminal() -> Iterator[None]:
    """Commands print as into a file, whatever width a runner of tests gives its workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        patch.delenv("LINES", raising=False)
        yield


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with tests/golden/NAME.txt; with --update-golden writes it instead."""

    def compare(name: str, text: str) -> None:
        path = TESTS / "golden" / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), (
            f"{path} is missing; run pytest --update-golden and read what it wrote"
        )
        assert text == path.read_text(encoding="utf-8"), f"differs from {path}"

    return compare


@pytest.fixture(scope="session")
def data_folder_or_none() -> Path | None:
    """The folder with real data sets, where it is."""
    folder = Path(os.environ.get("TWOFOUR_DATA", TESTS.parent.parent / "shared" / "data"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def data_folder(data_folder_or_none: Path | None) -> Path:
    """The folder with real data sets; where it is absent, the test is skipped and says so."""
    if data_folder_or_none is None:
        pytest.skip("no data folder: set TWOFOUR_DATA to run this test")
    return data_folder_or_none
