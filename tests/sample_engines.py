"""Hand-made engines: data of the right shape for tests that never run one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from twofour.core.sizes import Symbol, symbol_size
from twofour.core.target import Target
from twofour.engine import Candidate, Engine, Fill, Layer, Plan, Profile, Step, TensorInfo

CONV = Layer(
    name="layer1.0.conv1",
    op="QConvRelu",
    tactic="2:4 H",
    config="28x1",
    time_us=12.5,
    shape="16x32x32 -> 16x32x32 k3",
    precision="int8",
    pattern="2:4",
    macs=2_359_296,
    weight_bytes=1728,
    candidates=(
        Candidate("dense", "14x2", 18.0),
        Candidate("dense", "28x1", 19.5),
        Candidate("2:4 H", "28x1", 12.5),
        Candidate("2:4 C", "12x2", 14.0),
        Candidate("2:4 pair", "14x2", None, "w is not 2:4/pair: channels 3 and 19 differ"),
    ),
)
STEM = Layer(
    name="conv1",
    op="QConvRelu",
    tactic="dense",
    config="28x1",
    time_us=6.0,
    shape="3x32x32 -> 16x32x32 k3",
    precision="int8",
    pattern="dense",
    macs=442_368,
    weight_bytes=432,
    candidates=(
        Candidate("dense", "28x1", 6.0),
        Candidate("2:4 H", "", None, "w is not 2:4 along C: channel 0 holds 3 nonzeros"),
    ),
    notes=("3 input channels: no group of 4",),
)
SLOW_SPARSE = Layer(
    name="linear",
    op="QGemmF",
    tactic="dense",
    config="12x2",
    time_us=1.0,
    shape="64 -> 10",
    precision="int8",
    pattern="2:4",
    macs=640,
    weight_bytes=640,
    candidates=(Candidate("dense", "12x2", 1.0), Candidate("2:4 C", "12x1", 1.25)),
)
SOFTMAX = Layer(
    name="softmax",
    op="Softmax",
    tactic="onnxruntime",
    shape="1x10",
    precision="float32",
    notes=("no kernel for Softmax",),
)


def sample_engine(target: Target | None = None) -> Engine:
    """One native step of three layers and a fallback step; its code is no code."""
    profile = Profile(
        inputs=(TensorInfo("x", "float32", (1, 3, 32, 32)),),
        outputs=(TensorInfo("y", "float32", (1, 10)),),
        boundary=(TensorInfo("logits", "float32", (1, 10)),),
        steps=(
            Step("native", "net0", ("x",), ("logits",), (0, 1, 2)),
            Step("onnxruntime", "tail", ("logits",), ("y",), (3,)),
        ),
        arena_bytes=4096,
        fills=(Fill(0, 64, 128), Fill(4032, 64, 0)),
    )
    plan = Plan(
        target=target or Target("vector", "x86_64", "A CPU"),
        version="0.1.0",
        source_sha256="ab" * 32,
        profiles=(profile,),
        layers=(STEM, CONV, SLOW_SPARSE, SOFTMAX),
        threads=1,
        code=("net0",),
        source_name="resnet20.onnx",
        graph={"nodes_before": 80, "nodes_after": 4},
    )
    random = np.random.default_rng(0)
    return Engine(
        plan,
        random.integers(0, 256, 2800, dtype=np.uint8),
        {"net0": random.integers(0, 256, 300, dtype=np.uint8)},
        {"tail": random.integers(0, 256, 200, dtype=np.uint8)},
    )


def open_engine() -> Engine:
    """The sample with a batch of 1 to 8, usually 2, and halos behind its symbol."""
    engine = sample_engine()
    (profile,) = engine.plan.profiles
    batch = Symbol("batch", 1, 2, 8)
    size = symbol_size([batch], 0)
    opened = replace(
        profile,
        inputs=(TensorInfo.of("x", "float32", (size, 3, 32, 32)),),
        outputs=(TensorInfo.of("y", "float32", (size, 10)),),
        boundary=(TensorInfo.of("logits", "float32", (size, 10)),),
        fills=(Fill(64, 64, 128), Fill(4032, 64, 0)),
        symbols=(batch,),
    )
    return replace(engine, plan=replace(engine.plan, profiles=(opened,)))
