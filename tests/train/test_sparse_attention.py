"""Sparse attention in PyTorch: exact, trains, and exported as one node that everybody can run."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import twofour
from twofour.core.errors import InputError
from twofour.core.sparse_attention import sparse_attention
from twofour.train import export_onnx
from twofour.train.networks.transformer import Bert, BertConfig, example_inputs
from twofour.train.sparse_attention import SparseAttention, SparsePattern

PATTERNS = [
    SparsePattern(2, window=9, global_tokens=2),
    SparsePattern(2, window=12, random_blocks=2, block=16, seed=3),
    SparsePattern(2, window=30, causal=True, scale=0.3),
    SparsePattern(2, window=-1, random_blocks=1, block=8),
]


def tensors(length: int, seed: int = 0) -> list[torch.Tensor]:
    """q, k and v [2, length, 16]."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(2, length, 16, generator=random) for _ in range(3)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("length", [1, 50, 300])
def test_the_module_is_the_definition(pattern, length):
    """With a mask of keys that hides some queries' keys altogether; more queries than a chunk."""
    keep = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.8
    keep[0, : length // 2] = False
    q, k, v = tensors(length)
    y = SparseAttention(pattern)(q, k, v, keep)
    arrays = tuple(x.numpy() for x in (q, k, v))
    expected = sparse_attention(
        arrays, pattern.heads, pattern.at(length), keep.numpy(), pattern.scale
    )
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=2e-6)


def test_gradients_are_those_of_dense_attention():
    """Also where a query sees no key."""
    pattern = SparsePattern(2, window=5, global_tokens=1)
    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[0, :20] = False
    sparse, dense = tensors(40), tensors(40)
    for x in (*sparse, *dense):
        x.requires_grad_()
    SparseAttention(pattern)(*sparse, keep).square().sum().backward()
    q, k, v = (x.view(2, 40, 2, 8).transpose(1, 2) for x in dense)
    seen = torch.from_numpy(pattern.at(40).mask()) & keep[:, None, None]
    scores = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~seen, -1e30)
    shares = scores.softmax(-1) * seen
    (shares @ v).square().sum().backward()
    for a, b in zip(sparse, dense, strict=True):
        assert torch.isfinite(a.grad).all()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


class Model(nn.Module):
    """A joint projection, and attention with a mask of keys."""

    def __init__(self, pattern: SparsePattern) -> None:
        super().__init__()
        self.projection = nn.Linear(12, 3 * 16)
        self.attention = SparseAttention(pattern)

    def forward(self, x, mask):
        return self.attention(*self.projection(x).chunk(3, -1), mask != 0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_an_exported_file_is_one_node_with_its_meaning(pattern, tmp_path):
    """Plain ONNX Runtime executes it, and an engine has a kernel for it."""
    torch.manual_seed(0)
    model = Model(pattern).eval()
    x, mask = torch.randn(2, 70, 12), (torch.rand(2, 70) < 0.8).long()
    path = tmp_path / "model.onnx"
    export_onnx(model, (x, mask), path, ("x", "mask"), ("y",))
    file = onnx.load(path)
    onnx.checker.check_model(file)
    assert [n.op_type for n in file.graph.node].count("SparseAttention") == 1
    feeds = {"x": x.numpy(), "mask": mask.numpy()}
    with torch.no_grad():
        expected = model(x, mask).numpy()
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, rtol=0, atol=1e-5)
    shapes = {name: array.shape for name, array in feeds.items()}
    engine = twofour.build(path, race=False, tuning_effort=0, shapes=shapes)
    assert [layer for layer in engine.plan.layers if layer.op == "SparseAttention"]
    (y,) = twofour.Session(engine).run(feeds).values()
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


def test_the_length_may_stay_open_in_a_file(tmp_path):
    """Without random blocks, whose table has a length."""
    torch.manual_seed(0)
    model = Model(PATTERNS[0]).eval()
    x, mask = torch.randn(2, 40, 12), torch.ones(2, 40, dtype=torch.int64)
    path = tmp_path / "model.onnx"
    export_onnx(model, (x, mask), path, ("x", "mask"), ("y",), ("batch", "length"))
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    longer, all_ = torch.randn(1, 55, 12), torch.ones(1, 55, dtype=torch.int64)
    (y,) = session.run(None, {"x": longer.numpy(), "mask": all_.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(y, model(longer, all_).numpy(), rtol=0, atol=1e-5)


def test_a_long_document_encoder_is_its_dense_twin_where_the_window_holds_all():
    """The same weights, the same result."""
    sizes = {"layers": 2, "hidden": 16, "heads": 2, "intermediate": 24, "vocabulary": 50}
    torch.manual_seed(0)
    dense = Bert(BertConfig(**sizes)).eval()
    sparse = Bert(BertConfig(**sizes, window=30)).eval()
    sparse.load_state_dict(dense.state_dict())
    ids, mask, types = example_inputs(BertConfig(**sizes), 2, 20)
    mask[1, 12:] = 0
    with torch.no_grad():
        a, b = dense(ids, mask, types), sparse(ids, mask, types)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    narrow = Bert(BertConfig(**sizes, window=2, global_tokens=1)).eval()
    narrow.load_state_dict(dense.state_dict())
    with torch.no_grad():
        assert not torch.allclose(narrow(ids, mask, types), a, atol=1e-3)


def test_refuses_what_does_not_fit():
    """Shapes, heads and numbers."""
    attention = SparseAttention(SparsePattern(3))
    q, k, v = tensors(10)
    with pytest.raises(InputError, match="multiple of 3 heads"):
        attention(q, k, v)
    with pytest.raises(InputError, match="all alike"):
        SparseAttention(SparsePattern(2))(q, k[:, :5], v)
    with pytest.raises(InputError, match="window >= -1"):
        SparsePattern(2, window=-3)
