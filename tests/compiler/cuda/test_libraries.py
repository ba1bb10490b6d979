"""Recipes by libraries: algorithms raced, weights compressed, by libraries that write it down."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.cuda.test_products import FP8, QUANTIZED, arrays_of, called, problem_of
from tests.runtime.cuda.test_libraries import Fake, Gpu, built, compiled
from twofour.compiler.cuda import libraries as compiler_libraries
from twofour.compiler.cuda.libraries import left_out, library_recipes, missing
from twofour.compiler.cuda.race import Result
from twofour.core.cuda_products import CUSPARSELT as CUSPARSELT_NAME
from twofour.core.cuda_products import Product, read_product
from twofour.core.errors import UnsupportedError
from twofour.kernels.cuda.problem import Finish
from twofour.runtime.cuda import cublaslt, cusparselt, libraries, prepared
from twofour.runtime.cuda.device import Device
from twofour.runtime.cuda.libraries import CUBLASLT, CUSPARSELT

__all__ = ["built"]


class Clock(Gpu):
    """A GPU on which each algorithm takes shorter than the one before; the streams are 9."""

    capability = 90

    class gpu:
        index = 0
        uuid = "GPU-1"

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def stream(self) -> int:
        return 9

    def drop_stream(self, stream: int) -> None:
        assert stream == 9


class Racer:
    """Each algorithm takes shorter than the one before; those of cuSPARSELt in `broken` break."""

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.asked = 0
        self.last: list[Product] = []

    def race(self, products: list[Product], library: str, runs: int) -> list[Result]:
        self.asked += 1
        self.last = products
        times = [100.0 - place for place in range(len(products))]
        found = [
            Result(each, math.inf if each.algorithm in self.broken else us, "")
            for each, us in zip(products, times, strict=True)
        ]
        return sorted(found, key=lambda result: result.us)


@pytest.fixture
def racer(monkeypatch: pytest.MonkeyPatch) -> Racer:
    made = Racer()
    monkeypatch.setattr(compiler_libraries, "racer", lambda uuid: made)
    return made


@pytest.fixture
def fake(built: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake(built)
    dense, sparse = made.get(CUBLASLT), made.get(CUSPARSELT)
    for module in (cublaslt, libraries):
        monkeypatch.setattr(module, "cublaslt", dense)
    for module in (cusparselt, libraries):
        monkeypatch.setattr(module, "cusparselt", sparse)
    ways = {
        "cublaslt": lambda settings, capability, _: cublaslt.prepare(
            settings, capability, 0, dense
        ),
        "cusparselt": lambda settings, capability, _: cusparselt.prepare(
            settings, capability, 0, sparse
        ),
    }
    for name, way in ways.items():
        monkeypatch.setitem(prepared.LIBRARIES, name, way)
    return made


def made(gpu: Clock, dtype: str = "int8", effort: int = 2, finish: Finish = QUANTIZED) -> Any:
    problem = problem_of(dtype, dtype, finish)
    device: Device = gpu  # type: ignore[assignment]
    return library_recipes(problem, arrays_of(problem), device, effort=effort)


@compiled
def test_the_fastest_algorithms_become_recipes(fake: Fake, racer: Racer) -> None:
    gpu = Clock()
    recipes = made(gpu)
    assert {recipe.tactic for recipe in recipes} == {"cublaslt", "2:4 cusparselt"}
    names = [
        read_product(called(each).settings, called(each).library).algorithm
        for each in recipes
        if each.tactic == "2:4 cusparselt"
    ]
    assert names == ["4", "3"]  # each was faster than the one before
    assert set(gpu.held.values()) == {0}
    assert len(fake.lines("cusparseLtSpMMACompress2")) == 1  # for all of them


@compiled
def test_where_plans_take_long_small_products_are_left_to_others(
    fake: Fake, racer: Racer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {recipe.tactic for recipe in made(Clock(), "float16")} == {"cublaslt"}
    problem = problem_of("float16", "float16", QUANTIZED)
    assert "--tuning-effort 3 tries it" in left_out(problem, 2)
    assert left_out(problem, 3) == left_out(replace(problem, height=1 << 24), 2) == ""
    monkeypatch.setattr(compiler_libraries, "_WORTH_MACS", 0)
    recipes = made(Clock(), "float16", finish=Finish(scaled=False))
    assert {recipe.tactic for recipe in recipes} == {"cublaslt", "2:4 cusparselt"}
    (sparse, *_) = [each for each in recipes if each.tactic == "2:4 cusparselt"]
    product = read_product(called(sparse).settings, CUSPARSELT_NAME)
    assert (product.bias, racer.last[0].bias) == ("float16", "")  # raced without, taken with it


@compiled
def test_a_recipe_has_all_that_its_calls_name(fake: Fake, racer: Racer) -> None:
    for recipe in made(Clock()):
        call = called(recipe)
        product = read_product(call.settings, call.library)
        assert len(call.roles) == len(product.roles)
        assert product.version in (130102, 800)
        there = {"x", "y", "r", *recipe.constants, *recipe.scratch}
        assert set(call.roles) <= there
        if product.workspace_bytes:
            assert recipe.scratch["workspace"] == product.workspace_bytes
        packed = call.library == "cusparselt"
        assert recipe.constants["w"].nbytes == (2304 if packed else 32 * 64)
        assert "algorithm" in recipe.config


@compiled
def test_without_effort_the_library_chooses(fake: Fake, racer: Racer) -> None:
    gpu = Clock()
    recipes = made(gpu, FP8, effort=0)
    assert not racer.asked
    configs = [recipe.config for recipe in recipes]
    assert len(configs) == len(set(configs))


@compiled
def test_an_algorithm_that_cannot_run_is_left_out(fake: Fake, racer: Racer) -> None:
    racer.broken = {"4", "3", "2", "1", "0"}
    assert {recipe.tactic for recipe in made(Clock())} == {"cublaslt"}
    racer.broken = {"4", "2"}
    sparse = [each for each in made(Clock()) if each.tactic == "2:4 cusparselt"]
    assert [read_product(called(each).settings, CUSPARSELT_NAME).algorithm for each in sparse] == [
        "3",
        "1",
    ]


def test_what_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Any:
        raise UnsupportedError("cuSPARSELt cannot be loaded", [], "pip install it")

    monkeypatch.setattr(libraries, "cublaslt", absent)
    monkeypatch.setattr(libraries, "cusparselt", absent)
    assert set(missing()) == {"cublaslt", "cusparselt"}
    assert "pip install it" in missing()["cublaslt"]
    assert made(Clock()) == ()
