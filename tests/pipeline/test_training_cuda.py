"""The training stages on GPUs: what they leave is what the CPU leaves, but for rounding."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.pipeline.test_training_processes import CODE, MODEL, ROOT, job
from twofour.core.errors import UnsupportedError
from twofour.core.patterns import is_pattern
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.reference import Reference
from twofour.pipeline.torchrun import run_job

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
one_gpu = pytest.mark.skipif(GPUS < 1, reason="PyTorch has no GPU here")
two_gpus = pytest.mark.skipif(GPUS < 2, reason="PyTorch has fewer than two GPUs here")
FINETUNE = {"epochs": 4, "lr": 0.05}
SPARSIFY = {"pattern": "2:4", "exclude": ["linear"], "method": "sparsegpt", "permute": True}
DATA = {"calibrate": f"{CODE}:calibrate"}


def chain(root, device, code="model"):
    """All stages on a device: name -> the result; the last one's file."""
    results, files = {}, {}

    def go(stage, settings=None, **inputs):
        made = replace(job(root / stage, stage, settings, DATA, code, **inputs), device=device)
        results[stage] = run_job(made, ROOT)
        files[stage] = root / stage / "out" / MODEL

    go("load")
    go("sparsify", SPARSIFY, start=files["load"])
    masks = root / "sparsify" / "out" / "masks.safetensors"
    dense = {"teacher": files["load"], "masks": masks}
    go("finetune", FINETUNE, start=files["sparsify"], **dense)
    go("qat", {"epochs": 1, "lr": 0.002}, start=files["finetune"], **dense)
    go("export", sparse=files["finetune"], qat=files["qat"], masks=masks)
    return results


@one_gpu
def test_all_stages_end_as_on_the_cpu(tmp_path):
    on_gpu, on_cpu = (chain(tmp_path / device, device) for device in ("cuda", "cpu"))
    name = torch.cuda.get_device_name(0)
    assert [name in each.text for each in on_gpu.values()] == [False, True, True, True, False]
    assert not any(name in each.text for each in on_cpu.values())
    masks = [
        load_file(tmp_path / device / "sparsify" / "out" / "masks.safetensors")
        for device in ("cuda", "cpu")
    ]
    for layer, mask in masks[1].items():
        assert (masks[0][layer] == mask).mean() > 0.99, layer
    trained = load_file(tmp_path / "cuda" / "qat" / "out" / MODEL)
    for layer, mask in masks[0].items():
        assert not trained[f"{layer}.weight"][~mask].any()
        assert is_pattern(trained[f"{layer}.weight"], "2:4")
    x = np.random.default_rng(0).random((64, 1, 8, 8), np.float32)
    for file in ("sparse", "qat"):
        outputs = [
            Reference(load_model(tmp_path / d / "export" / "out" / f"{file}.onnx")).run({"x": x})
            for d in ("cuda", "cpu")
        ]
        agree = outputs[0]["y"].argmax(1) == outputs[1]["y"].argmax(1)
        assert agree.mean() > 0.9


@one_gpu
def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("KILL_ONCE", str(tmp_path / "killed"))
    run_job(job(tmp_path / "load", "load", code="plain"), ROOT)
    dense = tmp_path / "load" / "out" / MODEL
    train = {"train": f"{CODE}:killed"}
    made = job(tmp_path, "finetune", {**FINETUNE, "distil": False}, train, "plain", start=dense)
    with pytest.raises(UnsupportedError, match="was killed by signal 9"):
        run_job(replace(made, device="cuda"), ROOT)
    told = []
    run_job(replace(made, device="cuda"), ROOT, lambda *at: told.append(at[0]))
    assert min(told) > 8, "two epochs of four batches were not done again"


@two_gpus
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_two_processes_end_as_one(tmp_path, parallel, device):
    run_job(job(tmp_path / "load", "load", code="plain"), ROOT)
    dense = tmp_path / "load" / "out" / MODEL
    settings = {"pattern": "2:4", "exclude": ["layers.2"]}
    run_job(job(tmp_path / "sparsify", "sparsify", settings, code="plain", start=dense), ROOT)
    inputs = {"teacher": dense, "start": tmp_path / "sparsify" / "out" / MODEL}
    found = []
    for count in (1, 2):
        settings = {**FINETUNE, "processes": count, "parallel": parallel}
        made = job(tmp_path / str(count), "finetune", settings, None, "plain", **inputs)
        run_job(replace(made, device=device), ROOT)
        found.append(load_file(tmp_path / str(count) / "out" / MODEL))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-3, atol=1e-5)
    mask = found[1]["layers.0.weight_mask"]
    assert not found[1]["layers.0.weight"][~mask].any()


@pytest.mark.skipif(GPUS > 0, reason="PyTorch has a GPU here")
def test_without_a_gpu_it_says_so(tmp_path):
    run_job(job(tmp_path / "load", "load", code="plain"), ROOT)
    dense = tmp_path / "load" / "out" / MODEL
    settings = {"pattern": "2:4", "exclude": ["layers.2"]}
    made = job(tmp_path, "sparsify", settings, code="plain", start=dense)
    with pytest.raises(UnsupportedError, match="a GPU for each process"):
        run_job(replace(made, device="cuda"), ROOT)
