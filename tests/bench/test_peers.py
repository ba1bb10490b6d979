"""Peers: each computes the network, the same as the others, and says no in one message."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.sample_models import conv_model
from twofour.bench import peers
from twofour.bench.peers.torch import contestant
from twofour.core.errors import InputError

FEEDS = {"x": np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)}


def test_onnxruntime_and_openvino_agree(tmp_path: Path) -> None:
    model = conv_model(tmp_path / "m.onnx")
    theirs = [peers.prepare(name, model, FEEDS, 1) for name in ("onnxruntime", "openvino")]
    (first,), (second,) = (list(each.outputs().values()) for each in theirs)
    assert first.shape == second.shape == (2, 10)
    # OpenVINO may compute in bfloat16, whose steps are 2^-8 of the value.
    np.testing.assert_allclose(first, second, atol=2**-6 * np.abs(first).max())
    for each in theirs:
        assert each.version
        assert "threads 1" in each.setting


def test_a_call_reads_the_bound_input(tmp_path: Path) -> None:
    model = conv_model(tmp_path / "m.onnx")
    for name in ("onnxruntime", "openvino"):
        one = peers.prepare(name, model, FEEDS, 1).outputs()["y"].copy()
        two = peers.prepare(name, model, {"x": FEEDS["x"] * 2}, 1).outputs()["y"].copy()
        assert np.abs(one - two).max() > 0.01


def test_torch_runs_an_exported_program(tmp_path: Path) -> None:
    module = torch.nn.Conv2d(4, 8, 3)
    program = torch.export.export(module, (torch.from_numpy(FEEDS["x"]),))
    torch.export.save(program, tmp_path / "m.pt2")
    threads = torch.get_num_threads()
    try:
        live = contestant(module, FEEDS, 1)
        saved = peers.prepare("torch", tmp_path / "m.pt2", FEEDS, 1)
        expected = module(torch.from_numpy(FEEDS["x"])).detach().numpy()
        for each in (live, saved):
            np.testing.assert_allclose(each.outputs()["output0"], expected, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_another_input_is_refused(name: str, tmp_path: Path) -> None:
    model = conv_model(tmp_path / "m.onnx")
    with pytest.raises(InputError, match="cannot have shape"):
        peers.prepare(name, model, {"x": np.zeros((2, 3, 8, 8), np.float32)}, 1)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_text_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("hello\n" * 20)
    with pytest.raises(InputError, match="text file"):
        peers.prepare(name, tmp_path / "m.onnx", FEEDS, 1)


def test_torch_reads_no_onnx(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a \.pt2 file"):
        peers.prepare("torch", conv_model(tmp_path / "m.onnx"), FEEDS, 1)
    with pytest.raises(InputError, match="no program at"):
        peers.prepare("torch", tmp_path / "none.pt2", FEEDS, 1)
    (tmp_path / "bad.pt2").write_bytes(b"hello")
    with pytest.raises(InputError, match="PyTorch cannot read"):
        peers.prepare("torch", tmp_path / "bad.pt2", FEEDS, 1)


def test_an_unknown_peer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown peer 'tvm'"):
        peers.prepare("tvm", tmp_path / "m.onnx", FEEDS, 1)


def test_a_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def missing(name: str, *args: object, **kwargs: object) -> object:
        if name == "openvino":
            raise ModuleNotFoundError("No module named 'openvino'", name="openvino")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.delitem(sys.modules, "twofour.bench.peers.openvino", raising=False)
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"openvino is not installed[^$]*twofour\[bench\]"):
        peers.prepare("openvino", tmp_path / "m.onnx", FEEDS, 1)
