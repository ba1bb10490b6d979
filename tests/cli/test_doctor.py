"""doctor tells what is there, how fast it is, and how to get what is not there."""

from __future__ import annotations

import json
import time

import pytest
from typer.testing import CliRunner

from tests.sample_machines import KNOWN, UNKNOWN, plant_machine
from twofour.cli import app, doctor
from twofour.core import cuda, gpus, tensorrt
from twofour.core.gpus import Gpu
from twofour.core.target import ISAS, host_target, why_no_bf16
from twofour.core.tensorrt import Installed


def told() -> str:
    """What people read, in lines as long as they like."""
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "400"}, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_doctor_names_the_target_and_the_packages() -> None:
    text = told()
    assert f"engines are built for {host_target()}" in text
    for package in ("numpy", "llvmlite", "onnxruntime", "openvino"):
        assert package in text


def test_doctor_as_json_and_in_a_moment() -> None:
    started = time.monotonic()
    result = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    assert time.monotonic() - started < 20, "two seconds, and much more beside other tests"
    document = json.loads(result.stdout)
    assert document["isa"] == host_target().isa
    assert set(document["missing_features"]) == set(ISAS)
    assert document["missing_features"]["vector"] == []
    assert document["packages"]["numpy"]["version"]
    assert document["packages"]["numpy"]["install"] == ""
    assert document["cores"] >= 1
    speed = document["speed"]
    assert speed["peak_gmacs"]["int8 dense"] > 1
    assert speed["peak_gmacs"]["float32 dense"] > 0.5
    assert 0.2 < speed["read_gbps"] < 1000
    assert 0.2 < speed["read_all_gbps"] < 10000
    assert document["probes"] == []


def test_doctor_says_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"torch", "openvino", "onnxruntime"}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in gone else real(name))
    text = told()
    assert "not installed: pip install 'twofour[train]'" in text
    assert "not installed: pip install 'twofour[bench]'" in text
    assert "not installed: pip install onnxruntime" in text


def test_doctor_where_next_to_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_machine(monkeypatch, UNKNOWN, ())
    text = told()
    assert "cores: 4 usable; nothing more is known of them" in text
    assert "target vector" in text
    assert "AVX" not in text
    assert "GPUs: none found" in text
    for unknown in ("caches:", "memory:", "huge pages"):
        assert unknown not in text


def test_doctor_on_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_machine(monkeypatch, KNOWN, (Gpu("A GPU", 16 << 30, "1.2"),) * 2)
    text = told()
    for part in (
        "2 sockets, 8 cores, 16 hardware threads, 2 NUMA nodes, in a virtual machine",
        "L1d 48 kB for 2 threads, L3 32 MB for 8 threads",
        "memory: 128 GB, 64 MB available",
        "huge pages of 2 MB: never: large weights are slower to read without them: echo madvise",
        "times are unsteady here:",
        "governor is powersave",
        "allows 0.5 cores' worth",
        "2 x A GPU, 16 GB, driver 1.2",
        "one core 10 GB/s, 4 threads 20 GB/s",
    ):
        assert part in text


def test_doctor_measures_what_sparsity_pays() -> None:
    result = CliRunner().invoke(app, ["doctor", "--measure", "--json"], catch_exceptions=False)
    document = json.loads(result.stdout)
    probes = document["probes"]
    assert {(each["precision"], each["pattern"]) for each in probes} >= {
        ("int8", "2:4"),
        ("float32", "2:4"),
    }
    bf16 = {each["pattern"] for each in probes if each["precision"] == "bfloat16"}
    assert bf16 == (set() if why_no_bf16(host_target()) else {"2:4", "2:4/pair"})
    for each in probes:
        assert each["gain"] == pytest.approx(each["dense_us"] / each["sparse_us"])
        assert 1 < each["dense_gops"] < 1e5


def test_doctor_says_which_tensorrt_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    has = (Installed("tensorrt", "tensorrt", "10.9.0.34"), Installed("tensorrt_rtx", "x", "1.7.1"))
    monkeypatch.setattr(tensorrt, "installed", lambda: has)
    monkeypatch.setattr(tensorrt, "read_capabilities", lambda: ())
    text = told()
    assert (
        "TensorRT 10.9.0.34: builds engines where their GPU is; to run them is missing: GPU" in text
    )
    assert "TensorRT for RTX 1.7.1: builds engines for GPUs, here without one; to run" in text
    monkeypatch.setattr(tensorrt, "read_capabilities", lambda: ((8, 9),))
    assert "TensorRT 10.9.0.34: builds engines; runs them" in told()


def test_doctor_says_how_to_get_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "installed", lambda: ())
    assert "TensorRT: not installed, for --target tensorrt: pip install tensorrt" in told()


def test_doctor_says_what_there_is_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"cuda-bindings": "13.0.1", "triton": "3.6.0", "cublaslt": "13.1.0.3"}
    monkeypatch.setattr(cuda, "installed", lambda name: versions.get(name, ""))
    monkeypatch.setattr(cuda, "find_spec", lambda name: name)
    for place in (cuda, gpus):
        monkeypatch.setattr(place, "read_capabilities", lambda: ((9, 0), (9, 0)))
    text = told()
    assert "CUDA: cuda-bindings 13.0.1, triton 3.6.0, cublaslt 13.1.0.3; runs engines for sm90" in (
        text
    )
    assert "without cusparselt, which computes 2:4 products: pip install nvidia-cusparselt" in text
    versions.clear()
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    for place in (cuda, gpus):
        monkeypatch.setattr(place, "read_capabilities", lambda: ())
    text = told()
    assert "CUDA: nothing of it; to run engines is missing: package cuda-bindings, GPU" in text
    assert (
        "CUDA without triton, which makes kernels at a build: pip install 'twofour[cuda]'" in text
    )
