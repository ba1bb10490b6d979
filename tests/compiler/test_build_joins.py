"""Networks that join and split: what is written into place gives what copies give."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.compiler.engines import built_and_run, fused, reference, run_twice, steps
from tests.graphs import graph
from tests.kernels.harness import targets
from twofour.compiler.build import build
from twofour.compiler.parts import Parts
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize

RANDOM = np.random.default_rng(0)


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Random float32 weights that keep activations near 1."""
    return {
        name: (RANDOM.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        for name, shape in shapes.items()
    }


def images(channels: int = 5, batch: int = 2) -> dict[str, np.ndarray]:
    return {"x": RANDOM.normal(size=(batch, channels, 8, 8)).astype(np.float32)}


X = "(float[2,5,8,8] x) => (float[2,8,h,v] y)"
LAST = "y = Conv <pads = [1,1,1,1]> (c, u)"
SPLIT = "l, r = Split <axis = 1, num_outputs = 2> (e)"
PADDED = "pads = [1,1,1,1]"
POOL = "MaxPool <kernel_shape = [5,5], pads = [2,2,2,2]>"
# name: nodes that make c of e (8 channels, from x), further weights, operators left without copies
CASES: dict[str, tuple[str, dict[str, tuple[int, ...]], list[str]]] = {
    "csp": (
        f"{SPLIT} i = Conv <{PADDED}> (r, w1) k = Relu (i) s = Add (r, k)"
        " c = Concat <axis = 1> (l, r, s)",
        {"w1": (4, 4, 3, 3), "u": (8, 12, 3, 3)},
        ["Conv", "ConvRelu", "Add", "Conv"],
    ),
    "pyramid": (
        f"p = {POOL} (e) q = {POOL} (p) o = {POOL} (q) c = Concat <axis = 1> (e, p, q, o)",
        {"u": (8, 32, 3, 3)},
        ["Conv", "MaxPoolChain", "Conv"],
    ),
    "nested": (
        "a = Conv (e, w1) b = Conv (e, w2) d = Concat <axis = 1> (b, a)"
        f" f = Conv <{PADDED}> (d, w3) c = Concat <axis = 1> (f, d, e)",
        {"w1": (3, 8, 1, 1), "w2": (17, 8, 1, 1), "w3": (20, 20, 3, 3), "u": (8, 48, 3, 3)},
        ["Conv"] * 5,
    ),
    "twice": (
        "c = Concat <axis = 1> (e, e)",
        {"u": (8, 16, 3, 3)},
        ["Conv", "Concat", "Conv"],
    ),
    "input": (
        "c = Concat <axis = 1> (e, x)",
        {"u": (8, 13, 3, 3)},
        ["Conv", "Concat", "Conv"],
    ),
    "half": (
        f"{SPLIT} i = Conv (r, w1) c = Concat <axis = 1> (l, i)",
        {"w1": (6, 4, 1, 1), "u": (8, 10, 3, 3)},
        ["Conv", "Conv", "Concat", "Conv"],
    ),
    "turned": (
        f"{SPLIT} c = Concat <axis = 1> (r, l)",
        {"u": (8, 8, 3, 3)},
        ["Conv", "Concat", "Conv"],
    ),
    "rejoined": (
        f"{SPLIT} c = Concat <axis = 1> (l, r)",
        {"u": (8, 8, 3, 3)},
        ["Conv", "Conv"],
    ),
    "two_joins": (
        "a = Conv (e, w1) d = Concat <axis = 1> (e, a) f = Conv (d, w2)"
        " c = Concat <axis = 1> (a, f)",
        {"w1": (8, 8, 1, 1), "w2": (4, 16, 1, 1), "u": (8, 12, 3, 3)},
        ["Conv", "Conv", "Conv", "Concat", "Conv"],
    ),
    "residual": (
        f"a = Conv <{PADDED}> (e, w1) s = Add (a, e) c = Concat <axis = 1> (s, e)",
        {"w1": (8, 8, 3, 3), "u": (8, 16, 3, 3)},
        ["Conv", "ConvAdd", "Conv"],
    ),
    "residual_apart": (
        f"o = Conv (e, w2) a = Conv <{PADDED}> (o, w1) s = Add (a, e) b = Conv (s, w2)"
        " c = Concat <axis = 1> (s, b)",
        {"w1": (8, 8, 3, 3), "w2": (8, 8, 1, 1), "u": (8, 16, 3, 3)},
        ["Conv", "Conv", "ConvAdd", "Conv", "Conv"],
    ),
    "resized": (
        "d = Conv <strides = [2,2]> (e, w1) t = Resize <mode=\"nearest\"> (d, , twice)"
        " c = Concat <axis = 1> (t, e)",
        {"w1": (8, 8, 1, 1), "u": (8, 16, 3, 3)},
        ["Conv", "Conv", "Resize", "Conv"],
    ),
    "depthwise": (
        f"d = Conv <{PADDED}, group = 8> (e, w1) m = Conv (d, w2)"
        f" o = Conv <{PADDED}, group = 80> (m, w3) c = Concat <axis = 1> (d, o, e)",
        {"w1": (8, 1, 3, 3), "w2": (80, 8, 1, 1), "w3": (80, 1, 3, 3), "u": (8, 96, 3, 3)},
        ["Conv"] * 5,
    ),
}  # fmt: skip


def network(name: str):
    nodes, shapes, _ = CASES[name]
    return graph(
        f"{X} <float[4] twice = {{1, 1, 2, 2}}> {{ e = Conv (x, w) {nodes} {LAST} }}",
        **weights(w=(8, 5, 1, 1), **shapes),
    )


@pytest.fixture
def apart(monkeypatch) -> Callable[[], None]:
    """From then on every Concat copies."""
    return lambda: monkeypatch.setattr(Parts, "of", lambda *_: Parts({}, {}))


@pytest.mark.parametrize("name", CASES)
def test_floats_are_joined_in_place(name, timing_cache) -> None:
    model, inputs = network(name), images()
    engine = build(model, timing_cache=timing_cache)
    assert steps(engine) == [("native", CASES[name][2])]
    got, want = run_twice(engine, inputs)["y"], reference(model, inputs)["y"]
    assert np.abs(got - want).max() <= 1e-5 * max(1.0, float(np.abs(want).max()))


@pytest.mark.parametrize("name", CASES)
def test_bytes_joined_in_place_are_those_that_are_copied(name, timing_cache, apart) -> None:
    model = quantize(network(name), [images() for _ in range(4)], QuantizeOptions(method="minmax"))
    inputs = images()
    engine = build(model, timing_cache=timing_cache)
    ((kind, found),) = steps(engine)
    assert kind == "native"
    # The quantizer of an input writes into place, too.
    copies = 0 if name == "input" else CASES[name][2].count("Concat")
    assert found.count("Concat") == copies
    assert found[0] == "QuantizeLinear"
    assert "DequantizeLinear" not in found
    got = run_twice(engine, inputs)["y"]
    apart()
    copied = build(model, timing_cache=timing_cache)
    assert steps(copied)[0][1].count("Concat") >= 1
    assert (run_twice(copied, inputs)["y"] == got).all()
    want = reference(fused(model), inputs)["y"]
    assert np.abs(got - want).max() <= 0.03 * np.abs(want).max()


@pytest.mark.parametrize("name", ["csp", "nested", "depthwise"])
def test_every_target_gives_the_same_bytes(name, timing_cache) -> None:
    model = quantize(network(name), [images() for _ in range(2)], QuantizeOptions(method="minmax"))
    inputs = images()
    first, *others = (
        run_twice(build(model, target=target, timing_cache=timing_cache), inputs)["y"]
        for target in targets()
    )
    assert all((other == first).all() for other in others)


def test_rows_of_features_are_joined(timing_cache) -> None:
    model = graph(
        "(float[3,5] x) => (float[3,4] y) { a = MatMul (x, w1) b = Relu (a) d = MatMul (x, w2)"
        " c = Concat <axis = 1> (b, d) y = MatMul (c, w3) }",
        **weights(w1=(5, 7), w2=(5, 16), w3=(23, 4)),
    )
    inputs = {"x": RANDOM.normal(size=(3, 5)).astype(np.float32)}
    engine = build(model, timing_cache=timing_cache)
    assert steps(engine) == [("native", ["GemmRelu", "Gemm", "Gemm"])]
    got, want = run_twice(engine, inputs)["y"], reference(model, inputs)["y"]
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_two_threads_share_a_join(timing_cache) -> None:
    model, inputs = network("nested"), images()
    engine = build(model, threads=2, timing_cache=timing_cache)
    one, two = (run_twice(engine, inputs, threads)["y"] for threads in (1, 2))
    assert (one == two).all()


@pytest.mark.parametrize("name", ["csp", "nested", "pyramid"])
def test_joins_of_any_number_of_images(name, timing_cache) -> None:
    nodes, shapes, _ = CASES[name]
    model = graph(
        f"(float[n,5,8,8] x) => (float[n,8,8,8] y) {{ e = Conv (x, w) {nodes} {LAST} }}",
        **weights(w=(8, 5, 1, 1), **shapes),
    )
    options = {"shapes": {"x": ((1, 5, 8, 8), (2, 5, 8, 8), (4, 5, 8, 8))}}
    engine = build(model, timing_cache=timing_cache, **options)
    assert "Concat" not in steps(engine)[0][1]
    for batch in (1, 2, 3, 4):
        inputs = images(batch=batch)
        got, want = run_twice(engine, inputs)["y"], reference(model, inputs)["y"]
        assert np.abs(got - want).max() <= 1e-5 * max(1.0, float(np.abs(want).max()))


@pytest.mark.parametrize("axis", [0, 2, 3])
def test_other_axes_are_copied(axis, timing_cache) -> None:
    shape = [2, 8, 8, 8]
    shape[axis] *= 2
    model = graph(
        f"(float[2,5,8,8] x) => (float[{','.join(map(str, shape))}] y)"
        f"{{ a = Conv (x, w) b = Conv (x, v) c = Concat <axis = {axis}> (a, b) y = Conv (c, u) }}",
        **weights(w=(8, 5, 1, 1), v=(8, 5, 1, 1), u=(8, 8, 1, 1)),
    )
    inputs = images()
    got = built_and_run(model, inputs, timing_cache=timing_cache)["y"]
    want = reference(model, inputs)["y"]
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_parts_that_are_outputs_too(timing_cache) -> None:
    model = graph(
        "(float[2,5,8,8] x) => (float[2,8,8,8] y, float[2,8,8,8] a, float[2,16,8,8] c)"
        "{ a = Conv (x, w) b = Relu (a) c = Concat <axis = 1> (a, b) y = Conv (c, u) }",
        **weights(w=(8, 5, 1, 1), u=(8, 16, 1, 1)),
    )
    inputs = images()
    got, want = (
        built_and_run(model, inputs, timing_cache=timing_cache),
        reference(model, inputs),
    )
    for name in ("y", "a", "c"):
        assert np.abs(got[name] - want[name]).max() <= 1e-5 * np.abs(want[name]).max()


def test_a_join_that_is_only_an_output_is_written_plain(timing_cache) -> None:
    model = graph(
        "(float[2,5,8,8] x) => (float[2,16,8,8] c)"
        "{ a = Conv (x, w) b = Conv (x, v) c = Concat <axis = 1> (a, b) }",
        **weights(w=(8, 5, 1, 1), v=(8, 5, 1, 1)),
    )
    inputs = images()
    engine = build(model, timing_cache=timing_cache)
    assert steps(engine) == [("native", ["Conv", "Conv", "Concat"])]
    got, want = run_twice(engine, inputs)["c"], reference(model, inputs)["c"]
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_parts_read_with_another_zero_point_stay_apart(timing_cache) -> None:
    """All parts share the halo of the join."""
    model = graph(
        "(int8[2,4,8,8] x) => (float[2,8,8,8] y, float[2,8,8,8] v)"
        "<float s = {0.05}, int8 z = {3}, int8 o = {-9}, float t = {0.04}> {"
        " f = DequantizeLinear (x, s, z) k = DequantizeLinear <axis = 0> (w, ws)"
        " a = Conv (f, k) p = QuantizeLinear (a, t, z)"
        " l = DequantizeLinear <axis = 0> (w2, ws) b = Conv (f, l) q = QuantizeLinear (b, t, z)"
        " c = Concat <axis = 1> (p, q) d = DequantizeLinear (c, t, z)"
        " m = DequantizeLinear <axis = 0> (w3, ws) y = Conv <pads = [1,1,1,1]> (d, m)"
        " e = DequantizeLinear (p, t, o)"
        " n = DequantizeLinear <axis = 0> (w4, ws) v = Conv <pads = [1,1,1,1]> (e, n) }",
        ws=np.full(8, 0.01, np.float32),
        **{
            name: RANDOM.integers(-127, 128, shape).astype(np.int8)
            for name, shape in {
                "w": (8, 4, 1, 1), "w2": (8, 4, 1, 1), "w3": (8, 16, 3, 3), "w4": (8, 8, 3, 3)
            }.items()
        },
    )  # fmt: skip
    inputs = {"x": RANDOM.integers(-128, 128, (2, 4, 8, 8)).astype(np.int8)}
    engine = build(model, timing_cache=timing_cache)
    assert steps(engine)[0][1].count("Concat") == 1
    got, want = run_twice(engine, inputs), reference(fused(model), inputs)
    for name in ("y", "v"):
        assert np.abs(got[name] - want[name]).max() <= 0.03 * np.abs(want[name]).max()
