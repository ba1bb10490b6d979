"""Pruning, fine-tuning, quantization-aware training and export of models that are on a GPU."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from tests.train.mixed import (
    HALF,
    OPTIMIZERS,
    batches,
    network,
    own_loop,
    pruned,
    quantized,
    schedule,
    strays,
)
from twofour.train import (
    Distiller,
    Gradual,
    Schedule,
    Shrink,
    Sparsifier,
    SrSte,
    evaluate,
    export_onnx,
    finetune,
    load_checkpoint,
    permute,
    reestimate_batchnorm,
)
from twofour.train.fake_quant import FakeQuant
from twofour.train.observe import Observer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch has no GPU here"),
]
GPU = "cuda"


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor", "sparsegpt"])
def test_prunes_as_on_the_cpu(criterion):
    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    masks = []
    for device in (GPU, "cpu"):
        model = network(device)
        sparsifier = Sparsifier(model, criterion=criterion)
        data = None if criterion == "magnitude" else batches(0)
        sparsifier.prune(data, loss=loss if criterion == "taylor" else None)
        sparsifier.verify()
        masks.append({w.name: w.mask.cpu() for w in sparsifier.weights})
        assert {w.mask.device.type for w in sparsifier.weights} == {device}
    for name, mask in masks[1].items():
        assert float((masks[0][name] == mask).float().mean()) > 0.99, name


def test_permutes_as_on_the_cpu():
    found = [permute(network(device), batches(0)[0][0].to(device)) for device in (GPU, "cpu")]
    assert found[0].recovered == pytest.approx(found[1].recovered, abs=1e-6)


@pytest.mark.parametrize("precision", ["", *HALF])
def test_fine_tunes_with_masks_held(precision):
    model, sparsifier = pruned(GPU)
    chosen = schedule(precision, clip_norm=1.0, ema=0.9) if precision else Schedule(2, 0.05)
    seen = []
    model.second.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    loss = Distiller(model, network(GPU), hidden={"second": 1.0})
    history = finetune(model, batches, chosen, method=sparsifier, loss=loss)
    assert set(seen) == {HALF.get(precision, torch.float32)}
    assert history[-1].loss < history[0].loss
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, GPU)}
    assert strays(model) == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_hold_in_a_loop_with_a_scaler(name):
    _, moved = own_loop(GPU, OPTIMIZERS[name])
    assert moved == 5


@pytest.mark.parametrize("method", [Gradual, SrSte, Shrink])
def test_methods_under_float16(method):
    model = network(GPU)
    made = method(Sparsifier(model), 12)
    finetune(model, batches, schedule("fp16"), method=made)
    assert made.step == 12
    made.sparsifier.verify()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("precision", HALF)
def test_trains_with_fake_quantizers(precision, learned):
    model, sparsifier = pruned(GPU)
    quantizer = quantized(model, learned)
    assert {b.device.type for b in quantizer.quantizers.buffers()} == {GPU}
    before = {n: quantizer.quantizers.get(n).scale.clone() for n in quantizer.quantizers}
    chosen = schedule(precision, lr=0.005)
    history = finetune(model, batches, chosen, method=sparsifier)
    assert history[-1].loss < history[0].loss
    quantizer.verify()
    assert before.keys() == set(quantizer.quantizers)
    assert {s.dtype for s in quantizer.scales} <= {torch.float32}
    assert strays(model) == 0


def test_calibrates_as_on_the_cpu():
    scales = []
    for device in (GPU, "cpu"):
        quantizer = quantized(network(device))
        names = list(quantizer.quantizers)
        scales.append({name: quantizer.quantizers.get(name).scale.cpu() for name in names})
    for name, scale in scales[1].items():
        torch.testing.assert_close(scales[0][name], scale, rtol=0.03, atol=0)


def test_counts_and_rounds_bit_for_bit_as_the_cpu():
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 3
    seen = []
    for device in (GPU, "cpu"):
        observer = Observer(torch.device(device))
        for part in x.to(device).split(1000):
            observer.add(part)
        seen.append(observer.histogram())
    assert np.array_equal(seen[0].counts, seen[1].counts)
    assert (seen[0].limit, seen[0].zeros) == (seen[1].limit, seen[1].zeros)
    model = network()
    quantizer = quantized(model)
    name = next(n for n in quantizer.quantizers if quantizer.quantizers.get(n).axis is None)
    each: FakeQuant = quantizer.quantizers.get(name)
    wanted = each(x)
    assert torch.equal(each.to(GPU)(x.to(GPU)).cpu(), wanted)


@pytest.mark.parametrize("there", [GPU, "cpu"])
def test_a_checkpoint_goes_on_on_another_device(there, tmp_path):
    class Stop(Exception):
        pass

    def stop(at):
        if at.epoch == 1:
            raise Stop

    here = "cpu" if there == GPU else GPU
    path, chosen = tmp_path / "run.pt", schedule("fp16", ema=0.9)
    model, sparsifier = pruned(there)
    with pytest.raises(Stop):
        finetune(model, batches, chosen, method=sparsifier, checkpoint=path, progress=stop)
    model, sparsifier = pruned(here)
    history = finetune(model, batches, chosen, method=sparsifier, checkpoint=path)
    assert [each.epoch for each in history] == [0, 1]
    assert {p.device.type for p in model.parameters()} == {here}
    assert strays(model) == 0
    other, _ = pruned(there)
    load_checkpoint(path, other)
    x, labels = batches(5)[0]
    assert evaluate(other, x, labels) == pytest.approx(evaluate(model, x, labels), abs=0.07)


def test_a_quantized_model_moves_with_its_scales():
    model, _ = pruned(GPU)
    quantized(model)
    x = batches(3)[0][0]
    model.eval()
    with torch.no_grad():
        there = model(x.to(GPU)).cpu()
        here = model.cpu()(x)
    assert strays(model) == 0
    # What lies between two steps may take either.
    assert float((there - here).abs().max()) < 0.05 * float(here.abs().max())
    again, _ = pruned("cpu")
    quantized(again).restore({k: v.to(GPU) for k, v in model.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(again.eval()(x), here)


@pytest.mark.parametrize("rounded", [False, True])
def test_exports_from_the_gpu_what_the_cpu_would(rounded, tmp_path):
    model, _ = pruned(GPU)
    if rounded:
        quantized(model)
    x = batches(0)[0][0]
    paths = [tmp_path / "gpu.onnx", tmp_path / "cpu.onnx"]
    patterns = export_onnx(model, x.to(GPU), paths[0])
    assert set(patterns.values()) == {"2:4"}
    assert {p.device.type for p in model.parameters()} == {GPU}, "the model moved"
    export_onnx(model.cpu(), x, paths[1])
    outputs = [
        onnxruntime.InferenceSession(str(p), providers=["CPUExecutionProvider"]).run(
            None, {"x": x.numpy()}
        )[0]
        for p in paths
    ]
    assert np.array_equal(outputs[0], outputs[1])


def test_takes_batches_from_a_loader_with_pinned_memory():
    x, labels = (torch.cat(parts) for parts in zip(*batches(0), strict=True))
    data = torch.utils.data.TensorDataset(x, labels)
    loader = torch.utils.data.DataLoader(data, 16, pin_memory=True)
    model, sparsifier = pruned(GPU)
    finetune(model, lambda epoch: loader, schedule("bf16"), method=sparsifier)
    reestimate_batchnorm(model, loader)
    assert strays(model) == 0
