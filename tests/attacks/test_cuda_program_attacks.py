"""Hostile programs of steps on a GPU: refused when the file is read, before any launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cuda_engines import KEPT, MIDDLE, SIZE, X, Y, cuda_engine, launch, sample_program
from twofour.core.cuda import Cuda
from twofour.core.cuda_program import CudaProgram, LibraryCall, Place, Transfer
from twofour.core.errors import EngineError
from twofour.core.target import Target
from twofour.engine import Engine, check

SAMPLE = sample_program()
FIRST = SAMPLE.launches[0]


def first(**change: Any) -> CudaProgram:
    return replace(SAMPLE, launches=(replace(FIRST, **change), SAMPLE.launches[1]))


def calling(**change: Any) -> CudaProgram:
    call = replace(LibraryCall("cublaslt", "{}", (X, KEPT, Y), 0), **change)
    return replace(SAMPLE, calls=(call,), order=(0, 1, -1))


def copying(*places: Place) -> CudaProgram:
    return replace(SAMPLE, inputs=tuple(Transfer("x", place) for place in places))


def test_the_sample_is_sound(tmp_path: Path) -> None:
    made = cuda_engine()
    loaded = Engine.load(made.save(tmp_path / "e.engine"))
    assert loaded.plan == made.plan
    assert CudaProgram.from_bytes(loaded.subgraphs["net"].tobytes()) == SAMPLE
    check(cuda_engine(calling()))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (first(places=(X, Place("arena", 700, SIZE))), "outside arena"),
        (first(places=(X, Place("arena", 1 << 70, SIZE))), "outside arena"),
        (first(places=(X, Place("arena", -256, SIZE))), "is no place"),
        (first(places=(X, Place("arena", 512, -SIZE))), "is no place"),
        (first(places=(X, Place("weights", 4, SIZE))), "outside weights"),
        (first(places=(X, Place("stack", 0, SIZE))), "is no place"),
        (first(grid=()), "cannot be started so"),
        (first(grid=(1, 1, 1, 1)), "cannot be started so"),
        (first(grid=(0, 1, 1)), "cannot be started so"),
        (first(grid=(1, 1 << 16, 1)), "has a grid of"),
        (first(grid=(1 << 31, 1, 1)), "has a grid of"),
        (first(threads=2048), "cannot be started so"),
        (first(shared_bytes=-1), "cannot be started so"),
        (first(shared_bytes=1 << 20), "bytes of shared memory"),
        (first(nulls=1 << 30), "null pointers"),
        (first(layer=2), "layer 2 of 2"),
        (first(layer=-1), "layer -1 of 2"),
        (first(code="other"), "which the plan does not name"),
        (calling(library="libc"), "expected one of cublaslt"),
        (calling(layer=7), "layer 7 of 2"),
        (calling(places=(Place("arena", 768, 1),)), "outside arena"),
        (replace(SAMPLE, order=(0, 0)), "names some twice"),
        (replace(SAMPLE, order=(0, 5)), "names some twice"),
        (replace(SAMPLE, order=()), "names some twice"),
        (replace(SAMPLE, inputs=()), "it copies"),
        (copying(X, Y), "it copies"),
        (copying(Place("arena", 0, SIZE - 4)), "256 bytes, 252 are copied"),
        (copying(Place("weights", 0, SIZE)), "is copied to weights"),
        (copying(Place("arena", 4, SIZE)), "is copied to arena at 4"),
        (copying(Place("arena", 768, SIZE)), "outside arena"),
    ],
)
def test_a_program_that_lies_is_refused(program: CudaProgram, message: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=message):
        Engine.load(cuda_engine(program).save(tmp_path / "e.engine"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"launches": 1}',
        SAMPLE.to_bytes()[:-1],
        SAMPLE.to_bytes().replace(b'"threads":32', b'"threads":"32"'),
        SAMPLE.to_bytes().replace(b'"threads":32', b'"threads":1e400'),
        SAMPLE.to_bytes().replace(b'"threads"', b'"thread"'),
    ],
)
def test_what_is_no_program_is_refused(content: bytes, tmp_path: Path) -> None:
    made = cuda_engine()
    made.subgraphs["net"] = np.frombuffer(content, np.uint8)
    with pytest.raises(EngineError, match="program 'net' is malformed"):
        check(made)


def of_target(**change: Any) -> Callable[[Engine], None]:
    def attack(engine: Engine) -> None:
        object.__setattr__(engine.plan, "target", Target(**(vars(engine.plan.target) | change)))

    return attack


def of_step(**change: Any) -> Callable[[Engine], None]:
    def attack(engine: Engine) -> None:
        (profile,) = engine.plan.profiles
        object.__setattr__(profile, "steps", (replace(profile.steps[0], **change),))

    return attack


def of_tensor(**change: Any) -> Callable[[Engine], None]:
    def attack(engine: Engine) -> None:
        (profile,) = engine.plan.profiles
        object.__setattr__(profile, "outputs", (replace(profile.outputs[0], **change),))

    return attack


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda engine: engine.subgraphs.clear(), "program 'net' is missing"),
        (lambda engine: engine.code.pop("add"), "object 'add' is missing"),
        (of_target(cuda=None), "contradicts what it says of CUDA"),
        (of_target(isa="vector"), "contradicts what it says of CUDA"),
        (of_target(isa="vector", cuda=None), "steps of the kinds cuda"),
        (of_target(cuda=Cuda("")), "the GPU '', which is none"),
        (of_target(cuda=Cuda("sm90\n")), "which is none"),
        (of_step(kind="native"), "steps of the kinds native"),
        (of_step(kind="tensorrt"), "steps of the kinds tensorrt"),
        (of_step(layers=(0,)), "belongs to layer 1, which is none of the step"),
        (of_step(outputs=()), "it copies"),
        (of_step(outputs=("z",)), "unknown tensor 'z'"),
        (of_tensor(dtype="float64"), "512 bytes, 256 are copied"),
        (of_tensor(known=False, shape=()), "is open"),
    ],
)
def test_a_plan_that_its_program_contradicts_is_refused(
    attack: Callable[[Engine], None], message: str
) -> None:
    made = cuda_engine()
    attack(made)
    with pytest.raises(EngineError, match=message):
        check(made)


def test_a_call_may_reach_the_last_byte_and_no_further() -> None:
    check(cuda_engine(first(places=(X, Place("arena", 768 - SIZE, SIZE)))))
    check(cuda_engine(first(places=(X, MIDDLE, Place("weights", 255, 1)))))
    with pytest.raises(EngineError, match="outside weights"):
        check(cuda_engine(first(places=(X, MIDDLE, Place("weights", 256, 1)))))


def test_an_object_that_is_not_named_is_not_started() -> None:
    other = replace(SAMPLE, launches=(FIRST, launch("secret", 1, MIDDLE, Y)))
    with pytest.raises(EngineError, match="secret_kernel is in the object 'secret'"):
        check(cuda_engine(other))
