"""An exported file computes what the model does, in its names, with its patterns."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from twofour.core import patterns
from twofour.core.errors import GateError, InputError
from twofour.train import Sparsifier, export_onnx


class Network(nn.Module):
    """Conv-BatchNorm, a grouped conv, a Linear used on 3-D and 2-D input, option-A padding."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.conv = nn.Conv2d(8, 32, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(32, 32, 1, groups=4)
        self.tokens = nn.Linear(32, 32)
        self.shared = nn.Linear(32, 16, bias=False)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = torch.relu(self.conv(x))
        x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 12, 12))
        y = self.grouped(torch.relu(x + y)).mean((2, 3))
        z = self.tokens(torch.stack([y, -y], 1))
        return self.shared(z)[:, 0] + self.shared(y)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Network()
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8))
    return model.to(memory_format=torch.channels_last)


def run(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def test_same_numbers_for_any_batch_and_names_of_the_model(model, tmp_path):
    Sparsifier(model, "2:4/pair").prune()
    path = tmp_path / "model.onnx"
    checked = export_onnx(model, torch.randn(1, 3, 8, 8), path)
    expected = dict.fromkeys(("conv", "grouped", "tokens"), "2:4/pair")
    assert checked == expected | {"shared": "2:4"}, "16 output channels hold no pair"
    assert model.training
    onnx.checker.check_model(path, full_check=True)
    model.eval()
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        # Sums of at most 8 * 9 products a layer, few layers deep: 1e-5 is far above their rounding.
        np.testing.assert_allclose(run(path, x.numpy()), model(x).detach(), rtol=1e-4, atol=1e-5)

    graph = onnx.load(path).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert {"stem.0", "conv", "grouped", "tokens", "shared", "Pad"} <= set(names)
    assert [n.op_type for n in graph.node].count("BatchNormalization") == 0
    assert {"stem.0.weight", "stem.0.bias", "conv.weight"} <= {i.name for i in graph.initializer}
    assert not any("mask" in i.name for i in graph.initializer)
    assert b".py" not in path.read_bytes(), "no paths of source files"
    assert list(tmp_path.iterdir()) == [path]


def test_a_mask_for_both_directions_is_named_and_checked(model, tmp_path):
    Sparsifier(model, "2:4/2d", include=["conv", "tokens"]).prune()
    checked = export_onnx(model, torch.randn(1, 3, 8, 8), tmp_path / "model.onnx")
    assert checked == dict.fromkeys(("conv", "tokens"), "2:4/2d")


def test_patterns_are_read_from_the_file(model, tmp_path):
    Sparsifier(model, "2:4", include=["conv"]).prune()
    path = tmp_path / "model.onnx"
    assert export_onnx(model, torch.randn(2, 3, 8, 8), path) == {"conv": "2:4"}
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    assert patterns.is_pattern(weights["conv.weight"], "2:4")
    assert not patterns.is_pattern(weights["grouped.weight"], "2:4")


def test_fixed_batch_and_two_inputs(tmp_path):
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + 2 * b

    path = tmp_path / "sum.onnx"
    pair = (torch.zeros(1, 4), torch.zeros(1, 4))
    export_onnx(Sum(), pair, path, ("a", "b"), ("total",), dynamic=())
    graph = onnx.load(path).graph
    assert [i.name for i in graph.input] == ["a", "b"]
    assert graph.output[0].name == "total"
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


def test_a_weight_that_is_lost_is_named_and_no_file_is_left(tmp_path):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(8, 4)
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.linear(x, self.linear.weight + 1, self.linear.bias)

    model = Shifted()
    Sparsifier(model).prune()
    with pytest.raises(GateError) as caught:
        export_onnx(model, torch.randn(1, 8), tmp_path / "model.onnx")
    assert "lost the pattern of 2 weights" in str(caught.value)
    assert "unused: its 2:4 weight is not in the file" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_an_input_error(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(InputError, match="PyTorch cannot export Branches to ONNX"):
        export_onnx(Branches(), torch.randn(1, 8), tmp_path / "model.onnx")
    with pytest.raises(InputError, match="expected one name for each input; got 1 and 2"):
        export_onnx(Branches(), [torch.randn(1, 8)] * 2, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_channels_last_memory_leaves_no_trace(tmp_path):
    """Of the weights and of the input, around a pooling that has a decomposition for it."""
    layers = (nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    last = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    export_onnx(last, x, tmp_path / "m.onnx")
    used = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert used <= {"Conv", "ReduceMean", "GlobalAveragePool", "Reshape", "Flatten", "Gemm"}
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
