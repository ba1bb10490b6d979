"""One-shot pruning with data: better than magnitude, in bounded memory; nothing else moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.compiler.engines import reference
from tests.sample_models import conv_model
from twofour.core.errors import InputError
from twofour.core.masks import magnitude_mask, mask_of
from twofour.core.patterns import is_pattern
from twofour.core.promises import KEY, to_text
from twofour.core.sparsegpt import sparsegpt
from twofour.onnx_tools import one_shot
from twofour.onnx_tools.load import load_model, model_bytes, save_model
from twofour.onnx_tools.one_shot import Calibration
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.weights import layer_weights

RANDOM = np.random.default_rng(7)
CHAIN = """(float[b,16] x) => (y) {
    a = MatMul (x, w1)  r = Relu (a)  c = Gemm <transB = 1> (r, w2, bias)  s = Tanh (c)
    y = MatMul (s, w3)
}"""
NET = """(float[b,8,9,7] x) => (y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w1)  r = Relu (a)
    c = Conv <group = 2, strides = [2, 2]> (r, w2, bias)  m = GlobalAveragePool (c)
    f = Flatten (m)  y = Gemm <transB = 1> (f, w3)
}"""


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def correlated(rows: int, features: int) -> np.ndarray:
    return floats(rows, features // 3) @ floats(features // 3, features) + 0.1 * floats(
        rows, features
    )


def model(body: str, **arrays: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 17]> g {body}')
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()
    )
    found = ir.from_proto(proto)
    for node in found.graph:
        node.name = node.outputs[0].name
    return found


def chain() -> ir.Model:
    return model(
        CHAIN, w1=floats(16, 24) / 4, w2=floats(32, 24) / 5, bias=floats(32), w3=floats(32, 8)
    )


def net() -> ir.Model:
    w2 = floats(12, 8, 3, 3) / 8
    return model(NET, w1=floats(16, 8, 3, 3) / 8, w2=w2, bias=floats(12), w3=floats(5, 12))


def weights(found: ir.Model) -> dict[str, np.ndarray]:
    return {k: v.const_value.numpy() for k, v in found.graph.initializers.items()}


def error(source: ir.Model, found: ir.Model, data: dict[str, np.ndarray]) -> float:
    want, got = (
        np.concatenate([y.ravel() for y in reference(m, data).values()]) for m in (source, found)
    )
    return float(np.linalg.norm(want - got) / np.linalg.norm(want))


CASES = [(chain, lambda: {"x": correlated(200, 16)}), (net, lambda: {"x": floats(40, 8, 9, 7)})]


@pytest.mark.parametrize(("make", "data"), CASES)
@pytest.mark.parametrize("pattern", ["2:4", "2:4/pair", "1:4"])
def test_sparsegpt_keeps_more_than_magnitude(make, data, pattern: str) -> None:
    source, samples = make(), data()
    before = weights(source)
    pruned, report = prune(source, pattern, calibration=Calibration(samples))
    assert all(is_pattern(w.values, pattern) for _, w in layer_weights(pruned))
    assert [entry.method for entry in report] == ["sparsegpt"] * 3
    assert all(0 < entry.output_error < 1 and entry.damping == 0.01 for entry in report)
    assert error(source, pruned, samples) < 0.9 * error(source, prune(source, pattern)[0], samples)
    assert all((weights(source)[name] == w).all() for name, w in before.items())
    again, same = prune(source, pattern, calibration=Calibration(samples))
    assert model_bytes(again) == model_bytes(pruned)
    assert same == report


def test_what_later_layers_read_comes_from_pruned_ones() -> None:
    source, x = chain(), correlated(200, 16)
    w = weights(source)
    # So little memory that each layer is alone.
    found = weights(prune(source, calibration=Calibration({"x": x}, memory_bytes=8 * 24**2))[0])
    for name, turned, after in (("w1", True, lambda y: np.maximum(y, 0)), ("w2", False, None)):
        dense = w[name].T if turned else w[name]
        want, mask = sparsegpt(dense, x.T.astype(np.float64) @ x, "2:4")
        got = found[name].T if turned else found[name]
        assert np.array_equal(got != 0, mask)
        assert np.allclose(got, want, atol=1e-3)
        x = after(x @ got.T) if after else x


def test_layers_whose_sums_fit_are_captured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    original = one_shot.capture

    def spy(found, readings, *rest):
        calls.append([each.value for each in readings])
        return original(found, readings, *rest)

    monkeypatch.setattr(one_shot, "capture", spy)
    data = {"x": correlated(50, 16)}
    sizes = [8 * 16**2, 8 * 24**2, 8 * 32**2]
    for memory, want in (
        (sum(sizes), [["x", "r", "s"]]),
        (sum(sizes) - 1, [["x", "r"], ["s"]]),
        (sizes[2], [["x", "r"], ["s"]]),
        (sizes[2] - 1, [["x", "r"]]),
        (sizes[1], [["x"], ["r"]]),
    ):
        calls.clear()
        _, report = prune(chain(), calibration=Calibration(data, memory_bytes=memory))
        assert calls == want
        reason = report[2].reason
        assert ("its statistics take" in reason) == (memory < sizes[2])
    calls.clear()
    prune(chain(), calibration=Calibration(data, "wanda", memory_bytes=sizes[2]))
    assert calls == [["x", "r", "s"]]


def test_wanda_ranks_by_weight_and_input() -> None:
    source, x = net(), floats(20, 8, 9, 7)
    x[:, ::2] *= 5
    pruned, report = prune(source, calibration=Calibration({"x": x}, "wanda"))
    w = weights(source)["w1"]
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1))) ** 2
    squares = np.stack(
        [
            np.stack([padded[:, :, i : i + 9, j : j + 7].sum((0, 2, 3)) for j in range(3)], -1)
            for i in range(3)
        ],
        -2,
    )
    mask = mask_of(w.astype(np.float64) ** 2 * squares, "2:4")
    assert np.array_equal(weights(pruned)["w1"], np.where(mask, w, 0))
    assert not np.array_equal(mask, magnitude_mask(w, "2:4"))
    assert [(entry.method, entry.output_error) for entry in report] == [("wanda", None)] * 3


def test_a_weight_that_two_layers_read_sees_both_inputs() -> None:
    body = """(float[b,16] x, float[b,16] z) => (y, u) {
        y = MatMul (x, w)  u = MatMul (z, w) }"""
    source, x, z = model(body, w=floats(16, 8)), correlated(50, 16), 3 * correlated(50, 16)
    pruned, report = prune(source, calibration=Calibration({"x": x, "z": z}))
    gram = (x.T @ x).astype(np.float64) + z.T @ z
    want, mask = sparsegpt(weights(source)["w"].T, gram, "2:4")
    assert np.array_equal(weights(pruned)["w"].T != 0, mask)
    assert np.allclose(weights(pruned)["w"].T, want, atol=1e-3)
    assert [entry.reason for entry in report] == ["", "already 2:4"]


def test_what_data_cannot_prune_is_left_with_the_reason() -> None:
    body = """(float[b,16] x, bool c) => (y, m, k, j, i) {
        y = If (c) <
            then_branch = t () => (float[b,8] p) { p = MatMul (x, inner) },
            else_branch = e () => (float[b,8] q) { q = MatMul (x, inner) }
        >
        m = MatMul (x, batched)  d = DequantizeLinear (int8s, scale)  k = MatMul (x, d)
        none = Slice (x, zero, zero, zero)  j = MatMul (none, unseen)
        off = Mul (x, null)  i = MatMul (off, dark)
    }"""
    arrays = {name: floats(16, 8) for name in ("inner", "unseen", "dark")}
    source = model(
        body,
        **arrays,
        batched=floats(2, 16, 8),
        int8s=RANDOM.integers(-9, 9, (16, 8)).astype(np.int8),
        scale=np.float32(0.5),
        zero=np.array([0], np.int64),
        null=np.float32(0),
    )
    calibration = Calibration({"x": floats(9, 16), "c": np.ones(9, np.bool_)})
    pruned, report = prune(source, calibration=calibration)
    reasons = {entry.weight: entry.reason for entry in report}
    assert "body of If, Loop or Scan" in reasons["inner"]
    assert "3 dimensions" in reasons["batched"]
    assert "stored as int8" in reasons["int8s"]
    assert reasons["unseen"] == "no sample reaches it"
    assert reasons["dark"] == "its input is 0 for all samples"
    assert {entry.method for entry in report} == {""}
    assert model_bytes(pruned) == model_bytes(source)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_embedding_that_is_a_weight_too_is_left(method: str) -> None:
    body = """(int64[b,5] i) => (y) {
        e = Gather (table, i)  f = MatMul (e, w)  t = Transpose (table)  y = MatMul (f, t) }"""
    source = model(body, table=floats(32, 8), w=floats(8, 8))
    data = {"i": RANDOM.integers(0, 32, (20, 5))}
    _, report = prune(source, calibration=Calibration(data, method))
    assert report[0].reason == ""
    assert report[1].reason == "it is an embedding as well, read by Gather 'e'"


def test_groups_that_split_pairs_are_left() -> None:
    source = model(
        "(float[b,16,5,5] x) => (y) { y = Conv <group = 2> (x, w) }", w=floats(64 + 32, 8, 3, 3)
    )
    data = {"x": floats(4, 16, 5, 5)}
    _, report = prune(source, "2:4/pair", calibration=Calibration(data))
    assert "groups of 48 output channels split the blocks of 32" in report[0].reason
    pruned, _ = prune(source, "2:4/pair", calibration=Calibration(data, "wanda"))
    assert is_pattern(weights(pruned)["w"], "2:4/pair")


def test_names_choose() -> None:
    calibration = Calibration({"x": correlated(50, 16)})
    for given in (None, calibration):
        _, report = prune(chain(), "2:4", ("w3",), include=("a", "y"), calibration=given)
        reasons = [entry.reason for entry in report]
        assert reasons == ["", "not included by name", "excluded by name"]


def test_float16_stays_float16() -> None:
    body = "(float16[b,16] x) => (float16[b,8] y) { y = MatMul (x, w) }"
    source = model(body, w=floats(16, 8).astype(np.float16))
    data = {"x": correlated(50, 16).astype(np.float16)}
    pruned, report = prune(source, calibration=Calibration(data))
    assert weights(pruned)["w"].dtype == np.float16
    assert report[0].method == "sparsegpt"


def test_the_rest_of_the_file_stays_as_it_was(tmp_path: Path) -> None:
    path, out = tmp_path / "m.onnx", tmp_path / "s.onnx"
    proto = onnx.load(conv_model(path))
    proto.producer_name, proto.doc_string, proto.graph.doc_string = "made by", "words", "more"
    proto.metadata_props.add(key="author", value="someone")
    proto.graph.node[0].doc_string = "first"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(floats(3), "spare"))
    before = onnx.ModelProto()
    before.CopyFrom(proto)
    onnx.save(proto, path, save_as_external_data=True, location="m.data", size_threshold=0)
    calibration = Calibration({"x": floats(20, 4, 8, 8)})
    save_model(prune(load_model(path), calibration=calibration)[0], out)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m.data", "m.onnx", "s.onnx"]
    after = onnx.load(out)
    pairs = list(zip(before.graph.initializer, after.graph.initializer, strict=True))
    assert [old.name for old, new in pairs if old != new] == ["w", "fc"]
    for old, new in pairs:
        assert (old.name, old.dims, old.data_type) == (new.name, new.dims, new.data_type)
    before.metadata_props.add(key=KEY, value=to_text({"w": "2:4", "fc": "2:4"}))
    # Shapes of initializers, which any file gets that is loaded and saved.
    assert {info.name for info in after.graph.value_info} <= {old.name for old, _ in pairs}
    del after.graph.value_info[:]
    for each in (before, after):
        del each.graph.initializer[:]
    assert after == before


def test_progress_says_how_far_it_is() -> None:
    told: list[tuple[int, int | None, str]] = []

    def report(done: int, total: int | None, what: str) -> None:
        told.append((done, total, what))

    prune(chain(), calibration=Calibration({"x": correlated(9, 16)}, samples=5, progress=report))
    assert told == [
        (0, 3, "capturing sample 5 of 5"),
        (1, 3, "a"),
        (2, 3, "c"),
        (3, 3, "y"),
    ]


@pytest.mark.parametrize(
    "given",
    [
        {"method": "magnitude"},
        {"samples": 0},
        {"memory_bytes": 0},
        {"damping": 0.0},
        {"damping": float("nan")},
        {"threads": -1},
    ],
)
def test_bad_options_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(given))):
        Calibration({"x": floats(1, 16)}, **given)


def test_a_generator_is_refused() -> None:
    batches = ({"x": correlated(5, 16)} for _ in range(3))
    with pytest.raises(InputError, match="cannot be a generator"):
        prune(chain(), calibration=Calibration(batches))
    pruned, _ = prune(chain(), calibration=Calibration([{"x": correlated(5, 16)}] * 3))
    assert is_pattern(weights(pruned)["w2"], "2:4")
