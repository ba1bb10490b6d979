"""From PyTorch to an engine: export, prune, quantize, build; ONNX Runtime runs the same file."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from tests.operators.experts_harness import make
from tests.operators.test_experts_text import model_of
from twofour.compiler.build import build
from twofour.core.experts import MASKED, MIXTURE
from twofour.core.machine import usable_cores
from twofour.onnx_tools.dynamic import quantize_dynamic
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.prune import prune
from twofour.runtime.session import Session
from twofour.train import MaskedMlp, MixtureOfExperts, export_onnx

SHAPE = (3, 9, 16)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(16, 32)
        self.moe = MixtureOfExperts(32, 64, 4, 2)
        self.mlp = MaskedMlp(32, 48, "silu")

    def forward(self, x):
        h = self.inp(x)
        h = h + self.moe(h)
        return h + self.mlp(h, h[..., 0] > 0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("experts") / "net.onnx"
    export_onnx(Net().eval(), torch.randn(*SHAPE), path)
    return path


def plain(engine) -> set[str]:
    """Tactics of the layers, without what they are configured with."""
    return {layer.tactic for layer in engine.plan.layers}


@pytest.mark.parametrize(("form", "threads"), [("float", 1), ("int8", 2)])
def test_a_network_runs_natively_and_as_onnxruntime_does(exported, tmp_path, form, threads) -> None:
    model = load_model(exported)
    if form == "int8":
        model = quantize_dynamic(prune(model)[0])
    path = save_model(model, tmp_path / "model.onnx")
    engine = build(
        path,
        shapes={"x": SHAPE},
        threads=min(threads, usable_cores()),
        tuning_effort=0,
        race=False,
    )
    assert "onnxruntime" not in plain(engine)
    names = {layer.name for layer in engine.plan.layers}
    assert any("MixtureOfExpertsGelu" in name for name in names)
    routed = [layer for layer in engine.plan.layers if layer.tactic.startswith("routed")]
    assert {layer.precision for layer in routed} == {"int8" if form == "int8" else "float32"}
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    want = onnxruntime.InferenceSession(path).run(None, {"x": x})[0]
    with Session(engine) as session:
        got = next(iter(session.run({"x": x}).values()))
        np.testing.assert_array_equal(next(iter(session.run({"x": x}).values())), got)
    bound = 1e-5 if form == "float" else 5e-3
    np.testing.assert_allclose(got, want, atol=bound * np.abs(want).max())


@pytest.mark.parametrize("base", [MIXTURE, MASKED])
def test_an_engine_equals_the_definition(base, tmp_path) -> None:
    """Routing that no sample of the build had: all tokens to one expert, no row set."""
    case = make(np.random.default_rng(0), base=base, pattern="2:4", shape=(21,), hidden=32)
    path = save_model_of(case, tmp_path)
    chooser = list(case.values)[1]
    others = [case.chooser, np.zeros_like(case.chooser)]
    with Session(build(path, tuning_effort=1, race=False)) as session:
        for values in others:
            changed = case.with_chooser(values)
            got = next(iter(session.run({"x": case.x, chooser: values}).values()))
            np.testing.assert_array_equal(got, changed.expected())


def save_model_of(case, folder):
    path = folder / "case.onnx"
    path.write_bytes(model_of(case).SerializeToString())
    return path


def test_weights_are_in_the_engine_once(tmp_path) -> None:
    """Packed: those of 2:4 take three quarters of the int8 ones, and a little for the rest."""
    random = np.random.default_rng(0)
    case = make(random, pattern="2:4", shape=(16,), hidden=128, inner=256, experts=4)
    engine = build(save_model_of(case, tmp_path), tuning_effort=1, race=False)
    raw = case.experts.w1.size + case.experts.w2.size
    sparse = [layer for layer in engine.plan.layers if layer.weight_bytes]
    assert sum(layer.weight_bytes for layer in sparse) < 1.25 * raw
    assert engine.weights.nbytes < 1.4 * raw
