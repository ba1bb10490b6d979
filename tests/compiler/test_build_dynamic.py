"""Products that quantize their input at run time, built and run: files of ours and of others."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime.quantization import QuantType
from onnxruntime.quantization import quantize_dynamic as quantize_onnxruntime

from tests.compiler.engines import fused, reference, run_twice, steps
from tests.compiler.test_build_open import CONFIG, POINTS, TEXT, compare, tokens
from tests.graphs import graph
from tests.onnx_tools.networks import sparse
from twofour.compiler.build import build
from twofour.onnx_tools.dynamic import quantize_dynamic
from twofour.onnx_tools.load import load_model, save_model
from twofour.runtime.session import Session
from twofour.train.export import export_onnx
from twofour.train.networks import transformer
from twofour.train.networks.seeded import seeded

RNG = np.random.default_rng(4)
EPS = float(np.finfo(np.float32).eps)
STEP = 2e-3  # of a value that lies between two steps: 6 / 255 times a weight of less than 0.1


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def dense(head: str, body: str, **weights: np.ndarray) -> ir.Model:
    return graph(f"{head} {{ {body} }}", **weights)


def same(got: dict[str, np.ndarray], want: dict[str, np.ndarray], bound: float) -> None:
    """Every output within a share of its largest value."""
    for name, array in want.items():
        assert np.abs(got[name] - array).max() <= bound * max(1, np.abs(array).max()), name


def near(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    """As `same`, but that some values between two layers may have been rounded the other way."""
    same(got, want, STEP)
    for name, array in want.items():
        assert np.abs(got[name] - array).mean() <= STEP / 50, name


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> ir.Model:
    """A small BERT whose batch and length are open."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.onnx"
    example = transformer.example_inputs(CONFIG, 2, 24)
    names = transformer.INPUT_NAMES, transformer.OUTPUT_NAMES
    made = seeded(partial(transformer.Bert, CONFIG))
    export_onnx(made, example, path, *names, ("batch", "length"))
    return load_model(path)


def kinds(engine) -> Counter:
    """The operators of the one native step."""
    ((kind, ops),) = steps(engine)
    assert kind == "native"
    return Counter(ops)


def test_an_encoder_by_rows(encoder, timing_cache) -> None:
    model, feeds = quantize_dynamic(encoder), tokens(3, 17)
    shapes = {name: array.shape for name, array in feeds.items()}
    engine = build(model, shapes=shapes, timing_cache=timing_cache)
    found = kinds(engine)
    assert (found["RowGemmAdd"], found["RowGemmGelu"], found["RowGemm"]) == (4, 2, 2)
    assert found["Quantize"] == 8, "q, k and v are one product of one x"
    got = run_twice(engine, feeds)
    near(got, reference(fused(model, shapes), feeds))
    floats = reference(fused(encoder, shapes), feeds)
    for name, want in floats.items():
        cosine = (got[name] * want).sum() / np.sqrt((got[name] ** 2).sum() * (want**2).sum())
        assert cosine > 0.999, name


@pytest.mark.parametrize("form", ["row", "tensor"])
def test_of_any_batch_and_length(encoder, form, timing_cache, tmp_path) -> None:
    model = quantize_dynamic(encoder) if form == "row" else _by_onnxruntime(encoder, tmp_path)
    engine = build(model, shapes=TEXT, threads=2, timing_cache=timing_cache)
    assert kinds(engine)["Quantize"] == (8 if form == "row" else 16)
    feeds = [tokens(*point) for point in POINTS[:4]]
    compare(engine, model, feeds, 2, timing_cache=timing_cache)


def _by_onnxruntime(model: ir.Model, folder, **options) -> ir.Model:
    """What ONNX Runtime's own tool makes of it."""
    logging.getLogger().setLevel(logging.ERROR)
    save_model(model, folder / "float.onnx")
    quantize_onnxruntime(folder / "float.onnx", folder / "dynamic.onnx", **options)
    return load_model(folder / "dynamic.onnx")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_channel": True},
        {"per_channel": True, "reduce_range": True},
        {"weight_type": QuantType.QUInt8, "reduce_range": True},
    ],
    ids=str,
)
def test_files_of_onnx_runtime(encoder, options, timing_cache, tmp_path) -> None:
    model, feeds = _by_onnxruntime(encoder, tmp_path, **options), tokens(3, 17)
    shapes = {name: array.shape for name, array in feeds.items()}
    engine = build(model, shapes=shapes, timing_cache=timing_cache)
    found = kinds(engine)
    assert (found["TensorGemmAdd"], found["TensorGemmGelu"], found["TensorGemm"]) == (4, 2, 2)
    near(run_twice(engine, feeds), reference(model, feeds))


@pytest.mark.parametrize("form", ["row", "tensor"])
def test_a_product_is_bit_for_bit_the_same_on_threads(form, timing_cache, tmp_path) -> None:
    body = "p = MatMul (x, w) q = Add (p, b) r = Relu (q) s = MatMul (r, v) y = Add (s, x)"
    weights = {"w": normal(33, 48), "b": normal(48), "v": normal(48, 33)}
    model = dense("(float[2,37,33] x) => (float[2,37,33] y)", body, **weights)
    model = quantize_dynamic(model) if form == "row" else _by_onnxruntime(model, tmp_path)
    feeds = {"x": normal(2, 37, 33)}
    engine = build(model, timing_cache=timing_cache)
    alone = run_twice(engine, feeds)
    same(alone, reference(model, feeds), 64 * EPS)
    shared = build(model, threads=2, timing_cache=timing_cache)
    with Session(shared, 2) as session:
        for _ in range(20):
            np.testing.assert_array_equal(session.run(feeds)["y"], alone["y"])


def test_what_several_products_read_is_quantized_once(timing_cache) -> None:
    body = "p = MatMul (x, w) q = MatMul (x, v) r = Relu (q) y = Add (p, r)"
    model = dense("(float[5,40] x) => (float[5,24] y)", body, w=normal(40, 24), v=normal(40, 24))
    model, feeds = quantize_dynamic(model), {"x": normal(5, 40)}
    engine = build(model, timing_cache=timing_cache)
    assert kinds(engine)["Quantize"] == 1
    same(run_twice(engine, feeds), reference(model, feeds), 64 * EPS)


def test_values_may_be_called_anything(timing_cache) -> None:
    """Also as the rows of another one would be."""
    body = "a = Relu (x) b = Abs (x) y = MatMul (a, w) z = MatMul (b, v)"
    head = "(float[5,40] x) => (float[5,24] y, float[5,24] z)"
    model = quantize_dynamic(dense(head, body, w=normal(40, 24), v=normal(40, 24)))
    (b,) = (value for node in model.graph for value in node.outputs if value.name == "b")
    b.name = "a/row"
    feeds = {"x": normal(5, 40)}
    got = run_twice(build(model, timing_cache=timing_cache), feeds)
    same(got, reference(model, feeds), 64 * EPS)


def test_a_token_of_each_sequence(timing_cache) -> None:
    """A view: its rows lie apart."""
    body = "a = MatMul (x, w) b = Relu (a) c = Gather <axis = 1> (b, one) y = MatMul (c, v)"
    weights = {"w": normal(24, 40), "v": normal(40, 16), "one": np.array(1)}
    model = dense("(float[3,4,24] x) => (float[3,16] y)", body, **weights)
    model, feeds = quantize_dynamic(model), {"x": normal(3, 4, 24)}
    engine = build(model, timing_cache=timing_cache)
    near(run_twice(engine, feeds), reference(model, feeds))


def test_sparse_weights_stay_sparse(timing_cache) -> None:
    w = sparse(normal(64, 128)).T.copy()
    model = dense("(float[40,128] x) => (float[40,64] y)", "y = MatMul (x, w)", w=w)
    model, feeds = quantize_dynamic(model), {"x": normal(40, 128)}
    engine = build(model, sparsity="force", timing_cache=timing_cache)
    (layer,) = (each for each in engine.plan.layers if each.op == "RowGemm")
    assert layer.tactic.startswith("2:4")
    assert layer.precision == "int8"
    same(run_twice(engine, feeds), reference(model, feeds), 64 * EPS)


def test_rows_that_are_no_numbers_and_rows_of_zeros(timing_cache) -> None:
    model = dense("(float[5,40] x) => (float[5,24] y)", "y = MatMul (x, w)", w=normal(40, 24))
    model, x = quantize_dynamic(model), normal(5, 40)
    x[1, 3], x[3] = np.nan, 0
    got = run_twice(build(model, timing_cache=timing_cache), {"x": x})["y"]
    assert np.isnan(got[1]).all()
    assert (got[3] == 0).all()
    assert np.isfinite(got[[0, 2, 4]]).all()


def test_images_of_channels_run_on_onnxruntime_with_the_reason(timing_cache) -> None:
    weights = {"w": normal(8, 8), "k": normal(4, 4, 1, 1)}
    body = "c = Conv (x, k) y = MatMul (c, w)"
    model = dense("(float[1,4,6,8] x) => (float[1,4,6,8] y)", body, **weights)
    model, feeds = quantize_dynamic(model), {"x": normal(1, 4, 6, 8)}
    engine = build(model, race=False, timing_cache=timing_cache)
    kinds_of = dict(steps(engine))
    assert "RowGemm" in kinds_of["onnxruntime"]
    notes = [note for each in engine.plan.layers for note in each.notes]
    assert any("at most 3 dimensions" in note for note in notes)
    same(run_twice(engine, feeds), reference(model, feeds), 64 * EPS)
