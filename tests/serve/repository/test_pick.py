"""Which engine runs here: by target, damaged ones passed over, foreign code never read."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fake_cuda import plant_driver
from tests.fake_tensorrt import plant
from tests.sample_engines import sample_engine
from tests.serve.repository.sites import engine_bytes, foreign_target, saved
from twofour.core import target as targets
from twofour.core.cuda import Cuda
from twofour.core.target import ISAS, Host, Target
from twofour.core.tensorrt import TensorRT
from twofour.engine import Engine
from twofour.serve.repository import pick as picking
from twofour.serve.repository.pick import choose, pick

ARCH = st.sampled_from(["x86_64", "aarch64"])
MODEL = st.sampled_from(["A", "B"])
TARGET = st.builds(Target, st.sampled_from(ISAS), ARCH, MODEL, st.booleans())
FEATURES = (
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512vnni",
    "avx2",
    "fma",
    "avx512bf16",
)
HOST = st.builds(
    Host,
    ARCH,
    MODEL,
    st.frozensets(st.sampled_from(FEATURES)) | st.just(frozenset(FEATURES)),
    st.just(1),
)


def chosen(found: dict[str, Target], host: Host) -> picking.Choice:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "detect_host", lambda: host)
        patch.setattr(picking, "detect_host", lambda: host)
        return choose(found)


@given(st.dictionaries(st.sampled_from("abcdef"), TARGET), HOST)
def test_each_engine_fits_or_is_refused_and_the_best_is_first(
    found: dict[str, Target], host: Host
) -> None:
    choice = chosen(found, host)
    assert {*choice.fits} | choice.refused.keys() == found.keys()
    assert not {*choice.fits} & choice.refused.keys()
    for name, target in found.items():
        runs = target.arch == host.arch and host.features.issuperset(target.features)
        assert (name in choice.fits) == runs
    ranks = [(-len(found[n].features), found[n].model != host.model, n) for n in choice.fits]
    assert ranks == sorted(ranks)


@given(st.dictionaries(st.sampled_from("abcdef"), TARGET), HOST)
def test_the_choice_does_not_depend_on_the_order(found: dict[str, Target], host: Host) -> None:
    assert chosen(found, host) == chosen(dict(reversed(found.items())), host)


def test_the_rule() -> None:
    host = Host("x86_64", "B", frozenset(FEATURES), 1)
    found = {
        "a": Target("vector", "x86_64", "B"),
        "b": Target("avx2", "x86_64", "A"),
        "c": Target("avx512vnni", "x86_64", "A"),
        "d": Target("avx512vnni", "x86_64", "B"),
        "e": Target("avx512vnni", "x86_64", "A", bf16=True),
        "f": Target("avx512vnni", "aarch64", "B"),
    }
    choice = chosen(found, host)
    assert choice.fits == ("e", "d", "c", "b", "a")
    assert "architecture aarch64" in choice.refused["f"]


def test_a_gpu_that_is_here_comes_before_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "10.9.0.34")
    arch = platform.machine()
    host = Host(arch, "B", frozenset(FEATURES), 1)
    gpus = {
        name: Target("tensorrt", arch, "A GPU", tensorrt=TensorRT(gpu, "tensorrt", version))
        for name, gpu, version in (
            ("this", "sm89", "10.9.0.34"),
            ("other", "sm80", "10.9.0.34"),
            ("older", "sm89", "8.6.1"),
        )
    }
    found = {"a": Target("vector", arch, "B"), **gpus}
    assert chosen(found, host).fits == ("this", "a")
    plant(monkeypatch, "10.9.0.34", gpu=None)
    assert chosen(found, host).fits == ("a",)


def test_an_engine_for_cuda_is_taken_where_its_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = platform.machine()
    host = Host(arch, "B", frozenset(FEATURES), 1)
    found = {
        "cpu": Target("avx512vnni", arch, "B"),
        "other": Target("cuda", arch, "Old GPU", cuda=Cuda("sm80")),
        "this": Target("cuda", arch, "A GPU", cuda=Cuda("sm90", ("cublaslt 13.1",))),
    }
    plant_driver(monkeypatch)
    choice = chosen(found, host)
    assert choice.fits[0] == "this"
    assert "other" not in choice.fits
    assert "GPU for sm80 (here is sm90)" in choice.refused["other"]
    plant_driver(monkeypatch, ())
    choice = chosen(found, host)
    assert "this" not in choice.fits
    assert "missing: GPU for sm90" in choice.refused["this"]


def put(folder: Path, **files: bytes) -> tuple[str, ...]:
    for name, content in files.items():
        (folder / f"{name}.engine").write_bytes(content)
    return tuple(f"{name}.engine" for name in files)


def test_foreign_machine_code_is_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = put(tmp_path, foreign=engine_bytes(foreign_target()))
    monkeypatch.setattr(Engine, "load", lambda path: pytest.fail("it was read"))
    picked = pick(tmp_path, names)
    assert picked.engine is None
    assert "riscv64" in picked.refused[0]


def test_a_damaged_one_is_passed_over_and_says_so(tmp_path: Path) -> None:
    sound = engine_bytes()
    altered = sound[:-1] + bytes([sound[-1] ^ 1])
    names = put(tmp_path, a=altered, b=sound[:-10], c=sound[:100], d=b"", e=b"{}" * 500, f=sound)
    picked = pick(tmp_path, names)
    assert picked.name == "f.engine"
    assert picked.engine is not None
    assert {line.partition(":")[0] for line in picked.refused} == {f"{n}.engine" for n in "abcde"}
    assert all("\n" not in line for line in picked.refused)


def test_an_instruction_set_of_a_later_version_is_a_refusal(tmp_path: Path) -> None:
    engine = sample_engine(foreign_target())
    later = replace(engine.plan.target, isa="avx512vnni")
    content = saved(replace(engine, plan=replace(engine.plan, target=later)))
    names = put(tmp_path, later=content)
    (tmp_path / names[0]).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(targets._REQUIRED, "avx512vnni")
        patch.setattr("twofour.core.plan_check.ISAS", ("avx2", "vector"))
        picked = pick(tmp_path, names)
    assert "unknown instruction set 'avx512vnni'" in picked.refused[0]
