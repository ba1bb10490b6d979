"""Whatever the graph says is free can be permuted at random, and the outputs stay."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tests.train.channel_models import MODELS, Lambda, conv, images
from twofour.core.errors import GateError, UnsupportedError
from twofour.train.channels import trace_channels
from twofour.train.folding import Folded
from twofour.train.networks.mobilenet import CONFIGS, MobileConfig, MobileNet
from twofour.train.networks.resnet import CifarResNet, ResNet
from twofour.train.networks.transformer import Bert, BertConfig, example_inputs
from twofour.train.networks.vit import Vit, VitConfig
from twofour.train.networks.yolo import Yolo, YoloConfig
from twofour.train.same_outputs import require_same

BERT = BertConfig(2, 16, 2, 32, 50, positions=12, pooler=True)
EXCITED = MobileConfig(
    ((1, 16, 1, 1), (4, 24, 2, 2)), stem=16, head=32, classes=5, hard_swish=True, excite=True
)
NETWORKS = {
    "resnet8": (lambda: CifarResNet(8), lambda: torch.randn(2, 3, 16, 16)),
    "resnet18": (lambda: ResNet(18, 5), lambda: torch.randn(1, 3, 32, 32)),
    "mobilenetv2": (lambda: MobileNet(CONFIGS["mobilenetv2"]), lambda: torch.randn(1, 3, 32, 32)),
    "mobilenet_excited": (lambda: MobileNet(EXCITED), lambda: torch.randn(2, 3, 16, 16)),
    "yolo": (lambda: Yolo(YoloConfig(4, 1, 6)), lambda: torch.randn(1, 3, 64, 64)),
    "vit": (lambda: Vit(VitConfig(2, 16, 2, 32, 16, 8, 5)), lambda: torch.randn(2, 3, 16, 16)),
    "bert": (lambda: Bert(BERT), lambda: example_inputs(BERT, 2, 7)),
}


def made(name, seed=0):
    make, inputs = {**MODELS, **NETWORKS}[name]
    torch.manual_seed(seed)
    model, x = make().eval(), inputs()
    for module in model.modules():  # statistics of their own, so that a wrong order shows
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
            nn.init.normal_(module.weight)
        if getattr(module, "bias", None) is not None and isinstance(module.bias, nn.Parameter):
            nn.init.normal_(module.bias)
    return model, x


def sizes(graph):
    return sorted(len(space) for space in graph.channels.spaces())


@pytest.mark.parametrize("name", [*MODELS, *NETWORKS])
def test_free_channels_may_be_permuted_at_random(name):
    model, x = made(name)
    graph = trace_channels(model, x)
    folded = Folded(graph, model)
    random = np.random.default_rng(0)
    spaces = graph.channels.spaces()
    assert spaces
    for space in spaces:
        folded.fold(space, random.permutation(len(space)))
    require_same(model, x, folded.tensors, seed=1)
    changed = [n for n, t in folded.tensors.items() if not torch.equal(t, model.state_dict()[n])]
    assert changed


@pytest.fixture(scope="module")
def traced():
    found = {}
    for name in MODELS:
        model, x = made(name)
        found[name] = model, x, trace_channels(model, x)
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([*MODELS]), st.data())
def test_any_permutation_of_any_space_leaves_outputs_equal(traced, name, data):
    model, x, graph = traced[name]
    space = data.draw(st.sampled_from(graph.channels.spaces()))
    folded = Folded(graph, model)
    folded.fold(space, np.array(data.draw(st.permutations(range(len(space))))))
    require_same(model, x, folded.tensors, seed=2)


@pytest.mark.parametrize("name", ["residual", "densenet", "c2f", "encoder", "gated", "bert"])
def test_an_order_that_is_not_folded_everywhere_is_found_out(name):
    model, x = made(name)
    graph = trace_channels(model, x)
    folded = Folded(graph, model)
    space = max(graph.channels.spaces(), key=len)
    held = [n for n, axes in folded.roots.items() for r in axes if r is not None
            and np.isin(space.roots, r).any()]  # fmt: skip
    folded.fold(space, np.roll(np.arange(len(space)), 1))
    for left_out in held:
        tensors = {k: v for k, v in folded.tensors.items() if k != left_out}
        with pytest.raises(GateError, match="change what"):
            require_same(model, x, tensors, seed=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("residual", [16, 24]),
        ("densenet", [8, 8, 16]),
        ("unet", [8, 8, 16, 16]),
        ("c2f", [16, 16, 16, 16, 16]),
        ("squeeze_excite", [8, 16]),
        ("option_a", [8, 8, 16, 16]),
        ("class_token", [16, 24]),
        ("einsums", [8, 8, 8, 8, 12, 16]),
        ("shared", [24]),  # what reads the input in its first turn cannot move
    ],
)
def test_spaces_are_as_large_as_they_can_be(name, expected):
    model, x = made(name)
    assert sizes(trace_channels(model, x)) == expected


def test_the_halves_of_a_split_are_spaces_of_their_own():
    model, x = made("c2f")
    graph = trace_channels(model, x)
    folded = Folded(graph, model)
    rows = folded.roots["a.weight"][0]
    first = [s for s in graph.channels.spaces() if np.isin(s.roots, rows[:16]).all()]
    second = [s for s in graph.channels.spaces() if np.isin(s.roots, rows[16:]).all()]
    assert len(first) == len(second) == 1
    assert first[0] is not second[0]


def test_groups_of_a_convolution_are_permuted_inside():
    model, x = made("resnext")
    graph = trace_channels(model, x)
    assert graph.grouped["b.weight"].shape == (4, 8)
    assert sizes(graph) == [8, 8, 8, 8, 16, 16, 16, 16, 16]


def test_heads_are_permuted_inside():
    model, x = made("bert")
    graph = trace_channels(model, x)
    found = sizes(graph)
    assert found.count(8) >= 2 * 2 * 2  # layers, heads, and q with k beside v
    assert 32 in found


REASONS = {
    "an output of the network": (lambda m, x: m.a(x), {"a": conv(3, 8)}),
    "read by the operator index_select": (
        lambda m, x: m.b(m.a(x).index_select(1, torch.tensor([3, 1, 0, 2, 4, 5, 6, 7]))),
        {"a": conv(3, 8), "b": conv(8, 4)},
    ),
    "read by the operator topk": (
        lambda m, x: m.b(m.a(x).topk(4, 1)[0]),
        {"a": conv(3, 8), "b": conv(4, 4)},
    ),
    "channels along different axes are combined": (
        lambda m, x: m.b(m.a(x) + m.a(x).transpose(1, 3)),
        {"a": conv(3, 8), "b": conv(8, 4)},
    ),
    "an operator mixes positions of the axis that the channels lie along": (
        lambda m, x: functional.max_pool1d(m.a(x).mean((2, 3)), 3, 1, 1),
        {"a": conv(3, 8)},
    ),
    "multiplied with a weight that is computed or viewed otherwise": (
        lambda m, x: functional.conv2d(m.a(x), m.b.weight / m.b.weight.norm()),
        {"a": conv(3, 8), "b": conv(8, 4)},
    ),
    "combined element by element with values that are no parameter": (
        lambda m, x: m.b(m.a(x) * x.mean((1, 2))[:, :, None, None]),
        {"a": conv(3, 8), "b": conv(8, 4)},
    ),
}


@pytest.mark.parametrize("reason", [*REASONS])
def test_channels_that_stay_have_a_reason(reason):
    forward, layers = REASONS[reason]
    graph = trace_channels(Lambda(forward, **layers), images())
    why = {**graph.channels.alone(), **graph.channels.fixed()}
    written = graph.channels.roots(graph.axes["a.weight"][0])
    assert {why[root] for root in written.tolist()} == {reason}
    assert not any(np.isin(s.roots, written).any() for s in graph.channels.spaces())


def zeroed(m, x):
    y = m.a(x).clone()
    y[:, 3] = 0
    return m.b(y)


def overwritten(m, x):
    y = torch.zeros(2, 16, 8, 8, dtype=x.dtype)
    y[:, 8:] = m.a(x)
    return m.b(y)


def half_rectified(m, x):
    y = m.a(x)
    y[:, :4].relu_()
    return m.b(y)


@pytest.mark.parametrize(
    ("forward", "width", "free"),
    [(zeroed, 8, [7]), (overwritten, 16, []), (half_rectified, 8, [4])],
)
def test_channels_that_are_changed_in_place_stay(forward, width, free):
    torch.manual_seed(0)
    model, x = Lambda(forward, a=conv(3, 8), b=conv(width, 4)), images()
    graph = trace_channels(model, x)
    assert sizes(graph) == free
    folded = Folded(graph, model)
    for space in graph.channels.spaces():
        folded.fold(space, np.roll(np.arange(len(space)), 1))
    require_same(model, x, folded.tensors, seed=1)


def test_control_flow_is_refused_with_a_reason():
    model = Lambda(lambda m, x: m.a(x) if x.sum() > 0 else x, a=conv(3, 3))
    with pytest.raises(UnsupportedError, match=r"torch\.export"):
        trace_channels(model, images())


def test_mixing_tokens_leaves_channels_free():
    def forward(m, x):
        x = m.enter(x)
        x = x + m.tokens(x.transpose(1, 2)).transpose(1, 2)
        return m.head(x.mean(1))

    torch.manual_seed(0)
    model = Lambda(forward, enter=nn.Linear(8, 16), tokens=nn.Linear(6, 6), head=nn.Linear(16, 5))
    graph = trace_channels(model, torch.randn(2, 6, 8))
    assert sizes(graph) == [16]


def test_the_model_is_left_as_it_was():
    model, x = made("residual")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace_channels(model, (x,))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_similarity_behind_an_encoder_frees_its_stream():
    class Similarity(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = Bert(BertConfig(1, 16, 2, 32, 50, positions=12))

        def forward(self, ids, mask, types):
            pooled = (self.encoder(ids, mask, types) * mask[:, :, None]).sum(1)
            unit = functional.normalize(pooled, dim=-1)
            return unit @ unit.T

    torch.manual_seed(0)
    model, x = Similarity().eval(), example_inputs(BERT, 2, 7)
    graph = trace_channels(model, x)
    assert 16 in sizes(graph)
    folded = Folded(graph, model)
    for space in graph.channels.spaces():
        folded.fold(space, np.random.default_rng(0).permutation(len(space)))
    require_same(model, x, folded.tensors, seed=1)
