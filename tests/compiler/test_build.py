"""Options of build, and what it promises: no change to its input, progress, equal engines."""

from __future__ import annotations

import struct

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.compiler.engines import built_and_run, random_inputs, run_twice
from tests.compiler.random_graphs import random_graph
from tests.graphs import graph
from tests.kernels.harness import targets
from twofour.compiler import profile, tune
from twofour.compiler.assemble import CODE
from twofour.compiler.build import SPARSITY, build
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.patterns import is_pattern
from twofour.core.target import Target, detect_host, host_target
from twofour.engine import Engine

RANDOM = np.random.default_rng(0)
NETWORK = (
    "(float[n,16,6,6] x) => (float[n,4] y) { a = Conv <pads = [1,1,1,1]> (x, k) b = Relu (a)"
    " g = GlobalAveragePool (b) f = Flatten (g) y = MatMul (f, m) }"
)


@pytest.fixture(scope="module")
def model() -> ir.Model:
    k, m = (RANDOM.normal(size=size).astype(np.float32) for size in ((16, 16, 3, 3), (16, 4)))
    return graph(NETWORK, k=k, m=m)


def test_a_model_may_be_a_file_or_in_memory(model, timing_cache, tmp_path) -> None:
    path = tmp_path / "net.onnx"
    ir.save(model, path)
    from_file = build(path, timing_cache=timing_cache)
    assert from_file.plan.source_name == "net.onnx"
    assert len(from_file.plan.source_sha256) == 64
    for given in (str(path), onnx.load(path), model):
        other = build(given, timing_cache=timing_cache)
        assert (other.weights == from_file.weights).all()
        assert (other.code[CODE] == from_file.code[CODE]).all()
        assert other.plan.inputs == from_file.plan.inputs
        assert other.plan.source_sha256


def test_the_model_given_is_not_changed(model, timing_cache) -> None:
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    data = [{"x": RANDOM.normal(size=(1, 16, 6, 6)).astype(np.float32)}]
    build(model, sparsity="force", int8=True, data=data, timing_cache=timing_cache)
    after = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    assert after == before


def test_with_known_times_the_same_file_comes_out(model, tmp_path, monkeypatch) -> None:
    """To the last bit, and nothing is measured."""
    cache = tmp_path / "times.json"
    first = build(model, timing_cache=cache).save(tmp_path / "first.engine").read_bytes()
    times = cache.read_bytes()

    def measured(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(tune, "interleaved", measured)
    monkeypatch.setattr(profile, "_time_call", measured)
    monkeypatch.setattr(profile, "_measured", measured)
    for name in ("second", "third"):
        engine = build(model, timing_cache=cache)
        assert engine.save(tmp_path / f"{name}.engine").read_bytes() == first
    assert cache.read_bytes() == times
    with pytest.raises(AssertionError, match="measured again"):
        build(model, shapes={"x": (2, 16, 6, 6)}, timing_cache=cache)


@pytest.mark.parametrize("sparsity", SPARSITY)
def test_sparsity(model, sparsity, timing_cache) -> None:
    engine = build(model, sparsity=sparsity, timing_cache=timing_cache)
    conv = next(layer for layer in engine.plan.layers if layer.op == "ConvRelu")
    sparse = {c.tactic: c for c in conv.candidates}["2:4"]
    if sparsity == "force":
        assert conv.pattern == "2:4"
        # The portable paths have no sparse float kernel.
        assert conv.tactic == "2:4" or host_target().isa != "avx512vnni"
    else:
        assert (conv.pattern, conv.tactic) == ("dense", "dense")
        assert any("not 2:4" in note for note in conv.notes)
        assert sparse.time_us is None
        reason = "--sparsity disable" if sparsity == "disable" else "nonzeros"
        assert reason in sparse.reason or host_target().isa != "avx512vnni"
    inputs = random_inputs(model)
    run_twice(engine, inputs)


def test_forcing_prunes_along_the_input_channels(timing_cache) -> None:
    """Of each way to write a weight: Conv, Gemm either way round, MatMul, DequantizeLinear."""
    ints = RANDOM.integers(-127, 128, (32, 32)).astype(np.int8)
    floats = RANDOM.normal(size=(32, 32)).astype(np.float32)
    model = graph(
        "(float[2,32] x) => (float[2,32] y) <float s = {0.05}, int8 z = {0}>"
        "{ a = MatMul (x, m) b = Gemm (a, g) c = Gemm <transB = 1> (b, t)"
        " q = QuantizeLinear (c, s, z) d = DequantizeLinear (q, s, z)"
        " w = DequantizeLinear <axis = 0> (i, ks) v = Transpose <perm = [1,0]> (w)"
        " y = MatMul (d, v) }",
        m=floats,
        g=floats + 1,
        t=floats + 2,
        i=ints,
        ks=np.full(32, 0.01, np.float32),
    )
    engine = build(model, sparsity="force", timing_cache=timing_cache)
    layers = [layer for layer in engine.plan.layers if "Gemm" in layer.op]
    assert [layer.pattern for layer in layers] == ["2:4"] * 4
    assert not is_pattern(ints, "2:4")


def test_int8(model, timing_cache) -> None:
    data = [{"x": RANDOM.normal(size=(1, 16, 6, 6)).astype(np.float32)} for _ in range(4)]
    inputs = data[0]
    engine = build(model, int8=True, data=data, timing_cache=timing_cache)
    ops = [layer.op for layer in engine.plan.layers]
    assert ops == ["QuantizeLinear", "QConvRelu", "QGlobalAveragePool", "QGemmF"]
    want = built_and_run(model, inputs, timing_cache=timing_cache)["y"]
    got = run_twice(engine, inputs)["y"]
    assert np.abs(got - want).max() <= 0.05 * np.abs(want).max()


def test_shapes(model, timing_cache) -> None:
    assert build(model, timing_cache=timing_cache).plan.inputs[0].shape == (1, 16, 6, 6)
    three = build(model, shapes={"x": (3, 16, 6, 6)}, timing_cache=timing_cache)
    assert three.plan.inputs[0].shape == (3, 16, 6, 6)
    assert three.plan.outputs[0].shape == (3, 4)
    for shapes, reason in (
        ({"z": (1, 16, 6, 6)}, "no input named 'z'"),
        ({"x": (1, 8, 6, 6)}, "fixes it to 16"),
        ({"x": (1, 16, 6)}, "4 dimensions"),
        ({"x": (0, 16, 6, 6)}, "at least 1"),
    ):
        with pytest.raises(InputError, match=reason):
            build(model, shapes=shapes)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sparcity": "force"}, "no option 'sparcity'"),
        ({"sparsity": "some"}, "unknown sparsity 'some'"),
        ({"int8": True}, "without data"),
        ({"threads": 0}, "0 threads"),
        ({"threads": detect_host().cores + 1}, f"1 to {detect_host().cores} on this machine"),
        ({"target": Target("vector", "z80", "a")}, "architecture z80"),
    ],
)
def test_options_that_cannot_be(model, options, reason) -> None:
    with pytest.raises((InputError, UnsupportedError), match=reason):
        build(model, **options)


def test_a_cache_that_cannot_be_written_is_found_before_the_work(model, tmp_path) -> None:
    told = []
    for path in (tmp_path / "missing" / "times.json", tmp_path):
        with pytest.raises(InputError, match="timing cache"):
            build(model, timing_cache=path, progress=lambda *args: told.append(args))
    assert told == []
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_where_it_said_it_would(model, timing_cache) -> None:
    told: list[tuple[int, int | None, str]] = []
    build(model, timing_cache=timing_cache, progress=lambda *args: told.append(args))
    done = [one for one, _, _ in told]
    assert done == sorted(done)
    assert {total for _, total, _ in told} == {told[-1][1]}
    assert told[-1][0] == told[-1][1]
    assert all(what for _, _, what in told)


def test_dump_writes_the_graph_after_each_pass(model, timing_cache, tmp_path) -> None:
    build(model, timing_cache=timing_cache, dump=tmp_path / "dump")
    files = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert files[0] == "00_imported.txt"
    assert "ConvRelu" in (tmp_path / "dump" / files[-1]).read_text()


def test_an_engine_says_how_it_was_made(model, timing_cache) -> None:
    plan = build(model, timing_cache=timing_cache).plan
    assert plan.target == host_target()
    assert (plan.threads, plan.code) == (1, (CODE,))
    assert plan.graph == {"operators": 5, "fused": 4, "steps": 1, "calls": 4, "waves": 4}
    assert sorted(i for s in plan.steps for i in s.layers) == list(range(len(plan.layers)))
    for layer in plan.layers:
        assert layer.time_us is not None
        assert layer.time_us > 0
    conv = next(layer for layer in plan.layers if layer.op == "ConvRelu")
    assert conv.macs == 36 * 16 * 16 * 9
    assert conv.weight_bytes >= 16 * 16 * 9 * 4
    assert conv.time_us == min(c.time_us for c in conv.candidates if c.time_us is not None)


def test_a_saved_engine_runs_as_the_built_one(model, timing_cache, tmp_path) -> None:
    engine, inputs = build(model, timing_cache=timing_cache), random_inputs(model)
    again = Engine.load(engine.save(tmp_path / "net.engine"))
    assert (run_twice(again, inputs)["y"] == run_twice(engine, inputs)["y"]).all()


def undefined_symbols(code: np.ndarray) -> list[str]:
    """Names an ELF object wants from elsewhere."""
    data = code.tobytes()

    def read(form: str, at: int) -> int:
        return struct.unpack_from(form, data, at)[0]

    table, size, count = read("<Q", 40), read("<H", 58), read("<H", 60)
    found = []
    for at in range(table, table + size * count, size):
        if read("<I", at + 4) != 2:  # a table of symbols
            continue
        begin, length = read("<Q", at + 24), read("<Q", at + 32)
        names = read("<Q", table + size * read("<I", at + 40) + 24)
        for symbol in range(begin + 24, begin + length, 24):
            if read("<H", symbol + 6) == 0:
                name = names + read("<I", symbol)
                found.append(data[name : data.index(b"\0", name)].decode())
    return found


@pytest.mark.parametrize("target", targets(), ids=str)
def test_code_calls_nothing_outside_itself(target, timing_cache) -> None:
    """Not even memcpy: the engine's memory has no table for the addresses of libraries."""
    rows = graph("(float[9,64] x) => (float[9,64] y) { y = MatMul (x, k) }",
                 k=RANDOM.normal(size=(64, 64)).astype(np.float32))  # fmt: skip
    padded = graph(
        "(float[1,8,6,6] x) => (float[1,16,3,3] y) <int64[2] from = {0,0}, int64[2] to = {6,6},"
        " int64[2] axes = {2,3}, int64[2] by = {2,2}, int64[8] pads = {0,4,0,0,0,4,0,0}>"
        "{ s = Slice (x, from, to, axes, by) p = Pad (s, pads) y = Conv (p, k) }",
        k=RANDOM.normal(size=(16, 16, 1, 1)).astype(np.float32),
    )
    for one in (rows, padded):
        engine = build(one, target=target, timing_cache=timing_cache)
        assert undefined_symbols(engine.code[CODE]) == []


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
@pytest.mark.parametrize("seed", range(8))
def test_random_graphs(seed, quantized, timing_cache) -> None:
    """Residuals, fallbacks, halos and aliases in any combination."""
    case = random_graph(seed, quantized)
    got = built_and_run(case.model, case.inputs, timing_cache=timing_cache)
    case.check(got)
