"""Hostile engine files: well-formed containers with correct hashes whose contents lie.

Each attack starts from a good engine and alters one thing. A hash proves nothing here, since the
attacker computes it too: the checks of names, types and ranges must hold alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.sample_engines import open_engine, sample_engine
from twofour.core.errors import EngineError
from twofour.engine import FORMAT, Engine

Header = dict[str, Any]


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    engine = sample_engine()
    return {
        "weights": engine.weights,
        "code.net0": engine.code["net0"],
        "subgraph.tail": engine.subgraphs["tail"],
    }


def header_of(tensors: dict[str, np.ndarray]) -> Header:
    hashes = {name: hashlib.sha256(data.tobytes()).hexdigest() for name, data in tensors.items()}
    return {"plan": sample_engine().plan.to_json(), "sha256": hashes}


def write(path: Path, tensors: dict[str, np.ndarray], text: str, number: str = str(FORMAT)) -> Path:
    """A container with this plan, its hash correct."""
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    save_file(tensors, path, {"format": number, "twofour": text, "sha256": digest})
    return path


def plan_with(*keys: str | int, value: Any) -> Callable[[Header], None]:
    """An attack that replaces one value of the plan."""

    def attack(header: Header) -> None:
        at = header["plan"]
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value

    return attack


def profile_with(*keys: str | int, value: Any) -> Callable[[Header], None]:
    """An attack that replaces one value of the first profile."""
    return plan_with("profiles", 0, *keys, value=value)


def open_with(*keys: str | int, value: Any) -> Callable[[Header], None]:
    """An attack on a plan whose batch is open."""

    def attack(header: Header) -> None:
        header["plan"]["profiles"] = open_engine().plan.to_json()["profiles"]
        profile_with(*keys, value=value)(header)

    return attack


def second_with(*keys: str | int, value: Any) -> Callable[[Header], None]:
    """An attack that adds a profile which differs in one value."""

    def attack(header: Header) -> None:
        header["plan"]["profiles"].append(copy.deepcopy(header["plan"]["profiles"][0]))
        plan_with("profiles", 1, *keys, value=value)(header)

    return attack


def without(*keys: str | int) -> Callable[[Header], None]:
    """An attack that removes one value of the plan."""

    def attack(header: Header) -> None:
        at = header["plan"]
        for key in keys[:-1]:
            at = at[key]
        del at[keys[-1]]

    return attack


def writes_with(*keys: str | int, value: Any) -> Callable[[Header], None]:
    """An attack on what the first layer is said to write: 3 x 32 x 32 bytes at the arena's end."""

    def attack(header: Header) -> None:
        info = {"name": "v", "dtype": "uint8", "shape": [1, 3, 32, 31], "sizes": []}
        at = {"offset": 1024, "image": 0, "row": 96, "pixel": 3}
        header["plan"]["layers"][0]["writes"] = [{"tensor": info, "at": at, "scale": [0.5]}]
        plan_with("layers", 0, "writes", 0, *keys, value=value)(header)

    return attack


def hashes(value: Any) -> Callable[[Header], None]:
    """An attack that replaces the list of hashes."""
    return lambda header: header.update(sha256=value)


LIES: dict[str, tuple[Callable[[Header], None], str]] = {
    "known shape that is not known": (
        profile_with("outputs", 0, "known", value=False),
        "has a shape that is not known",
    ),
    "input without a shape": (
        profile_with(
            "inputs", 0, value={"name": "x", "dtype": "float32", "shape": [], "known": False}
        ),
        "input 'x' has no shape",
    ),
    "program that writes what has no shape": (
        profile_with(
            "boundary", 0, value={"name": "logits", "dtype": "float32", "shape": [], "known": False}
        ),
        "program 'net0' uses tensor 'logits', whose shape is not known",
    ),
    "known is text": (profile_with("outputs", 0, "known", value="no"), "known: expected bool"),
    "arena below zero": (profile_with("arena_bytes", value=-1), "arena of -1"),
    "arena beyond memory": (profile_with("arena_bytes", value=1 << 60), "arena of"),
    "arena is text": (profile_with("arena_bytes", value="4096"), "arena_bytes: expected int"),
    "arena is a float": (profile_with("arena_bytes", value=4096.0), "arena_bytes: expected int"),
    "arena is true": (profile_with("arena_bytes", value=True), "arena_bytes: expected int"),
    "fill past the arena": (
        profile_with("fills", 0, "size_bytes", value=9999),
        "outside the arena",
    ),
    "fill before the arena": (profile_with("fills", 0, "offset", value=-64), "outside the arena"),
    "fill of negative size": (
        profile_with("fills", 1, "size_bytes", value=-1),
        "outside the arena",
    ),
    "fill is no byte": (profile_with("fills", 0, "value", value=256), "not a byte"),
    "step of unknown kind": (
        profile_with("steps", 0, "kind", value="shell"),
        "unknown kind 'shell'",
    ),
    "step reads nothing known": (profile_with("steps", 0, "inputs", value=["z"]), "unknown tensor"),
    "step names no layer": (profile_with("steps", 0, "layers", value=[4]), "names layer 4 of 4"),
    "step names layer -1": (profile_with("steps", 0, "layers", value=[-1]), "names layer -1"),
    "object is missing": (plan_with("code", value=["net1"]), "object 'net1' is missing"),
    "subgraph is missing": (
        profile_with("steps", 1, "symbol", value="t"),
        "subgraph 't' is missing",
    ),
    "negative shape": (profile_with("inputs", 0, "shape", value=[1, -3]), "has shape"),
    "shape beyond memory": (profile_with("outputs", 0, "shape", value=[1 << 40, 4]), "has shape"),
    "shape of thousands": (profile_with("boundary", 0, "shape", value=[1] * 5000), "has shape"),
    "object dtype": (profile_with("inputs", 0, "dtype", value="object"), "unknown dtype 'object'"),
    "no threads": (plan_with("threads", value=0), "0 threads"),
    "a million threads": (plan_with("threads", value=1_000_000), "1000000 threads"),
    "unknown set": (plan_with("target", "isa", value="sve9"), "unknown instruction set 'sve9'"),
    "no profile": (plan_with("profiles", value=[]), "0 profiles"),
    "profiles of other inputs": (second_with("inputs", 0, "name", value="z"), "different inputs"),
    "profiles of other types": (
        second_with("outputs", 0, "dtype", value="int8"),
        "different inputs",
    ),
    "symbol of no range": (open_with("symbols", 0, "least", value=9), "the range 9 to 8"),
    "symbol from zero": (open_with("symbols", 0, "least", value=0), "the range 0 to 8"),
    "symbol that no input has": (
        open_with("inputs", 0, "sizes", value=[]),
        "no input has symbol 'batch'",
    ),
    "symbols beyond the arena": (open_with("arena_bytes", value=4), "1 symbols in an arena"),
    "fill over the symbols": (open_with("fills", 0, "offset", value=0), "over the symbols"),
    "size of two symbols": (
        open_with("outputs", 0, "sizes", 0, "terms", value=[[1, 1, 1]]),
        "not a polynomial",
    ),
    "size of a high power": (
        open_with("outputs", 0, "sizes", 0, "terms", value=[[1, 99]]),
        "not a polynomial",
    ),
    "size of no term": (
        open_with("outputs", 0, "sizes", 0, "terms", value=[]),
        "not a polynomial",
    ),
    "size that its shape is not": (
        open_with("outputs", 0, "sizes", 0, "terms", value=[[2, 1]]),
        "at most 16",
    ),
    "size below zero": (
        open_with("outputs", 0, "sizes", 0, "terms", value=[[-8, 0], [2, 1]]),
        "4 as usual and at most 8",
    ),
    "input that is no symbol": (
        open_with("inputs", 0, "sizes", 0, "terms", value=[[-4, 0], [1, 1]]),
        "no input has symbol",
    ),
    "fewer sizes than dimensions": (
        open_with("outputs", 0, "sizes", value=[None]),
        "2 dimensions and 1 sizes",
    ),
    "value of no layer": (
        plan_with("layers", 0, "reads", value=[{"layer": 4, "tensor": "v"}]),
        "reads from layer 4 of 4",
    ),
    "value of a layer before the first": (
        plan_with("layers", 0, "reads", value=[{"layer": -2, "tensor": "v"}]),
        "reads from layer -2 of 4",
    ),
    "value beyond the arena": (writes_with("at", "offset", value=1028), "outside the arena"),
    "value of long rows": (writes_with("at", "row", value=1 << 40), "outside the arena"),
    "value before the arena": (writes_with("at", "offset", value=-1), "outside the arena"),
    "value that goes backwards": (writes_with("at", "pixel", value=-3), "outside the arena"),
    "value of wide elements": (writes_with("tensor", "dtype", value="int64"), "outside the arena"),
    "value of objects": (writes_with("tensor", "dtype", value="object"), "unknown dtype 'object'"),
    "value beyond memory": (writes_with("tensor", "shape", value=[1 << 20, 1 << 20]), "has shape"),
    "value of thousands": (writes_with("tensor", "shape", value=[1] * 5000), "has shape"),
    "value with 2 scales": (writes_with("scale", value=[1.0, 2.0]), "3 channels has 2 scales"),
    "value that is no plain tensor": (writes_with("at", value=None), "no plain tensor of step"),
    "target is a list": (plan_with("target", value=["avx2"]), "plan.target: expected an object"),
    "layers are a number": (plan_with("layers", value=3), "plan.layers: expected a list"),
    "time is text": (plan_with("layers", 0, "time_us", value="1"), "time_us: expected a finite"),
    "broken text": (plan_with("layers", 0, "name", value="\ud800"), "name: expected valid text"),
    "plan is null": (lambda header: header.update(plan=None), "plan: expected an object"),
    "field is missing": (without("profiles", 0, "arena_bytes"), "field 'arena_bytes' is missing"),
    "field is unknown": (plan_with("run", value="rm"), "unknown field 'run'"),
    "a third part": (lambda header: header.update(more=1), "plan and sha256"),
    "hashes are a list": (hashes(["weights"]), "sha256 is not an object"),
    "hashes are missing": (hashes({}), "contents differ"),
    "hashes are numbers": (
        hashes({"weights": 1, "code.net0": 2, "subgraph.tail": 3}),
        "does not match its hash",
    ),
}


def test_the_unaltered_engine_loads(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    engine = Engine.load(write(tmp_path / "e", tensors, json.dumps(header_of(tensors))))
    assert engine.plan == sample_engine().plan


@pytest.mark.parametrize("name", LIES)
def test_a_lie_in_the_plan(name: str, tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    attack, message = LIES[name]
    header = copy.deepcopy(header_of(tensors))
    attack(header)
    with pytest.raises(EngineError) as refused:
        Engine.load(write(tmp_path / "e", tensors, json.dumps(header)))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "3", "{", "[" * 100_000, '{"plan": ' * 50_000, "9" * 5000, '{"plan":NaN}'],
)
def test_a_plan_that_is_no_plan(text: str, tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        Engine.load(write(tmp_path / "e", tensors, text))


def test_numbers_that_are_none(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    text = json.dumps(header_of(tensors))
    for number in ("NaN", "Infinity", "-Infinity", "1e999", "9" * 4000):
        lied = text.replace('"time_us": 12.5', f'"time_us": {number}', 1)
        assert lied != text
        with pytest.raises(EngineError, match="expected a finite number"):
            Engine.load(write(tmp_path / "e", tensors, lied))


def test_another_format(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"not a twofour engine of format {FORMAT}"):
        Engine.load(write(tmp_path / "e", tensors, json.dumps(header_of(tensors)), number="1"))


def test_a_container_without_a_plan(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "e")
    with pytest.raises(EngineError, match="found format 'none'"):
        Engine.load(tmp_path / "e")


def test_tensors_more_or_fewer_than_listed(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    text = json.dumps(header_of(tensors))
    more = {**tensors, "code.extra": np.zeros(4, np.uint8)}
    fewer = {name: data for name, data in tensors.items() if name != "weights"}
    for wrong in (more, fewer):
        with pytest.raises(EngineError, match="contents differ"):
            Engine.load(write(tmp_path / "e", wrong, text))


def test_an_engine_without_weights(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    fewer = {name: data for name, data in tensors.items() if name != "weights"}
    with pytest.raises(EngineError, match="contents differ"):
        Engine.load(write(tmp_path / "e", fewer, json.dumps(header_of(fewer))))


def test_a_tensor_that_is_no_bytes(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    for odd in (np.zeros((3, 4), np.uint8), np.zeros(4, np.float32)):
        wrong = {**tensors, "weights": odd}
        with pytest.raises(EngineError, match="weights is no byte string"):
            Engine.load(write(tmp_path / "e", wrong, json.dumps(header_of(wrong))))


@pytest.mark.parametrize("length", [0, 1, 200, 1 << 20, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_a_header_that_claims_another_length(
    length: int, tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    path = write(tmp_path / "e", tensors, json.dumps(header_of(tensors)))
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(EngineError):
        Engine.load(path)


@pytest.mark.parametrize(
    ("dtype", "shape", "offsets"),
    [
        ("U8", [1 << 62], [0, 16]),
        ("U8", [16], [0, 1 << 62]),
        ("U8", [16], [16, 0]),
        ("U8", [16], [8, 24]),
        ("U8", [-16], [0, 16]),
        ("F128", [1], [0, 16]),
        ("U8", [1 << 32, 1 << 32], [0, 16]),
    ],
)
def test_a_tensor_that_claims_bytes_it_has_not(
    dtype: str, shape: list[int], offsets: list[int], tmp_path: Path
) -> None:
    plan = json.dumps({"plan": sample_engine().plan.to_json(), "sha256": {"weights": "0"}})
    digest = hashlib.sha256(plan.encode()).hexdigest()
    header = json.dumps(
        {
            "__metadata__": {"format": str(FORMAT), "twofour": plan, "sha256": digest},
            "weights": {"dtype": dtype, "shape": shape, "data_offsets": offsets},
        }
    ).encode()
    (tmp_path / "e").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    with pytest.raises(EngineError):
        Engine.load(tmp_path / "e")
