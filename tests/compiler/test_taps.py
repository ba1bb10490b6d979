"""What a walk sees: every value that a layer writes, by the source model's name.

Each is compared with what ONNX Runtime has under that name when it executes the source model, and,
where it is quantized, with the very integers of the fused graph.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from tests.compiler.engines import fused, reference
from tests.compiler.test_build_open import CONFIG, tokens
from tests.graphs import graph
from tests.kernels.bf16 import needs_bf16
from twofour.compiler import rivals
from twofour.compiler.build import build
from twofour.core.bfloat16 import ROUNDING
from twofour.core.errors import EngineError, InputError
from twofour.engine import Engine, Strided
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.quantize import quantize
from twofour.runtime.session import Session
from twofour.train.export import export_onnx
from twofour.train.networks import transformer
from twofour.train.networks.seeded import seeded

RANDOM = np.random.default_rng(0)


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {
        name: (RANDOM.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        for name, shape in shapes.items()
    }


def residual_network() -> ir.Model:
    """Residuals, a stride, halos, a Concat of parts, a fallback in the middle, rows at the end."""
    return graph(
        "(float[2,8,12,12] x) => (float[2,5] y) {"
        " a = Conv <pads = [1,1,1,1]> (x, w1) b = Relu (a)"
        " c = Conv <pads = [1,1,1,1]> (b, w2) d = Add (c, b) e = Relu (d)"
        " f = Conv <strides = [2,2], pads = [1,1,1,1]> (e, w3) g = Relu (f)"
        " p = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (g)"
        " i = Conv <pads = [1,1,1,1]> (p, w6)"
        " j = Concat <axis = 1> (g, i) k = Conv <pads = [1,1,1,1]> (j, w4) l = Relu (k)"
        " m = GlobalAveragePool (l) n = Flatten (m) y = MatMul (n, w5) }",
        **weights(w1=(16, 8, 3, 3), w2=(16, 16, 3, 3), w3=(20, 16, 3, 3), w4=(16, 32, 3, 3)),
        **weights(w5=(16, 5), w6=(12, 20, 3, 3)),
    )


IMAGES = {"x": RANDOM.normal(size=(2, 8, 12, 12)).astype(np.float32)}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> ir.Model:
    path = tmp_path_factory.mktemp("encoder") / "encoder.onnx"
    example = transformer.example_inputs(CONFIG, 2, 24)
    made = seeded(lambda: transformer.Bert(CONFIG))
    names = transformer.INPUT_NAMES, transformer.OUTPUT_NAMES
    export_onnx(made, example, path, *names, ("batch", "length"))
    return load_model(path)


def with_all(model: ir.Model, names: list[str]) -> ir.Model:
    """The model with these values as outputs."""
    model = model.clone()
    values = {v.name: v for node in model.graph for v in node.outputs}
    model.graph.outputs[:] = [values[name] for name in dict.fromkeys(names)]
    return model


def of_source(model: ir.Model, names, inputs) -> dict[str, np.ndarray]:
    """Values of a model by name; its inputs are some, too."""
    inner = [name for name in names if name not in inputs]
    return {**inputs, **reference(with_all(model, inner), inputs)}


def steps_of(engine: Engine) -> dict[str, float]:
    """The scale of each quantized value, 0 for the others: by the name that a tap has."""
    return {
        write.tensor.name: max(write.scale, default=0.0)
        for layer in engine.plan.layers
        for write in layer.writes
    }


def check(engine: Engine, model: ir.Model, inputs, tolerance: float, threads: int = 1) -> set[str]:
    """Every tap against the source model's value, within a share of its largest and one step.

    Returns the names of the source's values that were seen.
    """
    with Session(engine, threads) as session:
        taps = list(session.walk(inputs))
        assert all(np.isfinite(tap.value).all() for tap in taps)
        again = list(session.walk(inputs))
        whole = session.run(inputs)
    assert all(np.array_equal(a.value, b.value) for a, b in zip(taps, again, strict=True))
    last = {tap.source: tap.value for tap in taps}
    for name, value in whole.items():
        np.testing.assert_array_equal(last[name], value.astype(np.float32))
    want = of_source(model, [tap.source for tap in taps], inputs)
    scales = steps_of(engine)
    for tap in taps:
        assert tap.source, f"{tap.name!r} stands for nothing"
        expected = want[tap.source].astype(np.float32)
        assert tap.value.dtype == np.float32
        assert tap.value.shape == expected.shape
        most = tolerance * np.abs(expected).max() + scales[tap.name]
        assert np.abs(tap.value - expected).max() <= most, tap.source
        assert np.corrcoef(tap.value.reshape(-1), expected.reshape(-1))[0, 1] > 0.97
    layers = engine.plan.profiles[0].steps
    assert sorted({tap.layer for tap in taps}) == [i for step in layers for i in step.layers]
    return {tap.source for tap in taps}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_residual_network(threads) -> None:
    """What is not seen is inside a fused operator, another name, or a Concat in place."""
    model = residual_network()
    engine = build(model, tuning_effort=0, threads=threads)
    seen = check(engine, model, IMAGES, 1e-5, threads)
    assert seen == {"x", "b", "e", "g", "p", "i", "l", "m", "y"}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_residual_network_in_int8(threads) -> None:
    """A quantized value stands for the float that was quantized; its integers are ONNX Runtime's.

    Roundings to another side add up from layer to layer: so many steps of the last.
    """
    model = quantize(residual_network(), IMAGES)
    engine = build(model, tuning_effort=0, threads=threads)
    seen = check(engine, model, IMAGES, 0.05, threads)
    assert {*"xbegpilmny"} >= seen >= {*"begpily"}
    assert_integers(engine, model, IMAGES, threads)


def assert_integers(engine: Engine, model: ir.Model, inputs, threads: int = 1) -> None:
    """Quantized values are those of the fused graph, up to one step where floats stood before."""
    made = fused(model, {name: array.shape for name, array in inputs.items()})
    writes = {w.tensor.name: w for layer in engine.plan.layers for w in layer.writes if w.scale}
    assert writes
    want = reference(with_all(made, list(writes)), inputs)
    with Session(engine, threads) as session:
        for tap in session.walk(inputs):
            if tap.name in writes:
                raw, write = want[tap.name], writes[tap.name]
                zero = write.zero_point - (128 if raw.dtype == np.int8 and write.at else 0)
                meant = (raw.astype(np.float32) - zero) * np.float32(write.scale[0])
                moved = np.abs(tap.value - meant) / write.scale[0]
                assert moved.max() <= 1.01
                assert (moved > 0.01).mean() < 0.02, tap.name


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_an_encoder_with_open_sizes(encoder, precision) -> None:
    """Rows of any number, joint projections seen as their parts, gathered words, two profiles."""
    model = quantize(encoder, tokens(4, 24)) if precision == "int8" else encoder
    ranges = dict.fromkeys(transformer.INPUT_NAMES, ((1, 1), (2, 16), (4, 40)))
    fixed = dict.fromkeys(transformer.INPUT_NAMES, (5, 7))
    engine = build(model, profiles=[fixed, ranges], tuning_effort=0)
    for point in ((5, 7), (2, 16), (4, 40), (3, 17)):
        inputs = tokens(*point)
        with Session(engine) as session:
            taps = list(session.walk(inputs))
            whole = session.run(inputs)
        found = [tap for tap in taps if tap.source]
        assert {tap.source for tap in taps if tap.source} >= set(whole)
        want = of_source(model, [tap.source for tap in found], inputs)
        for tap in found:
            expected = want[tap.source].astype(np.float32)
            assert tap.value.shape == expected.shape
            bound = (0.08 if precision == "int8" else 1e-5) * np.linalg.norm(expected.astype(float))
            assert np.linalg.norm((tap.value - expected).astype(float)) <= bound, tap.source
        names = {engine.plan.layers[tap.layer].name for tap in found}
        assert any("query" in name and "key" in name for name in names)
        assert any("attention" in engine.plan.layers[tap.layer].tactic for tap in found)


@needs_bf16
def test_a_residual_network_in_bfloat16(monkeypatch) -> None:
    monkeypatch.setattr(rivals, "WORTH", 0.0)
    model = residual_network()
    engine = build(model, tuning_effort=0, bf16=True)
    kinds = {write.tensor.dtype for layer in engine.plan.layers for write in layer.writes}
    assert "bfloat16" in kinds
    check(engine, model, IMAGES, 20 * ROUNDING)


def test_steps_on_onnxruntime_and_what_lies_between() -> None:
    """Also integers and indices, a shape that depends on the data, and several outputs."""
    model = graph(
        "(float[1,8,6,6] x) => (int64[k,4] at, float[1,8,6,6] y) {"
        " a = Conv <pads = [1,1,1,1]> (x, w1) b = Det (a)"
        " at = NonZero (a) c = Add (a, x) d = Conv <pads = [1,1,1,1]> (c, w2) y = Sin (d) }",
        **weights(w1=(8, 8, 3, 3), w2=(8, 8, 3, 3)),
    )
    engine = build(model, tuning_effort=0)
    inputs = {"x": IMAGES["x"][:1, :, :6, :6]}
    seen = check(engine, model, inputs, 1e-5)
    assert {"a", "d", "y"} <= seen or {"a", "at", "y"} <= seen


def test_runs_between_the_steps_of_a_walk() -> None:
    """A walk has memory of its own: it may be left, and the session used, at any layer."""
    model = residual_network()
    other = {"x": np.flip(IMAGES["x"], 0).copy()}
    with Session(build(model, tuning_effort=0)) as session:
        want, values = session.run(IMAGES), [tap.value for tap in session.walk(IMAGES)]
        for index, tap in enumerate(session.walk(IMAGES)):
            assert np.array_equal(tap.value, values[index])
            session.run(other)
        left = session.walk(IMAGES)
        next(left)
        assert np.array_equal(session.run(IMAGES)["y"], want["y"])
        session.close()
        with pytest.raises(InputError, match="closed"):
            list(left)


def test_a_place_outside_the_arena_is_refused() -> None:
    """Between the corners that a plan is checked at: the reader looks again."""
    engine = build(residual_network(), tuning_effort=0)
    layer = next(i for i, found in enumerate(engine.plan.layers) if found.writes[0].at)
    layers = list(engine.plan.layers)
    write = layers[layer].writes[0]
    far = replace(write, at=Strided(engine.plan.arena_bytes + 8192, 64, 64, 64))
    layers[layer] = replace(layers[layer], writes=(far,))
    lying = replace(engine, plan=replace(engine.plan, layers=tuple(layers)))
    with Session(lying) as session, pytest.raises(EngineError, match="does not lie in the arena"):
        list(session.walk(IMAGES))


def test_a_walk_refuses_what_a_run_refuses() -> None:
    with Session(build(residual_network(), tuning_effort=0)) as session:
        with pytest.raises(InputError, match="not those of the engine"):
            next(session.walk({"z": IMAGES["x"]}))
