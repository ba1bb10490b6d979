"""Engines with open sizes: every shape in the ranges gives what an engine for that shape gives."""

from __future__ import annotations

import logging
import warnings
from functools import partial

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.compiler.random_graphs import random_graph
from tests.graphs import graph
from tests.networks import ResNet18, export, with_statistics
from twofour.compiler.build import build
from twofour.core.errors import EngineError, InputError
from twofour.engine import Engine
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.quantize import quantize
from twofour.runtime.session import Session
from twofour.train.export import export_onnx
from twofour.train.networks import transformer
from twofour.train.networks.seeded import seeded

IMAGES = {"x": ((1, 3, 32, 32), (2, 3, 32, 32), (8, 3, 32, 32))}
TEXT = dict.fromkeys(transformer.INPUT_NAMES, ((1, 1), (2, 16), (4, 70)))
POINTS = ((2, 16), (1, 1), (4, 70), (3, 17), (1, 2), (4, 5), (1, 65), (4, 1))
CONFIG = transformer.BertConfig(2, 64, 2, 96, vocabulary=50, positions=80)


def images(count: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(count)
    return {"x": random.normal(size=(count, 3, 32, 32)).astype(np.float32)}


def tokens(batch: int, length: int) -> dict[str, np.ndarray]:
    """Texts of several lengths, padded."""
    random = np.random.default_rng(batch * length)
    seen = np.arange(length) < random.integers(1, length + 1, (batch, 1))
    return {
        "input_ids": random.integers(0, 50, (batch, length)),
        "attention_mask": seen.astype(np.int64),
        "token_type_ids": random.integers(0, 2, (batch, length)),
    }


def exported(model: nn.Module, example: tuple[torch.Tensor, ...], names, sizes) -> ir.Model:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(),
            example,
            dynamo=True,
            dynamic_shapes=sizes,
            verbose=False,
            input_names=names,
            output_names=["y"],
        )
    return ir.from_proto(program.model_proto)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> ir.Model:
    """A small BERT whose batch and length are open."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.onnx"
    example = transformer.example_inputs(CONFIG, 2, 24)
    names = transformer.INPUT_NAMES, transformer.OUTPUT_NAMES
    made = seeded(partial(transformer.Bert, CONFIG))
    export_onnx(made, example, path, *names, ("batch", "length"))
    return load_model(path)


@pytest.fixture(scope="module")
def encoder_int8(encoder) -> ir.Model:
    return quantize(encoder, tokens(4, 24))


@pytest.fixture(scope="module")
def resnet() -> ir.Model:
    torch.manual_seed(0)
    return export(with_statistics(ResNet18()), True)


def run_over_garbage(session: Session, inputs, garbage: int) -> dict[str, np.ndarray]:
    """A run on an arena where nothing is left of earlier ones: NaN as floats."""
    session._machine.arena[:] = garbage
    session._current = None  # halos and symbols are written again
    return session.run(inputs)


def compare(engine: Engine, model: ir.Model, feeds, threads: int = 1, **options) -> None:
    """Every shape twice, over other garbage each time, as the engine for that shape alone."""
    with Session(engine, threads) as session:
        for inputs in feeds:
            shapes = {name: array.shape for name, array in inputs.items()}
            with Session(build(model, shapes=shapes, **options)) as alone:
                want = alone.run(inputs)
            for garbage in (0xFF, 0x7F):
                got = run_over_garbage(session, inputs, garbage)
                assert list(got) == list(want)
                for name, array in want.items():
                    np.testing.assert_array_equal(got[name], array)
            got = session.run(inputs)  # over what the last run left
            assert all(np.array_equal(got[name], array) for name, array in want.items())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_residual_network_of_any_batch(resnet, precision, threads, timing_cache) -> None:
    model = quantize(resnet, images(4)) if precision == "int8" else resnet
    engine = build(model, shapes=IMAGES, threads=threads, timing_cache=timing_cache)
    assert {layer.tactic for layer in engine.plan.layers}.isdisjoint({"onnxruntime", "nd"})
    feeds = [images(count) for count in (8, 1, 3, 2, 7)]
    compare(engine, model, feeds, threads, timing_cache=timing_cache)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_encoder_of_any_batch_and_length(
    encoder, encoder_int8, precision, threads, timing_cache
) -> None:
    model = encoder_int8 if precision == "int8" else encoder
    engine = build(model, shapes=TEXT, threads=threads, timing_cache=timing_cache)
    assert len(engine.plan.steps) == 1
    assert {"attention", "norm", "nd"} <= {layer.tactic for layer in engine.plan.layers}
    (output,) = engine.plan.outputs
    assert output.shape == (4, 70, 64)
    feeds = [tokens(*point) for point in POINTS]
    compare(engine, model, feeds, threads, timing_cache=timing_cache)


def test_memory_is_that_of_the_largest_shape(encoder, timing_cache) -> None:
    engine = build(encoder, shapes=TEXT, timing_cache=timing_cache)
    largest = {name: corners[2] for name, corners in TEXT.items()}
    alone = build(encoder, shapes=largest, timing_cache=timing_cache)
    alone_bytes = alone.plan.arena_bytes  # where walks are joined, which open sizes do not allow
    assert alone_bytes * 0.95 <= engine.plan.arena_bytes <= alone_bytes * 1.1 + 4096


def test_outside_the_ranges_and_between_the_inputs(encoder, timing_cache) -> None:
    engine = build(encoder, shapes=TEXT, timing_cache=timing_cache)
    wrong = {**tokens(2, 8), "attention_mask": tokens(2, 9)["attention_mask"]}
    with Session(engine) as session:
        want = session.run(tokens(3, 9))
        for inputs, reason in (
            (tokens(5, 8), r"input_ids\[0\]: expected batch from 1 to 4, got 5"),
            (tokens(2, 71), r"input_ids\[1\]: expected length from 1 to 70, got 71"),
            (wrong, r"attention_mask\[1\]: length is 8 in input_ids\[1\], got 9"),
        ):
            with pytest.raises(InputError, match=reason):
                session.run(inputs)
        again = session.run(tokens(3, 9))
        assert all(np.array_equal(want[name], again[name]) for name in want)


def test_several_profiles_share_weights(encoder_int8, timing_cache, tmp_path) -> None:
    fixed = dict.fromkeys(TEXT, (6, 33))
    short = dict.fromkeys(TEXT, ((1, 1), (2, 16), (9, 20)))
    one = build(encoder_int8, shapes=TEXT, timing_cache=timing_cache)
    both = build(encoder_int8, profiles=[TEXT, short], timing_cache=timing_cache)
    assert both.weights.nbytes < 1.1 * one.weights.nbytes  # packed alike: timed at one shape
    engine = build(encoder_int8, profiles=[TEXT, fixed, short], timing_cache=timing_cache)
    assert engine.plan.arena_bytes == max(p.arena_bytes for p in engine.plan.profiles)
    assert len(engine.plan.steps) == 3
    loaded = Engine.load(engine.save(tmp_path / "e.engine"))
    feeds = [tokens(*point) for point in ((3, 9), (6, 33), (9, 8), (2, 70), (6, 33), (4, 8))]
    compare(loaded, encoder_int8, feeds, timing_cache=timing_cache)
    with Session(loaded) as session:
        for inputs, profile in zip(feeds, (0, 1, 2, 0, 1, 0), strict=True):
            session.run(inputs)
            assert session._current is not None
            assert session._current.profile == profile
        with pytest.raises(InputError, match="fit no profile") as caught:
            session.run(tokens(9, 21))
        assert "profile 3 takes input_ids int64 [batch 1-9, length 1-20]" in str(caught.value)


def test_profiles_of_images_of_several_sizes(timing_cache) -> None:
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 5, 3, 2, 1))
    sizes = ({axis: torch.export.Dim(name) for axis, name in ((0, "n"), (2, "h"), (3, "w"))},)
    model = exported(convolutions, (torch.zeros(2, 3, 16, 18),), ["x"], sizes)
    profiles = [{"x": ((1, 3, h, w), (1, 3, h, w), (3, 3, h, w))} for h, w in ((9, 12), (16, 8))]
    engine = build(model, profiles=[*profiles, {"x": (2, 3, 20, 21)}], timing_cache=timing_cache)
    random = np.random.default_rng(0)
    shapes = ((3, 3, 9, 12), (2, 3, 20, 21), (1, 3, 16, 8), (1, 3, 9, 12), (3, 3, 16, 8))
    feeds = [{"x": random.normal(size=shape).astype(np.float32)} for shape in shapes]
    compare(engine, model, feeds, timing_cache=timing_cache)


def test_open_heights_and_widths_run_on_onnxruntime(timing_cache) -> None:
    model = graph("(float[1,3,h,w] x) => (float[1,3,h,w] y) { y = Conv (x, k) }",
                  k=np.full((3, 3, 1, 1), 0.5, np.float32))  # fmt: skip
    engine = build(model, shapes={"x": ((1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 16, 16))})
    why = why_whole(engine)
    assert "tensor 'x' cannot have these open sizes" in why
    assert "several profiles" in why
    feeds = [{"x": np.ones((1, 3, h, w), np.float32)} for h, w in ((8, 8), (9, 16))]
    compare(engine, model, feeds, timing_cache=timing_cache)


def why_whole(engine) -> str:
    """The reason for which all of the model is one step on ONNX Runtime."""
    (layer,) = engine.plan.layers
    assert (layer.op, layer.tactic) == ("Model", "onnxruntime")
    return " ".join(layer.notes)


class Depthwise(nn.Module):
    """Depthwise and grouped convolutions, activations, a gate of a mean, two joined branches."""

    def __init__(self):
        super().__init__()
        self.stem, self.each = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.mix, self.some = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 24, 3, 1, 1, groups=2)
        self.join, self.head = nn.Conv2d(48, 8, 1), nn.Linear(8, 7)

    def forward(self, x):
        x = functional.relu6(self.each(functional.hardswish(self.stem(x))))
        x = self.mix(x)
        y = functional.silu(self.some(x)) + x
        y = torch.cat([y * torch.sigmoid(y.mean((2, 3), keepdim=True)), functional.relu(x)], 1)
        return self.head(functional.max_pool2d(self.join(y), 2).mean((2, 3)))


class Patches(nn.Module):
    """A vision transformer of one layer: patches, a token of its own, positions, its result."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 32, 8, 8), nn.LayerNorm(32)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.positions = nn.Parameter(torch.randn(1, 17, 32))
        self.joint, self.out, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        q, k, v = self.joint(self.norm(x)).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(2, 3) / 4).softmax(-1) @ v
        return self.head((x + self.out(y.transpose(1, 2).flatten(2)))[:, 0])


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("network", [Depthwise, Patches])
def test_other_networks_of_any_batch(network, precision, timing_cache) -> None:
    torch.manual_seed(0)
    sizes = ({0: torch.export.Dim("batch")},)
    model = exported(network(), (torch.zeros(2, 3, 32, 32),), ["x"], sizes)
    model = quantize(model, images(4)) if precision == "int8" else model
    engine = build(model, shapes=IMAGES, timing_cache=timing_cache)
    assert "onnxruntime" not in {layer.tactic for layer in engine.plan.layers}
    compare(engine, model, map(images, (8, 1, 3)), 2, timing_cache=timing_cache)


class Ends(nn.Module):
    """One attention, and one of many ways to go on from rows of open length."""

    def __init__(self, end):
        super().__init__()
        self.end, self.positions = end, nn.Embedding(80, 32)
        self.parts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.head = nn.Linear(32, 5)

    def forward(self, x, mask):
        batch, length, _ = x.shape
        x = self.parts[3](x) + self.positions(torch.arange(length))
        q, k, v = (part(x).unflatten(2, (2, 16)).transpose(1, 2) for part in self.parts[:3])
        scores = q @ k.transpose(2, 3) / 4
        if self.end == "causal":
            scores = scores + torch.triu(torch.full((length, length), -torch.inf), 1)
        if self.end == "pairs":
            scores = scores + (mask[:, None, :, None] * mask[:, None, None, :] - 1) * 1e9
        y = self.head((scores.softmax(-1) @ v).transpose(1, 2).flatten(2) + x)
        return {
            "first": lambda: y[:, 0].tanh(),
            "mean": lambda: (y * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True),
            "most": lambda: y.max(1).values,
            "tail": lambda: y[:, 1:] * 2,
            "longer": lambda: torch.cat([y, y[:, :1]], 1),
            "flat": lambda: y.reshape(batch, length * 5),
            "turned": lambda: y.transpose(1, 2) + 1,
            "sums": lambda: torch.cumsum(y, 1),
        }.get(self.end, lambda: y)()


ENDS = ("causal", "pairs", "first", "mean", "most", "tail", "longer", "flat", "turned", "sums")


@pytest.mark.parametrize("end", ENDS)
def test_rows_go_on_in_any_way(end, timing_cache) -> None:
    torch.manual_seed(0)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=80)
    sizes = ({0: batch, 1: length},) * 2
    model = exported(Ends(end), (torch.zeros(2, 9, 32), torch.ones(2, 9)), ["x", "mask"], sizes)
    names = [value.name for value in model.graph.inputs]
    ranges = {"x": ((1, 2, 32), (2, 9, 32), (4, 70, 32)), "mask": ((1, 2), (2, 9), (4, 70))}
    ranges = {name: ranges[name] for name in names}
    engine = build(model, shapes=ranges, timing_cache=timing_cache)
    fallbacks = [layer.op for layer in engine.plan.layers if layer.tactic == "onnxruntime"]
    assert fallbacks == (["CumSum"] if end == "sums" else [])
    random, feeds = np.random.default_rng(0), []
    for b, s in ((2, 9), (1, 2), (4, 70), (3, 17)):
        x = random.normal(size=(b, s, 32)).astype(np.float32)
        mask = (random.random((b, s)) < 0.7).astype(np.float32)
        mask[:, 0] = 1
        feeds.append({name: {"x": x, "mask": mask}[name] for name in names})
    compare(engine, model, feeds, timing_cache=timing_cache)


def test_what_no_size_says_runs_on_onnxruntime() -> None:
    halves = graph(
        """(float[N,4] x) => (float[M,4] y) <int64[1] start={0}, int64[1] axis={0}> {
             sizes = Shape(x)
             two = Constant<value = int64 {2}>()
             rows = Gather(sizes, axis)
             half = Div(rows, two)
             part = Slice(x, start, half, axis)
             y = Relu(part) }"""
    )
    engine = build(halves, shapes={"x": ((2, 4), (4, 4), (8, 4))})
    assert "cannot have these open sizes" in why_whole(engine)
    with Session(engine) as session:
        assert session.run({"x": np.ones((6, 4), np.float32)})["y"].shape == (3, 4)


def test_a_smallest_shape_that_changes_the_rank_runs_on_onnxruntime() -> None:
    squeezed = graph("(float[N,4] x) => (float[M] y) { a = Relu(x)\n y = Squeeze(a) }", opset=18)
    engine = build(squeezed, shapes={"x": ((1, 4), (4, 4), (8, 4))})
    assert "at the smallest shape it is" in why_whole(engine)
    with Session(engine) as session:
        shapes = [session.run({"x": np.ones((n, 4), np.float32)})["y"].shape for n in (1, 3)]
    assert shapes == [(4,), (3, 4)]


def test_a_part_that_is_whole_at_small_shapes_runs_on_onnxruntime() -> None:
    most = graph(
        """(float[N,S] x) => (float[N,1] y)
           <int64[1] zero = {0}, int64[1] five = {5}, int64[1] axis = {1}> {
             part = Slice(x, zero, five, axis)
             y = ReduceMean(part, axis) }"""
    )
    engine = build(most, shapes={"x": ((1, 2), (2, 8), (3, 16))})
    why = why_whole(engine)
    assert "tensor 'part' cannot have these open" in why
    assert "at the smallest shape it is [1, 2], not [1, 5]" in why
    engine = build(most, shapes={"x": ((1, 5), (2, 8), (3, 16))})
    assert [layer.op for layer in engine.plan.layers] == ["Slice", "ReduceMean"]


def test_nameless_dimensions_that_must_be_equal_are_told_of() -> None:
    added = graph("(float[?,4] x, float[?,4] z) => (float[?,4] y) { y = Add(x, z) }")
    ranges = ((1, 4), (2, 4), (8, 4))
    with pytest.raises(InputError, match=r"does not take all shapes in the ranges: not x\[0\] 7"):
        build(added, shapes={"x": ranges, "z": ranges})


def test_shapes_and_profiles_are_one_or_the_other(resnet) -> None:
    with pytest.raises(InputError, match="cannot both be given"):
        build(resnet, shapes=IMAGES, profiles=[IMAGES])


def test_a_fallback_that_gives_another_shape_is_caught(timing_cache) -> None:
    model = graph("""(float[N,S] x) => (float[N,S] y) <int64 axis = {1}> { y = CumSum(x, axis) }""")
    engine = build(model, shapes={"x": ((1, 2), (2, 4), (3, 9))}, timing_cache=timing_cache)
    with Session(engine) as session:
        x = np.ones((2, 5), np.float32)
        np.testing.assert_array_equal(session.run({"x": x})["y"], np.cumsum(x, 1))
        bound = session._current
        assert bound is not None
        bound.shapes["y"] = (2, 6)
        with pytest.raises(EngineError, match="another shape than the plan says"):
            session.run({"x": x})


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("seed", [0, 3, 5])
def test_random_graphs_of_any_batch(seed, quantized, timing_cache) -> None:
    model = random_graph(seed, quantized).model.clone()
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape(["N", *list(value.shape)[1:]])
    inner = {v.name: tuple(v.shape)[1:] for v in model.graph.inputs}
    ranges = {n: tuple((b, *dims) for b in (1, 2, 5)) for n, dims in inner.items()}
    engine = build(model, shapes=ranges, timing_cache=timing_cache)
    random = np.random.default_rng(seed)
    feeds = [
        {n: random.normal(size=(b, *dims)).astype(np.float32) for n, dims in inner.items()}
        for b in (5, 1, 3)
    ]
    compare(engine, model, feeds, 1 + seed % 2, timing_cache=timing_cache)
