"""The quantization examples: a short run of the six cells, and the pages made of results."""

import importlib
import json

import pytest

from tests.examples.test_recovery import data, script

__all__ = ["data"]


@pytest.mark.slow
def test_a_short_run_fills_all_cells(data, tmp_path, capsys):
    words = ["--short", "--seeds", "1", "--out", str(tmp_path), "--recipe", "fast"]
    module = script("cifar10_quantize")
    assert module.main([*words, "--only", "train"]) == 0
    assert not list(tmp_path.rglob("cells.json"))
    assert module.main([*words, "--only", "judge"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["weights"] for row in summary["rows"]] == ["dense", "2:4"]
    assert all(0 <= row[cell] <= 1 for row in summary["rows"] for cell in ("f32", "ptq", "qat"))
    dense = summary["rows"][0]
    assert dense["f32"] > 0.88
    assert abs(dense["ptq"] - dense["f32"]) < 0.02
    assert abs(dense["qat"] - dense["f32"]) < 0.03
    page = capsys.readouterr().out
    assert "| ResNet-20 | 2:4 |" in page


def test_the_page_of_cells():
    module = script("cifar10_quantize")
    rows = [
        {"depth": 20, "weights": weights, "seed": seed, "f32": f32, "ptq": 0.91, "qat": 0.92}
        for weights, seed, f32 in (
            ("dense", 0, 0.9173),
            ("dense", 1, 0.9173),
            ("2:4", 0, 0.916),
            ("2:4", 1, 0.918),
        )
    ]
    page = module.page(
        {"title": "T", "command": "c", "device": ["d"], "version": "0", "rows": rows}
    )
    assert "| ResNet-20 | dense | 91.73 (+0.00) | 91.00 (-0.73) | 92.00 (+0.27) |" in page
    assert "| ResNet-20 | 2:4 | 91.70 (-0.03; 91.60, 91.80) |" in page


def test_the_page_of_peers_has_what_was_refused():
    module = script("quantize_peers")
    rows = [
        {"network": "resnet8", "tool": "float", "top1": 87.19, "engine": {"top1": 87.19}},
        {
            "network": "resnet8",
            "tool": "twofour fast",
            "top1": 87.0,
            "engine": {"top1": 87.03},
            "cosine": 0.99,
            "seconds": 1.25,
            "memory_bytes": 5e7,
        },
        {"network": "resnet8", "tool": "nncf", "refused": "ValueError: a|b"},
    ]
    page = module.page(module.document(rows, ["resnet8"]))
    assert "python examples/quantize_peers.py --network resnet8" in page
    assert "| resnet8 | twofour fast | 87.00 | -0.19 | 87.03 | 0.9900 | 1.2 s | 50 MB |" in page
    assert "| resnet8 | nncf | ValueError: a/b |" in page
    assert "| resnet8 | 87.19 | 87.00; 1 s, 50 MB | refused | refused | refused |" in page


def test_sentences_are_padded_to_one_shape():
    numpy = importlib.import_module("numpy")
    worker = script("peers.quantize_once")
    names = ("input_ids", "attention_mask")
    batches = [{name: numpy.ones((n, n), int) for name in names} for n in (40, 50)]
    (found,) = worker.padded(batches)
    assert found["input_ids"].shape == (64, 50)
    assert found["attention_mask"].sum() == 40 * 40 + 24 * 50
