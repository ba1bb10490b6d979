"""The soak, for some seconds: nothing is wrong and nothing is lost while versions come and go."""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module("serve_soak")


@pytest.mark.slow
def test_for_some_seconds(soak: ModuleType, tmp_path: Path) -> None:
    engines = {"1": soak.network(1), "2": soak.network(2)}
    repository = soak.Repository(tmp_path / "models", engines)
    with soak.server(repository.folder, tmp_path / "log") as (process, http, grpc):
        clients = soak.Soak(soak.Truth(engines), repository, http, grpc)
        found = asyncio.run(clients.run(process.pid, 10.0, swaps=5, clients=2))
    assert found.wrong == 0
    assert not found.lost
    assert found.accepted == 0
    assert found.refused > 0
    assert found.hung_up > 0
    assert len(found.swaps) == 5
    assert len(found.answers) >= 5, "new versions answered"
    assert sum(found.answers.values()) > 200


def test_what_is_a_problem(soak: ModuleType) -> None:
    good = {
        "wrong": 0,
        "lost": {},
        "malformed_accepted": 0,
        "versions": 21,
        "swaps": 20,
        "memory_growth": 0.01,
        "p99_ms_within_a_second_of_a_swap": 11.0,
        "p99_ms_else": 10.0,
    }
    assert soak.problems(good) == []
    for change in (
        {"wrong": 1},
        {"lost": {"hung up": 1}},
        {"malformed_accepted": 1},
        {"versions": 20},
        {"memory_growth": 0.03},
        {"p99_ms_within_a_second_of_a_swap": 21.0},
    ):
        assert len(soak.problems(good | change)) == 1, change
