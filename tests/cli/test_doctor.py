"""doctor tells what is there and how to get what is not."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from twofour.cli import app, doctor
from twofour.core.target import ISAS, host_target, why_no_bf16


def test_doctor_names_the_target_and_the_packages() -> None:
    text = CliRunner().invoke(app, ["doctor"], catch_exceptions=False).stdout
    assert f"engines are built for {host_target()}" in text
    for package in ("numpy", "llvmlite", "onnxruntime", "openvino"):
        assert package in text


def test_doctor_as_json() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    document = json.loads(result.stdout)
    assert document["isa"] == host_target().isa
    assert set(document["missing_features"]) == set(ISAS)
    assert document["missing_features"]["vector"] == []
    assert document["packages"]["numpy"]
    assert document["cores"] >= 1


def test_doctor_says_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"torch", "openvino", "onnxruntime"}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in gone else real(name))
    text = CliRunner().invoke(app, ["doctor"], catch_exceptions=False).stdout
    assert "pip install 'twofour[train]'" in text
    assert "pip install 'twofour[bench]'" in text
    assert "pip install 'onnxruntime'" in text
    assert "not installed" in text


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
    assert document["peak_gmacs"]["int8 dense"] > 1
    for each in probes:
        assert each["gain"] == pytest.approx(each["dense_us"] / each["sparse_us"])
        assert 1 < each["dense_gops"] < 1e5
