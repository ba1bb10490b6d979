"""Transformers through build and Session: one native step, close to ONNX Runtime's results."""

from __future__ import annotations

import io
import logging
import re
import warnings

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.compiler.engines import reference, run_twice, steps
from tests.graphs import graph
from twofour.compiler.build import build
from twofour.compiler.importer import import_graph
from twofour.core.errors import UnsupportedError
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize

BATCH, LENGTH, VOCABULARY = 2, 12, 50
CHANNELS, HEADS = 32, 2
EPS = float(np.finfo(np.float32).eps)


class SelfAttention(nn.Module):
    """Attention of separate or joint projections, by hand or by torch's own function."""

    def __init__(self, joint, by_hand):
        super().__init__()
        self.by_hand = by_hand
        self.joint = nn.Linear(CHANNELS, 3 * CHANNELS) if joint else None
        self.parts = nn.ModuleList(nn.Linear(CHANNELS, CHANNELS) for _ in range(3 * (not joint)))
        self.out = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x, mask):
        if self.joint is not None:
            q, k, v = self.joint(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (part(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.parts)
        if self.by_hand:
            scores = q @ k.transpose(2, 3) / (q.shape[-1] ** 0.5)
            y = (scores if mask is None else scores + mask).softmax(-1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and two dense layers; normalized before them, or after the sums."""

    def __init__(self, before, **attention):
        super().__init__()
        self.before, self.attention = before, SelfAttention(**attention)
        self.norms = nn.ModuleList(nn.LayerNorm(CHANNELS) for _ in range(2))
        self.wide, self.narrow = nn.Linear(CHANNELS, 64), nn.Linear(64, CHANNELS)

    def forward(self, x, mask):
        first, second = self.norms
        if self.before:
            x = x + self.attention(first(x), mask)
            return x + self._dense(second(x))
        x = first(self.attention(x, mask) + x)
        return second(self._dense(x) + x)

    def _dense(self, x):
        return self.narrow(functional.gelu(self.wide(x)))


class Text(nn.Module):
    """Word and position tables, blocks normalized after the sums, the first token's vector."""

    def __init__(self, by_hand):
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, CHANNELS), nn.Embedding(64, CHANNELS)
        self.norm, self.pool = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.blocks = nn.ModuleList(
            Block(before=False, joint=False, by_hand=by_hand) for _ in range(2)
        )

    def forward(self, ids, keep):
        x = self.norm(self.words(ids) + self.places.weight[: ids.shape[1]])
        mask = (1.0 - keep[:, None, None, :].float()) * -10000.0
        for block in self.blocks:
            x = block(x, mask)
        return x, torch.tanh(self.pool(x[:, 0]))


class Image(nn.Module):
    """Patches to tokens, blocks normalized before the products, a classifier on the first token."""

    def __init__(self, joint):
        super().__init__()
        self.patches = nn.Conv2d(3, CHANNELS, 4, 4)
        self.first = nn.Parameter(torch.randn(1, 1, CHANNELS))
        self.places = nn.Parameter(torch.randn(1, 13, CHANNELS))
        self.blocks = nn.ModuleList(
            Block(before=True, joint=joint, by_hand=False) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.norm(x)[:, 0])


def export(module, inputs, dynamo):
    """The module as ONNX with the names of its inputs."""
    torch.manual_seed(0)
    buffer = io.BytesIO()
    values = tuple(torch.from_numpy(array) for array in inputs.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            names = list(inputs)
            program = torch.onnx.export(
                module, values, dynamo=True, verbose=False, input_names=names, opset_version=18
            )
            return ir.from_proto(program.model_proto)
        torch.onnx.export(
            module, values, buffer, dynamo=False, input_names=list(inputs), opset_version=17
        )
    return ir.from_proto(onnx.load_from_string(buffer.getvalue()))


def text_inputs(count=BATCH, seed=0):
    random = np.random.default_rng(seed)
    keep = (np.arange(LENGTH) < random.integers(4, LENGTH + 1, (count, 1))).astype(np.int64)
    return {"ids": random.integers(0, VOCABULARY, (count, LENGTH)), "keep": keep}


def image_inputs(count=BATCH, seed=0):
    random = np.random.default_rng(seed)
    return {"x": random.normal(size=(count, 3, 12, 16)).astype(np.float32)}


NETWORKS = {
    "text": (lambda: Text(by_hand=False), text_inputs),
    "text_by_hand": (lambda: Text(by_hand=True), text_inputs),
    "image": (lambda: Image(joint=False), image_inputs),
    "image_joint": (lambda: Image(joint=True), image_inputs),
}
CASES = [(name, name in ("text", "image_joint")) for name in NETWORKS]
IDS = [f"{name}-{'dynamo' if dynamo else 'torchscript'}" for name, dynamo in CASES]


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def network(request):
    """An exported network, inputs for it, and its name."""
    name, dynamo = request.param
    make, inputs = NETWORKS[name]
    torch.manual_seed(1)
    return export(make().eval(), inputs(), dynamo), inputs, name


def blocks_of(engine, kinds):
    """How often each of these operators is there."""
    (step,) = steps(engine)
    assert step[0] == "native"
    return [step[1].count(kind) for kind in kinds]


def test_float(network, timing_cache):
    model, inputs, name = network
    engine = build(model, timing_cache=timing_cache)
    attention = "AttentionMask" if name.startswith("text") else "Attention"
    assert blocks_of(engine, [attention, "LayerNorm", "GemmAdd", "GemmGelu", "Split"]) == [
        2, 5, 4, 2, 0
    ]  # fmt: skip
    assert {layer.tactic for layer in engine.plan.layers} >= {"attention", "norm"}
    feeds = inputs()
    got, want = run_twice(engine, feeds), reference(import_graph(model), feeds)
    for key, value in want.items():
        # About 60 sums in a row, each K <= 64 terms of normalized size, off by eps * sqrt(K) each.
        assert np.abs(got[key] - value).max() <= 60 * 8 * EPS * max(1, np.abs(value).max())


def cosine(a, b):
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def test_int8(network, timing_cache):
    model, inputs, name = network
    # One network with the other kind of activations, too.
    activation = "uint8" if name == "text_by_hand" else "int8"
    data = inputs(24, seed=5)
    quantized = quantize(model, data, QuantizeOptions(activation=activation, threads=1))
    engine = build(quantized, timing_cache=timing_cache)
    text = name.startswith("text")
    kinds = ["QAttentionMask" if text else "QAttention", "QGemmAddFloatF", "QGemmGelu", "QGemm"]
    assert blocks_of(engine, kinds) == [2, 4, 2, 2], "projections are one product each"
    # Of text the last one is an output in float; of an image all feed products alone.
    assert blocks_of(engine, ["LayerNormQ", "QLayerNorm"]) == ([4, 0] if text else [0, 5])
    feeds = inputs()
    got = run_twice(engine, feeds)
    same, true = reference(import_graph(quantized), feeds), reference(import_graph(model), feeds)
    for key, value in got.items():
        assert cosine(value, true[key]) >= 0.99
        # The same roundings but for values between two steps.
        assert cosine(value, same[key]) >= 0.999


def test_two_threads_give_the_same(timing_cache):
    torch.manual_seed(1)
    model = export(Text(by_hand=False).eval(), text_inputs(), True)
    quantized = quantize(model, text_inputs(24), QuantizeOptions(threads=1))
    engine = build(quantized, timing_cache=timing_cache)
    feeds = text_inputs()
    one, two = run_twice(engine, feeds, 1), run_twice(engine, feeds, 2)
    for key, value in one.items():
        assert np.array_equal(value, two[key])


def attention_model(more, **constants):
    """Attention of one input alone, its projections, and a mask that is added to the scores."""
    shape = f"float[{BATCH},{LENGTH},{CHANNELS}]"
    body = "".join(
        f"{x}l = MatMul (x, w{x})\n {x}s = Reshape ({x}l, split)\n"
        f" {x} = Transpose <perm = [0, 2, {order}]> ({x}s)\n "
        for x, order in (("q", "1, 3"), ("k", "3, 1"), ("v", "1, 3"))
    )
    body += (
        "s = MatMul (q, k)\n t = Add (s, mask)\n p = Softmax <axis = -1> (t)\n o = MatMul (p, v)\n"
        " u = Transpose <perm = [0, 2, 1, 3]> (o)\n y = Reshape (u, join)"
    )
    random = np.random.default_rng(0)
    weights = {f"w{x}": random.normal(size=(CHANNELS, CHANNELS)) / 6 for x in "qkv"}
    return graph(
        f"({shape} x{more}) => ({shape} y) {{ {body} }}",
        **{name: array.astype(np.float32) for name, array in weights.items()},
        split=np.array([BATCH, LENGTH, HEADS, -1]),
        join=np.array([BATCH, LENGTH, CHANNELS]),
        **constants,
    )


# Scores, shares and results: sums of CHANNELS, CHANNELS / HEADS and LENGTH terms.
ATTENTION_BOUND = 3 * 8 * EPS * LENGTH


def test_causal_attention(timing_cache):
    """A decoder's mask is known when the engine is built: no mask is read."""
    hidden = np.triu(np.full((LENGTH, LENGTH), -np.inf, np.float32), 1)
    model = attention_model("", mask=hidden)
    engine = build(model, timing_cache=timing_cache)
    assert blocks_of(engine, ["Gemm", "AttentionCausal"]) == [1, 1]
    x = np.random.default_rng(1).normal(size=(BATCH, LENGTH, CHANNELS))
    feeds = {"x": x.astype(np.float32)}
    got, want = run_twice(engine, feeds)["y"], reference(model, feeds)["y"]
    assert np.abs(got - want).max() <= ATTENTION_BOUND * np.abs(want).max()


MASKS = [(BATCH, 1, 1, LENGTH), (BATCH, 1, LENGTH, LENGTH), (1, 1, LENGTH, LENGTH), (LENGTH,)]


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks_of_any_shape(shape, timing_cache):
    model = attention_model(f", float[{','.join(map(str, shape))}] mask")
    engine = build(model, timing_cache=timing_cache)
    assert blocks_of(engine, ["Gemm", "AttentionMask"]) == [1, 1]
    random = np.random.default_rng(2)
    mask = random.normal(size=shape)
    mask[random.random(shape) < 0.2] = -np.inf
    feeds = {
        "x": random.normal(size=(BATCH, LENGTH, CHANNELS)).astype(np.float32),
        "mask": mask.astype(np.float32),
    }
    got, want = run_twice(engine, feeds)["y"], reference(model, feeds)["y"]
    assert np.isfinite(want).all()
    assert np.abs(got - want).max() <= ATTENTION_BOUND * np.abs(want).max()


def test_a_workspace_too_small_is_refused(timing_cache):
    """It names the layer, what it needs, and the option."""
    model = attention_model("", mask=np.zeros((LENGTH, LENGTH), np.float32))
    with pytest.raises(UnsupportedError, match="within the workspace") as caught:
        build(model, timing_cache=timing_cache, workspace_bytes=64)
    (reason,) = caught.value.reasons
    needed = int(re.search(r"needs (\d+) bytes", reason)[1])
    assert f"--workspace {needed}" in str(caught.value)
    build(model, timing_cache=timing_cache, workspace_bytes=needed)
