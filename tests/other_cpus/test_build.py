"""`twofour build --target cpu:NAME`: names, what it and `explain` say, what is refused."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tests.sample_models import conv_model
from twofour.cli import app
from twofour.core.cpus import CPUS, cpu_named
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.target import ISAS, check_runs_here, host_target, parse_target
from twofour.engine import Engine
from twofour.kernels.cpu.llvm import Source, compile_object
from twofour.kernels.cpu.program import threads_text

OTHER = "neoverse-n1" if host_target().arch != "aarch64" else "avx2"


def call(*arguments: str) -> str:
    """What a command prints."""
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    path = folder / "net.engine"
    text = call("build", str(conv_model(folder / "net.onnx")), "-o", str(path), "--target",
                f"cpu:{OTHER}", "--threads", "64")  # fmt: skip
    assert "nothing was timed: the cost model for Arm Neoverse N1 chose" in " ".join(text.split())
    return path


def test_the_plan_has_the_target_and_estimates(engine) -> None:
    plan = Engine.load(engine).plan
    assert plan.target == parse_target(f"cpu:{OTHER}")
    assert plan.threads == 64
    for layer in plan.layers:
        assert layer.time_us is not None
        assert layer.time_us > 0
    products = [layer for layer in plan.layers if layer.candidates]
    for layer in products:
        timed = [c for c in layer.candidates if c.time_us is not None]
        assert (timed[0].tactic, timed[0].config) == (layer.tactic, layer.config)
        assert [c.time_us for c in timed] == sorted(c.time_us for c in timed)


def test_explain_calls_them_estimates(engine) -> None:
    text = " ".join(call("explain", str(engine)).split())
    assert "for Arm Neoverse N1" in text
    assert "nothing was timed" in text
    assert "estimated by the cost model for Arm Neoverse N1" in text
    assert "(est.)" in text
    assert "measured at build" not in text
    assert "(est.)" in call("explain", str(engine), "--layer", "conv")
    document = json.loads(call("explain", str(engine), "--json"))
    assert document["engine"]["cpu"] == "Arm Neoverse N1"


def test_a_roofline_of_estimates_is_refused(engine) -> None:
    result = CliRunner().invoke(app, ["explain", str(engine), "--roofline"])
    assert result.exit_code == 2
    assert "estimated for Arm Neoverse N1" in str(result.exception) + result.output


def test_it_does_not_run_here(engine) -> None:
    with pytest.raises(UnsupportedError, match="cannot run on this machine") as caught:
        check_runs_here(Engine.load(engine).plan.target)
    assert "aarch64" in str(caught.value)
    assert "twofour build MODEL.onnx" in caught.value.fix


@pytest.mark.parametrize("cpu", CPUS, ids=lambda cpu: cpu.name)
def test_code_is_made_for_every_cpu(cpu) -> None:
    target = parse_target(f"cpu:{cpu.name}")
    assert (target.isa, target.arch, target.model) == (cpu.isa, cpu.arch, cpu.model)
    data = compile_object([Source(threads_text(target.arch))], target)
    machine = {"x86_64": 62, "aarch64": 183}[cpu.arch]  # e_machine of the ELF header
    assert int.from_bytes(data[18:20], "little") == machine
    assert cpu.source
    assert cpu.pipes.keys() >= {"vector", "dot", "float", "multiply", "pick", "shift"}


def test_names() -> None:
    assert parse_target("cpu") == host_target()
    assert {parse_target(f"cpu:{isa}").isa for isa in ISAS} == set(ISAS)
    assert parse_target("cpu:vector").arch == "x86_64"
    for cpu in CPUS:
        assert cpu_named(cpu.name) is cpu


@pytest.mark.parametrize("word", ["cpu:z80", "cpu:", "gpu", "neoverse-n1", "cpu:AVX2"])
def test_unknown_names_are_refused_with_the_known_ones(word) -> None:
    with pytest.raises(InputError) as caught:
        parse_target(word)
    assert all(cpu.name in str(caught.value) for cpu in CPUS)


def test_isa_and_target_contradict(tmp_path) -> None:
    model = conv_model(tmp_path / "net.onnx")
    result = CliRunner().invoke(
        app, ["build", str(model), "-o", str(tmp_path / "e.engine"), "--isa", "vector",
              "--target", "cpu:avx2"]
    )  # fmt: skip
    assert result.exit_code == 2
    assert "contradict" in str(result.exception) + result.output
    assert not (tmp_path / "e.engine").exists()
