"""Maxima of maxima become one operator where they can, and compute the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.compiler.engines import reference, run_twice, steps
from tests.graphs import graph
from twofour.compiler.build import build

RANDOM = np.random.default_rng(0)
POOL = "MaxPool <kernel_shape = [5, 5], pads = [2, 2, 2, 2]>"
OTHER = "MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>"
ENDS = "y = Conv (j, w)"
JOIN = f"j = Concat <axis = 1> (x0, a, b, c) {ENDS}"


def model(
    body: str, channels: int = 16, size: tuple[int, int] = (7, 9), joined: int = 4
) -> ir.Model:
    height, width = size
    text = (
        f"(float[1,{channels},{height},{width}] x) => (float[1,8,{height},{width}] y)"
        f" {{ x0 = Conv (x, v) {body} }}"
    )
    return graph(
        text,
        v=RANDOM.normal(size=(channels, channels, 1, 1)).astype(np.float32),
        w=RANDOM.normal(size=(8, joined * channels, 1, 1)).astype(np.float32),
    )


def check(one: ir.Model, *pools: str) -> None:
    """Its steps have these pools, and it computes what ONNX Runtime does."""
    engine = build(one, tuning_effort=0, race=False)
    ((kind, found),) = steps(engine)
    assert kind == "native"
    assert [op for op in found if "Pool" in op] == list(pools)
    shape = tuple(one.graph.inputs[0].shape)
    inputs = {"x": RANDOM.normal(size=shape).astype(np.float32)}
    got, want = run_twice(engine, inputs)["y"], reference(one, inputs)["y"]
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("channels", [16, 24])
@pytest.mark.parametrize("size", [(7, 9), (1, 1), (3, 2), (4, 20)])
def test_a_pyramid_is_one_operator(channels, size) -> None:
    body = f"a = {POOL} (x0) b = {POOL} (a) c = {POOL} (b) {JOIN}"
    check(model(body, channels, size), "MaxPoolChain")


def test_the_layer_computes_all_nodes_and_writes_all_values() -> None:
    engine = build(model(f"a = {POOL} (x0) b = {POOL} (a) c = {POOL} (b) {JOIN}"), tuning_effort=0)
    (layer,) = [layer for layer in engine.plan.layers if layer.op == "MaxPoolChain"]
    assert layer.source == ("a", "b", "c")
    assert [write.source for write in layer.writes] == ["a", "b", "c"]


def test_what_is_computed_in_between_ends_a_chain() -> None:
    body = f"a = {POOL} (x0) b = {POOL} (a) n = Neg (b) c = {POOL} (n) {JOIN}"
    check(model(body), "MaxPoolChain", "MaxPool")


@pytest.mark.parametrize(
    ("second", "names"),
    [
        (OTHER, ("MaxPool", "MaxPoolChain")),
        ("MaxPool <kernel_shape = [5, 5], pads = [1, 1, 3, 3]>", ("MaxPool",) * 3),
        ("AveragePool <kernel_shape = [5, 5], pads = [2, 2, 2, 2]>", ("MaxPool",)),
    ],
)
def test_windows_that_differ_stay_apart(second, names) -> None:
    body = f"a = {POOL} (x0) b = {second} (a) c = {second} (b) {JOIN}"
    engine = build(model(body), tuning_effort=0, race=False)
    found = [layer.op for layer in engine.plan.layers if "MaxPool" in layer.op]
    assert tuple(found) == names
