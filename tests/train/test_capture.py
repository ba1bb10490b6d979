"""What a weight is multiplied with: the rows times the weight give what the layer computes."""

import pytest
import torch
from torch import nn

from twofour.train.calibration import as_it_was
from twofour.train.capture import input_rows, input_squares, parts_of, watch
from twofour.train.layers import find_weights


def reads_of(model, *args, **kwargs):
    reads = []
    with torch.no_grad(), as_it_was(model), watch(model, find_weights(model), reads.append):
        model(*args, **kwargs)
    return reads


def rows_of(read):
    rows = {}
    for part, some in input_rows(read):
        rows.setdefault(part, []).append(some)
    return {part: torch.cat(some) for part, some in rows.items()}


LAYERS = {
    "linear": (nn.Linear(8, 5), (3, 8)),
    "linear of rank 4": (nn.Linear(8, 5), (2, 3, 4, 8)),
    "linear of rank 1": (nn.Linear(8, 5), (8,)),
    "conv": (nn.Conv2d(4, 6, 3), (2, 4, 7, 6)),
    "padding and stride": (nn.Conv2d(4, 6, (3, 2), (2, 3), (1, 2)), (2, 4, 8, 9)),
    "dilation": (nn.Conv2d(4, 6, 3, dilation=(2, 3), padding=2), (1, 4, 9, 9)),
    "groups": (nn.Conv2d(8, 6, 3, groups=2, padding=1), (2, 8, 5, 5)),
    "same": (nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (1, 4, 6, 6)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (1, 4, 6, 6)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 6, 5)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6, 5)),
    "replicate": (nn.Conv1d(4, 6, 5, padding=2, stride=2, padding_mode="replicate"), (2, 4, 9)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9)),
    "conv3d": (nn.Conv3d(4, 6, (1, 2, 3), padding=1, stride=(1, 2, 1)), (2, 4, 3, 4, 5)),
    "no batch": (nn.Conv2d(4, 6, 3, padding=1), (4, 6, 6)),
    "channels last": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 6, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_weight_is_the_layer(name):
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    if name == "channels last":
        x = x.to(memory_format=torch.channels_last)
    (read,) = reads_of(layer, x)
    rows = rows_of(read)
    assert sorted(rows) == list(range(parts_of(read.weight)))
    # Features in the order (tap, channel): the channels of the weight go last.
    flat = layer.weight.detach().movedim(1, -1).flatten(1)
    parts = flat.chunk(len(rows))
    found = torch.cat([rows[part] @ w.T for part, w in enumerate(parts)], dim=1) + layer.bias
    expected = layer(x).detach()
    if not isinstance(layer, nn.Linear):
        expected = (expected if len(shape) == layer.weight.ndim else expected[None]).movedim(1, -1)
    torch.testing.assert_close(found, expected.reshape(found.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_squares_are_those_of_the_rows(name):
    layer, shape = LAYERS[name]
    torch.manual_seed(1)
    (read,) = reads_of(layer, torch.randn(shape))
    rows = rows_of(read)
    squares = {}
    for part, some in input_squares(read):
        squares[part] = squares.get(part, 0) + some
    assert squares.keys() == rows.keys()
    for part, found in squares.items():
        assert found.dtype == torch.float64
        assert found.shape == layer.weight.shape[1:]
        expected = rows[part].double().square().sum(0)
        torch.testing.assert_close(found.movedim(0, -1).flatten(), expected, rtol=1e-6, atol=0)


def test_large_inputs_come_in_pieces(monkeypatch):
    monkeypatch.setattr("twofour.train.capture._CHUNK", 1000)
    layer, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(5, 4, 6, 6)
    (read,) = reads_of(layer, x)
    pieces = [rows for _, rows in input_rows(read)]
    assert [len(piece) for piece in pieces] == [36] * 5
    (read,) = reads_of(nn.Linear(8, 2), torch.randn(300, 8))
    assert [len(rows) for _, rows in input_rows(read)] == [125, 125, 50]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross", "kdim", "no bias"])
def test_attention_projections(kind, batch_first):
    torch.manual_seed(0)
    others = {"kdim": 12, "vdim": 20} if kind == "kdim" else {}
    attention = nn.MultiheadAttention(
        16, 4, batch_first=batch_first, bias=kind != "no bias", dropout=0.5, **others
    )
    q = torch.randn(3, 5, 16)
    k = q if kind in ("self", "no bias") else torch.randn(3, 5, others.get("kdim", 16))
    v = k if kind != "kdim" else torch.randn(3, 5, 20)
    reads = reads_of(attention, q, k, value=v)
    expected = {
        "in_proj_weight": [q, k, v],
        "q_proj_weight": [q],
        "k_proj_weight": [k],
        "v_proj_weight": [v],
    }
    names = [read.weight.attribute for read in reads]
    assert names == (
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "weight"]
        if kind == "kdim"
        else ["in_proj_weight"] * 3 + ["weight"]
    )
    for read in reads[:-1]:
        assert parts_of(read.weight) == len(expected[read.weight.attribute])
        assert read.x is expected[read.weight.attribute][read.part]
    attention.eval()
    with torch.no_grad():
        output, _ = attention(q, k, v)
        found = attention.out_proj(reads[-1].x)
    torch.testing.assert_close(found, output, rtol=1e-5, atol=1e-6)


def test_attention_inside_an_encoder_that_has_a_fused_form():
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.tensor([[False] * 3, [False, False, True]])
    reads = reads_of(encoder, torch.randn(2, 3, 16), src_key_padding_mask=padding)
    one = ["self_attn.in_proj_weight"] * 3 + ["self_attn.out_proj", "linear1", "linear2"]
    names = [read.weight.name for read in reads]
    assert names == [f"layers.{i}.{name}" for i in range(2) for name in one]
    assert not any(read.x.is_nested for read in reads)


def test_every_use_of_a_shared_or_repeated_layer_is_seen():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = nn.Sequential(first, second, first)
    assert [read.weight.name for read in reads_of(model, torch.randn(1, 8))] == ["0"] * 3
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_compiled_models_run_uncompiled():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].compile(backend=backend)
    compiled = torch.compile(model, backend=backend)
    assert [read.weight.name for read in reads_of(compiled, torch.randn(1, 8))] == ["0", "1"]
    assert compilations == []
    compiled(torch.randn(1, 8))
    assert compilations != []


def test_half_precision_becomes_float32():
    layer = nn.Linear(8, 4, dtype=torch.bfloat16)
    (read,) = reads_of(layer, torch.full((2, 8), 300.0, dtype=torch.bfloat16))
    ((_, rows),) = input_rows(read)
    assert rows.dtype == torch.float32
    ((_, squares),) = input_squares(read)
    assert squares.tolist() == [2 * 300.0**2] * 8
