"""Kernels of plugins in engines: as their meanings say, wherever operands lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import twofour
from tests.plugins.conftest import Install
from tests.plugins.sample import HEAD, LOOP, ROW_SUM, RowSum, Triple, changed, emit_triple, model
from twofour.compiler.trial import WrongResult
from twofour.core.errors import UnsupportedError
from twofour.engine import Engine
from twofour.plugins import (
    Code,
    CpuTactic,
    Operator,
    Problem,
    Stage,
    Target,
    kernel,
    module_text,
)

Array = NDArray[Any]
RNG = np.random.default_rng(5)
W1 = RNG.standard_normal((16, 24)).astype(np.float32)
W2 = RNG.standard_normal((24, 8)).astype(np.float32)
X = RNG.standard_normal((6, 16)).astype(np.float32)
ROWS = f"""{HEAD} net (float[6,16] x) => (float[6,8] z) {{
    a = MatMul (x, w1)  b = test.Triple <add = 0.5> (a)  z = MatMul (b, w2) }}"""


def built(text: str, effort: int = 1, threads: int = 1, **constants: Array) -> Engine:
    return twofour.build(
        model(text, **constants), race=False, tuning_effort=effort, threads=threads
    )


def run(engine: Engine, **inputs: Array) -> dict[str, Array]:
    with twofour.Session(engine) as session:
        return session.run(inputs)


def close(got: Array, expected: Array) -> bool:
    return bool(np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("effort", [0, 1, 2])
def test_rows_between_products(install: Install, effort: int) -> None:
    install(Triple)
    engine = built(ROWS, effort, w1=W1, w2=W2)
    assert [step.kind for step in engine.plan.steps] == ["native"]
    assert close(run(engine, x=X)["z"], (X @ W1 * 3 + 0.5) @ W2)
    (layer,) = [layer for layer in engine.plan.layers if layer.op == "Triple"]
    assert layer.tactic == "loop"
    assert (layer.time_us or 0) > 0
    assert [c.tactic for c in layer.candidates] == ["loop"]
    assert engine.plan.plugins == (), "its kernels are in the engine"


def test_without_the_plugin_a_file_that_has_the_function_runs_all_the_same(
    install: Install,
) -> None:
    install(Triple)
    from twofour.onnx_tools.plugins import attach_meanings

    whole = model(ROWS, w1=W1, w2=W2)
    attach_meanings(whole)
    install()
    engine = twofour.build(whole, race=False, tuning_effort=0)
    assert all(layer.op != "Triple" for layer in engine.plan.layers)
    assert close(run(engine, x=X)["z"], (X @ W1 * 3 + 0.5) @ W2)


def test_without_the_plugin_and_the_function(install: Install) -> None:
    install()
    with pytest.raises(twofour.Error, match=r"test.Triple|Triple"):
        built(ROWS, w1=W1, w2=W2)


def test_images_in_the_arena_are_copied_into_c_order(install: Install) -> None:
    """A Conv's result lies channels-last, with a halo for the next one."""
    install(Triple)
    w = RNG.standard_normal((16, 16, 3, 3)).astype(np.float32)
    text = f"""{HEAD} net (float[2,16,7,5] x) => (float[2,16,7,5] z) {{
        a = Conv <pads = [1,1,1,1]> (x, w)  b = test.Triple (a)
        z = Conv <pads = [1,1,1,1]> (b, w) }}"""
    plain = text.replace("b = test.Triple (a)", "b = Mul (a, three)")
    x = RNG.standard_normal((2, 16, 7, 5)).astype(np.float32)
    engine = built(text, w=w)
    expected = run(built(plain, w=w, three=np.float32(3.0).reshape(1)), x=x)["z"]
    assert close(run(engine, x=x)["z"], expected)
    names = [layer.name for layer in engine.plan.layers if layer.op == "Triple"]
    assert len(names) == 3, "a copy before, one behind"
    notes = [n for layer in engine.plan.layers for n in layer.notes if "copies" in n]
    assert "the last of 3 kernels, 2 of them copies" in notes[0]


def test_a_strided_tactic_gets_operands_as_they_lie(install: Install) -> None:
    seen: list[Problem] = []

    def emit(problem: Problem, target: Target, config: str) -> Code:
        seen.append(problem)
        x, y = problem.operands
        f = kernel()
        at = [f.load("ptr", "%x", 8 * i, 8) for i in range(2)]
        dims = x.shape

        def walk(axis: int, here: list[str]) -> None:
            if axis == len(dims):
                value = f.load("float", here[0], 0, 4)
                f.store("float", f.let(f"fmul float {value}, 3.0"), here[1], 0, 4)
                return
            steps = (x.strides[axis], y.strides[axis])
            f.repeat(
                0,
                dims[axis],
                lambda i: walk(
                    axis + 1,
                    [f.at(p, f.int_op("mul", i, s)) for p, s in zip(here, steps, strict=True)],
                ),
            )

        walk(0, at)
        return Code((Stage(module_text([f])),))

    install(changed(Triple, tactics={"cpu": [CpuTactic("walk", emit, strided=True)]}, quantized=()))
    w = RNG.standard_normal((16, 16, 3, 3)).astype(np.float32)
    text = f"""{HEAD} net (float[1,16,7,5] x) => (float[1,16,7,5] z) {{
        a = Conv <pads = [1,1,1,1]> (x, w)  b = test.Triple (a)
        z = Conv <pads = [1,1,1,1]> (b, w) }}"""
    engine = built(text, w=w)
    plain = text.replace("b = test.Triple (a)", "b = Mul (a, three)")
    x = RNG.standard_normal((1, 16, 7, 5)).astype(np.float32)
    expected = run(built(plain, w=w, three=np.float32(3.0).reshape(1)), x=x)["z"]
    assert close(run(engine, x=x)["z"], expected)
    assert len([layer for layer in engine.plan.layers if layer.op == "Triple"]) == 1
    assert not seen[-1].outputs[0].contiguous


@pytest.mark.parametrize("threads", [1, 2])
def test_stages_meet_and_share_a_workspace(install: Install, threads: int) -> None:
    install(RowSum)
    text = f"""{HEAD} net (float[6,16] x) => (float[6] z) {{
        a = MatMul (x, w1)  z = test.RowSum (a) }}"""
    engine = built(text, threads=threads, w1=W1)
    assert close(run(engine, x=X)["z"], (X @ W1).sum(1))
    stages = [layer for layer in engine.plan.layers if layer.op == "RowSum"]
    assert [layer.name.rpartition("/")[2] for layer in stages][:1] == ["double"]
    assert len(stages) == 2
    assert engine.plan.arena_bytes >= 6 * 24 * 4, "the workspace is memory of the engine"
    with twofour.Session(engine) as session:
        seen = {tap.name for tap in session.walk({"x": X})}
    assert "z" in seen


def test_a_workspace_larger_than_allowed(install: Install) -> None:
    install(RowSum)
    text = f"""{HEAD} net (float[6,16] x) => (float[6] z) {{
        a = MatMul (x, w1)  z = test.RowSum (a) }}"""
    with pytest.raises(UnsupportedError, match="--workspace 576"):
        twofour.build(model(text, w1=W1), race=False, tuning_effort=0, workspace_bytes=100)


def test_a_tactic_refuses_and_the_meaning_is_compiled_instead(install: Install) -> None:
    refusing = CpuTactic("loop", emit_triple, lambda problem, target: "not on Sundays")
    install(changed(Triple, tactics={"cpu": [refusing]}))
    engine = built(ROWS, w1=W1, w2=W2)
    assert [step.kind for step in engine.plan.steps] == ["native"]
    assert all(layer.op != "Triple" for layer in engine.plan.layers)
    assert any("not on Sundays" in note for note in engine.plan.notes)
    assert close(run(engine, x=X)["z"], (X @ W1 * 3 + 0.5) @ W2)


def test_one_tactic_refuses_and_another_takes_it(install: Install) -> None:
    refusing = CpuTactic("picky", emit_triple, lambda problem, target: "not on Sundays")
    install(changed(Triple, tactics={"cpu": [refusing, LOOP]}))
    (layer,) = [each for each in built(ROWS, w1=W1, w2=W2).plan.layers if each.op == "Triple"]
    assert {c.tactic: c.reason for c in layer.candidates} == {"loop": "", "picky": "not on Sundays"}


def wrong_factor(problem: Problem, target: Target, config: str) -> Code:
    code = emit_triple(problem, target, config)
    (stage,) = code.stages
    return Code((Stage(stage.text.replace("3.0", "4.0"), stage.pieces),))


def beyond(problem: Problem, target: Target, config: str) -> Code:
    code = emit_triple(problem, target, config)
    (stage,) = code.stages
    return Code((Stage(stage.text, stage.pieces + 1),))


def over_its_input(problem: Problem, target: Target, config: str) -> Code:
    f = kernel()
    f.store("float", "1.0", f.load("ptr", "%x", 0, 8), 0, 4)
    (stage,) = emit_triple(problem, target, config).stages
    return Code((stage, Stage(module_text([f]))))


@pytest.mark.parametrize(
    ("emit", "said"),
    [
        (wrong_factor, "values of .* differ"),
        (beyond, "bytes around .* were overwritten"),
        (over_its_input, "it wrote to its inputs"),
    ],
)
@pytest.mark.parametrize("effort", [0, 1])
def test_a_wrong_kernel_is_an_error(install: Install, emit: Any, said: str, effort: int) -> None:
    tactics = [CpuTactic("wrong", emit), LOOP]
    install(changed(Triple, tactics={"cpu": tactics}))
    with pytest.raises(WrongResult, match=said) as error:
        built(ROWS, effort, w1=W1, w2=W2)
    assert "test.Triple" in str(error.value)


def raising(problem: Problem, target: Target, config: str) -> Code:
    raise RuntimeError("out of ideas")


def nonsense(problem: Problem, target: Target, config: str) -> Code:
    return Code((Stage("this is no LLVM"),))


@pytest.mark.parametrize(("emit", "said"), [(raising, "out of ideas"), (nonsense, "expected")])
def test_a_plugin_that_fails_is_named(install: Install, emit: Any, said: str) -> None:
    install(changed(Triple, tactics={"cpu": [CpuTactic("odd", emit)]}))
    with pytest.raises(UnsupportedError, match=r"test\.Triple failed") as error:
        built(ROWS, w1=W1, w2=W2)
    assert said in str(error.value)


def test_configurations_are_all_timed(install: Install) -> None:
    seen: list[str] = []

    def emit(problem: Problem, target: Target, config: str) -> Code:
        seen.append(config)
        return emit_triple(problem, target, config)

    tactic = CpuTactic("loop", emit, configs=lambda problem, target: ("one", "two"))
    install(changed(Triple, tactics={"cpu": [tactic]}))
    (layer,) = [each for each in built(ROWS, 2, w1=W1, w2=W2).plan.layers if each.op == "Triple"]
    assert sorted(c.config for c in layer.candidates) == ["one", "two"]
    assert set(seen) == {"one", "two"}


def test_times_are_kept(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(Triple)
    options = {"race": False, "timing_cache": tmp_path / "times.json"}
    first = twofour.build(model(ROWS, w1=W1, w2=W2), **options)

    def never(*args: Any) -> None:
        raise AssertionError("timed again")

    monkeypatch.setattr("twofour.compiler.plugin_tune.PluginTrial", never)
    again = twofour.build(model(ROWS, w1=W1, w2=W2), **options)
    assert again.plan.layers == first.plan.layers


def test_open_sizes_take_the_meaning(install: Install) -> None:
    install(Triple)
    text = ROWS.replace("float[6,16]", "float[N,16]").replace("float[6,8]", "float[N,8]")
    engine = twofour.build(
        model(text, w1=W1, w2=W2), race=False, shapes={"x": ((1, 16), (4, 16), (8, 16))}
    )
    assert close(run(engine, x=X)["z"], (X @ W1 * 3 + 0.5) @ W2)


def test_the_meaning_in_another_opset_than_the_model(install: Install) -> None:
    """ReduceSum has its axes as an input from 13 on: 17 and 13 are the same, 11 is not."""
    install(RowSum)
    text = f"""{HEAD} net (float[6,16] x) => (float[6] z) {{
        a = MatMul (x, w1)  z = test.RowSum (a) }}"""
    for opset in (13, 20):
        engine = built(text.replace('"" : 17', f'"" : {opset}'), w1=W1)
        assert close(run(engine, x=X)["z"], (X @ W1).sum(1))
        assert any(layer.op == "RowSum" for layer in engine.plan.layers)
    assert "ReduceSum" in ROW_SUM


def test_a_packed_weight_is_kept_once(install: Install) -> None:
    weight = RNG.standard_normal((24,)).astype(np.float32)
    meaning = """<opset_import: ["" : 17], domain: "test">
        Scaled (x, w) => (y) { y = Mul (x, w) }"""

    def emit(problem: Problem, target: Target, config: str) -> Code:
        x, w = problem.inputs
        assert x is not None
        assert w is not None
        assert [each.name for each in problem.operands] == ["x", "w", "y"]
        assert w.constant is not None
        rows, columns = x.shape
        f = kernel()
        source, into = f.load("ptr", "%x", 0, 8), f.load("ptr", "%x", 16, 8)

        def one(row: str) -> None:
            def element(column: str) -> None:
                at = f.int_op("mul", f.int_op("add", f.int_op("mul", row, columns), column), 4)
                factor = f.load("float", "%w", f.int_op("mul", column, 4), 4)
                product = f.let(f"fmul float {f.load('float', source, at, 4)}, {factor}")
                f.store("float", product, into, at, 4)

            f.repeat(0, columns, element)

        f.repeat("%t0", "%t1", one)
        packed = w.constant.view(np.uint8).reshape(-1)
        return Code((Stage(module_text([f]), rows),), packed)

    text = f"""{HEAD} net (float[6,16] x) => (float[6,24] z) {{
        a = MatMul (x, w1)  z = test.Scaled (a, w) }}"""
    sizes = []
    for unread in ((), (1,)):

        def chosen(
            problem: Problem, target: Target, config: str, unread: tuple[int, ...] = unread
        ) -> Code:
            return replace(emit(problem, target, config), unread=unread)

        install(Operator("test", "Scaled", meaning, tactics={"cpu": [CpuTactic("rows", chosen)]}))
        engine = built(text, w1=W1, w=weight)
        assert close(run(engine, x=X)["z"], (X @ W1) * weight)
        (layer,) = [each for each in engine.plan.layers if each.op == "Scaled"]
        sizes.append((layer.weight_bytes, engine.weights.nbytes))
    assert sizes[0][0] == 2 * sizes[1][0] == 2 * weight.nbytes
