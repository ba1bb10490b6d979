"""Routed experts in PyTorch: what they compute, how they train, what is exported."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from twofour.core.errors import InputError
from twofour.core.experts import Experts, masked, mixture
from twofour.core.patterns import is_pattern
from twofour.core.ranges import RangeOptions
from twofour.train import (
    FakeQuant,
    MaskedMlp,
    MixtureOfExperts,
    Sparsifier,
    balance_loss,
    export_onnx,
)
from twofour.train.experts import ACTIVATIONS, Mlp


class Net(nn.Module):
    """Both kinds behind a layer; tokens of a negative sum skip the MLP."""

    def __init__(self, **options):
        super().__init__()
        self.inp = nn.Linear(16, 32)
        self.moe = MixtureOfExperts(32, 64, 4, **options)
        self.mlp = MaskedMlp(32, 48, "silu")
        self.out = nn.Linear(32, 8)

    def forward(self, x):
        h = self.inp(x)
        h = h + self.moe(h)
        h = h + self.mlp(h, h.sum(-1) > 0)
        return self.out(h)


def weights(mlps: list[Mlp], activation: str) -> Experts:
    """The modules' weights as the definition has them."""
    stacked = [
        np.stack([getattr(getattr(m, layer), kind).detach().numpy() for m in mlps])
        for layer in ("fc1", "fc2")
        for kind in ("weight", "bias")
    ]
    return Experts(*stacked, ACTIVATIONS[activation][0])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("k", "normalize"), [(1, True), (2, False), (4, True)])
def test_it_is_the_definition(k, normalize, activation) -> None:
    moe = MixtureOfExperts(24, 40, 4, k, activation=activation, normalize=normalize)
    x = torch.randn(2, 5, 24)
    logits = moe.logits(x).detach().numpy()
    want = mixture(
        x.numpy(), logits, weights(list(moe.experts), activation), k, normalize=normalize
    )
    np.testing.assert_allclose(moe(x).detach().numpy(), want, atol=1e-5)


def test_masked_mlp_is_the_definition() -> None:
    mlp = MaskedMlp(24, 40)
    x, mask = torch.randn(2, 5, 24), torch.rand(2, 5) < 0.5
    want = masked(x.numpy(), mask.numpy(), weights([mlp], "gelu"))
    np.testing.assert_allclose(mlp(x, mask).detach().numpy(), want, atol=1e-5)
    np.testing.assert_allclose(mlp(x)[mask].detach(), mlp(x, mask)[mask].detach(), atol=1e-5)


def test_gradients_reach_router_and_chosen_experts_alone() -> None:
    moe = MixtureOfExperts(8, 16, 4, 2)
    with torch.no_grad():
        moe.router.weight[3] = -100
        moe.router.weight[:3].abs_()
    x = torch.rand(9, 8)
    moe(x).square().sum().backward()
    assert moe.router.weight.grad is not None
    assert moe.router.weight.grad.abs().sum() > 0
    used = [expert.fc1.weight.grad is not None for expert in moe.experts]
    assert used[3] is False
    assert sum(used) >= 2


def test_gradients_are_those_of_the_dense_form() -> None:
    moe = MixtureOfExperts(6, 10, 3, 2).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moe, (x,))
    mlp = MaskedMlp(6, 10).double()
    mask = torch.tensor([True, False, True, True, False])
    assert torch.autograd.gradcheck(lambda value: mlp(value, mask), (x,))


def test_balance_loss() -> None:
    even = torch.eye(4).repeat(3, 1) * 50
    assert balance_loss(even) == pytest.approx(1.0)
    assert balance_loss(torch.eye(4)[:1].repeat(9, 1) * 50) == pytest.approx(4.0)
    logits = torch.randn(32, 4, requires_grad=True)
    before = balance_loss(logits, 2)
    before.backward()
    assert logits.grad is not None
    assert balance_loss(logits - 0.5 * logits.grad, 2) < before


def test_a_router_learns_which_expert() -> None:
    """Two linear tasks told apart by the first input: the router has to separate them."""
    moe = MixtureOfExperts(8, 32, 2, 1, activation="relu", normalize=False)
    optimizer = torch.optim.Adam(moe.parameters(), 1e-2)
    x = torch.randn(256, 8)
    y = torch.where(x[:, :1] > 0, 2 * x, -x.flip(1))
    losses = []
    for _ in range(150):
        loss = (moe(x) - y).square().mean() + 0.01 * balance_loss(moe.logits(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


def run(path, x: torch.Tensor) -> np.ndarray:
    return onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})[0]


def test_exported_as_nodes_that_onnxruntime_runs(tmp_path) -> None:
    net = Net().eval()
    path = tmp_path / "net.onnx"
    export_onnx(net, torch.randn(3, 7, 16), path, dynamic=("batch", "length"))
    made = onnx.load(path)
    onnx.checker.check_model(made, full_check=True)
    nodes = [node for node in made.graph.node if node.domain]
    assert [node.name for node in nodes] == [
        "moe/MixtureOfExpertsGelu",
        "mlp/MaskedMlpSilu",
    ]
    assert list(nodes[0].input)[2:] == ["moe.w1", "moe.b1", "moe.w2", "moe.b2"]
    assert {a.name for a in nodes[0].attribute} == {"k", "normalize"}
    assert len(made.functions) == 2
    shapes = {each.name: list(each.dims) for each in made.graph.initializer}
    assert shapes["moe.w1"] == [4, 64, 32]
    assert shapes["mlp.w2"] == [32, 48]
    assert not [name for name in shapes if "experts" in name]
    for size in ((3, 7), (1, 1), (2, 9)):
        x = torch.randn(*size, 16)
        np.testing.assert_allclose(run(path, x), net(x).detach().numpy(), atol=1e-5)


def test_pruned_experts_keep_their_pattern_and_the_file_promises_it(tmp_path) -> None:
    net = Net().eval()
    sparsifier = Sparsifier(net, "2:4")
    sparsifier.prune()
    assert not is_pattern(net.moe.router.weight.detach().numpy(), "2:4")
    path = tmp_path / "net.onnx"
    checked = export_onnx(net, torch.randn(3, 7, 16), path, dynamic=("batch", "length"))
    names = {f"moe.experts.{i}.fc{n}" for i in range(4) for n in (1, 2)}
    assert names <= set(checked)
    assert {"mlp.fc1", "mlp.fc2"} <= set(checked)
    made = onnx.load(path)
    promised = {p.key: p.value for p in made.metadata_props}["twofour.patterns"]
    assert '"moe.w1": "2:4"' in promised
    x = torch.randn(3, 7, 16)
    np.testing.assert_allclose(run(path, x), net(x).detach().numpy(), atol=1e-5)


def test_refusals(tmp_path) -> None:
    with pytest.raises(InputError, match="cannot choose 5 of 4 experts"):
        MixtureOfExperts(8, 16, 4, 5)
    with pytest.raises(InputError, match="no activation 'tanh'"):
        MaskedMlp(8, 16, "tanh")
    quant = FakeQuant(RangeOptions("minmax"))
    net = nn.Sequential(quant, MixtureOfExperts(8, 16, 4)).eval()
    quant.mode = "collect"
    net(torch.randn(3, 8))
    quant.compute()
    with pytest.raises(InputError, match="of a model with quantizers"):
        export_onnx(net, torch.randn(3, 8), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_computed_from_parameters(tmp_path) -> None:
    """The exporter folds them."""
    net = Net().eval()
    nn.utils.parametrizations.weight_norm(net.moe.experts[1].fc1)
    export_onnx(net, torch.randn(3, 7, 16), tmp_path / "net.onnx")
    x = torch.randn(5, 7, 16)
    np.testing.assert_allclose(run(tmp_path / "net.onnx", x), net(x).detach().numpy(), atol=1e-5)
