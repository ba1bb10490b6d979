"""The example of a GPU, run short on the CPU: all stages, and the page."""

import json

import pytest
import torch

from tests.examples.test_recovery import data, script

__all__ = ["data"]


@pytest.mark.slow
def test_a_short_run_ends_with_a_file(data, tmp_path, capsys):
    module = script("cifar10_gpu")
    words = ["--short", "--samples", "128", "--epochs", "1", "--qat-epochs", "1", "--depth", "20"]
    words += ["--batch-size", "64", "--amp", "bf16", "--out", str(tmp_path)]
    assert module.main([*words, "--table", str(tmp_path / "page.md")]) == 0
    found = json.loads((tmp_path / "summary.json").read_text())
    assert list(found["stages"]) == [
        "dense",
        "2:4, one shot",
        "2:4, fine-tuned",
        "24.onnx",
        "2:4 INT8, calibrated",
        "2:4 INT8, trained",
        "qat.onnx",
    ]
    assert found["stages"]["2:4, fine-tuned"]["steps"] == 2
    assert found["stages"]["dense"]["top1"] > 0.85
    for name in ("24.onnx", "qat.onnx"):
        assert found["stages"][name]["patterns"] == {"2:4": 18}
        assert found["stages"][name]["same_class"] > 0.97
    assert (tmp_path / "page.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "qat.onnx").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch has a GPU here")
def test_without_a_gpu_it_says_so(capsys):
    assert script("cifar10_gpu").main(["--device", "cuda"]) == 2
    assert "PyTorch has no GPU here" in capsys.readouterr().err
