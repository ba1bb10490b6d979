"""Training in half precision: masks hold, scales are float32's, skipped steps change nothing."""

import copy
import math

import pytest
import torch
from torch.nn import functional

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
from twofour.core.errors import InputError
from twofour.train import (
    Distiller,
    Gradual,
    Schedule,
    Shrink,
    Sparsifier,
    SrSte,
    finetune,
    holding,
    load_checkpoint,
)
from twofour.train.half_precision import HalfPrecision
from twofour.train.settings import TrainSettings, settings_of


@pytest.mark.parametrize("precision", HALF)
def test_weights_stay_float32_and_masked(precision):
    model, sparsifier = pruned()
    seen = []
    model.second.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    history = finetune(model, batches, schedule(precision, clip_norm=1.0), method=sparsifier)
    assert set(seen) == {HALF[precision]}
    assert history[-1].loss < history[0].loss
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert strays(model) == 0


@pytest.mark.parametrize("precision", HALF)
def test_distilled_and_quantized(precision):
    model, sparsifier = pruned()
    teacher = network()
    quantizer = quantized(model, learned=True)
    seen = []
    model.second.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    loss = Distiller(model, teacher, hidden={"second": 1.0})
    chosen = schedule(precision, ema=0.9, lr=0.005)
    history = finetune(model, batches, chosen, method=sparsifier, loss=loss)
    assert set(seen) == {HALF[precision]}
    assert math.isfinite(history[-1].loss)
    quantizer.verify()
    assert {s.dtype for s in quantizer.scales} == {torch.float32}
    assert all(float(s.detach().abs().max()) > 0 for s in quantizer.scales if s.numel() > 1)


def test_ranges_seen_under_autocast_are_counted_in_float32():
    found = {}
    for enabled in (False, True):

        def run(each, batch, enabled=enabled):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return each(batch)

        quantizer = quantized(network().eval())
        quantizer.calibrate([x for x, _ in batches(9)], forward=run)
        found[enabled] = {
            name: quantizer.quantizers.get(name).scale.clone() for name in quantizer.quantizers
        }
        assert {scale.dtype for scale in found[enabled].values()} == {torch.float32}
    for name, scale in found[False].items():
        torch.testing.assert_close(found[True][name], scale, rtol=0.03, atol=0)


def test_rounds_half_values_as_float32_does():
    model = network().eval()
    quantizer = quantized(model)
    each = next(
        quantizer.quantizers.get(name)
        for name in quantizer.quantizers
        if quantizer.quantizers.get(name).axis is None
    )
    x = torch.randn(4, 4, 6, 6).half()
    wanted = each(x.float())
    got = each(x)
    assert got.dtype is torch.float16
    torch.testing.assert_close(got.float(), wanted.half().float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_hold_in_a_loop_with_a_scaler(name):
    _, moved = own_loop("cpu", OPTIMIZERS[name])
    assert moved == 5


def test_a_skipped_step_is_noticed():
    model, sparsifier = pruned()
    chosen = schedule("fp16")
    optimizer = chosen.optimizer.build(model, chosen.lr)
    sparsifier.attach(optimizer)
    precision = HalfPrecision(chosen, optimizer, torch.device("cpu"))
    before = copy.deepcopy(model.state_dict())
    x, labels = batches(0)[0]
    steps = []
    for factor in (1e36, 1.0):
        with precision.forward():
            loss = functional.cross_entropy(model(x), labels) * factor
        steps.append(precision.step(loss, list(model.parameters())))
        same = torch.equal(before["second.weight"], model.second.weight)
        assert same is (factor != 1.0)
    assert steps == [False, True]
    assert precision.scaler.get_scale() == 2.0**15


METHODS = {
    "gradual": lambda s, steps: Gradual(s, steps, end=1.0),
    "groups": lambda s, steps: Gradual(s, steps, end=1.0, by="groups"),
    "srste": lambda s, steps: SrSte(s, steps, freeze=1.0),
    "shrink": lambda s, steps: Shrink(s, steps, end=1.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_count_the_steps_that_are_left_out(name):
    model = network()
    method = METHODS[name](Sparsifier(model), 12)
    first = []

    def loss(model, batch):
        x, labels = batch
        first.append(len(first) < 2)  # a scaled gradient overflows
        return functional.cross_entropy(model(x), labels) * (1e36 if first[-1] else 1.0)

    finetune(model, batches, schedule("fp16"), method=method, loss=loss)
    assert method.step == 12
    assert strays(model) == 0
    method.sparsifier.verify()


def test_a_method_that_is_attached_nowhere_skips_nothing():
    with pytest.raises(InputError, match="not attached"):
        Gradual(Sparsifier(network()), 12).skip()


def test_resumes_with_its_scaler_bit_for_bit(tmp_path):
    class Stop(Exception):
        pass

    def stop(at):
        if at.epoch == 1:
            raise Stop

    chosen, path = schedule("fp16"), tmp_path / "run.pt"
    straight, sparsifier = pruned()
    expected = finetune(straight, batches, chosen, method=sparsifier)
    model, sparsifier = pruned()
    with pytest.raises(Stop):
        finetune(model, batches, chosen, method=sparsifier, checkpoint=path, progress=stop)
    model, sparsifier = pruned()
    assert finetune(model, batches, chosen, method=sparsifier, checkpoint=path) == expected
    for name, value in straight.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    again, _ = pruned()
    load_checkpoint(path, again)
    assert strays(again) == 0
    model, sparsifier = pruned()
    with pytest.raises(InputError, match="fp16: True there, False here"):
        finetune(model, batches, schedule("bf16"), method=sparsifier, checkpoint=path)


def test_both_precisions_contradict_each_other():
    with pytest.raises(InputError, match="one of bf16 and fp16"):
        Schedule(bf16=True, fp16=True)
    with pytest.raises(InputError, match="in one of them"):
        settings_of(TrainSettings, {"bf16": True, "fp16": True})
    with pytest.raises(InputError, match="use bf16"):
        settings_of(TrainSettings, {"fp16": True, "parallel": "fsdp2"})
    assert settings_of(TrainSettings, {"fp16": True}).schedule(0).fp16


def test_many_tensors_are_zeroed_as_each_by_itself():
    torch.manual_seed(0)
    kinds = (torch.float32, torch.float16, torch.float64, torch.bfloat16)
    values = [torch.randn(3 + i, 5).to(kind) for i, kind in enumerate(kinds)]
    values[0][0] = torch.nan
    masks = [torch.rand(value.shape) < 0.5 for value in values]
    wanted = [value.clone() for value in values]
    for value, mask in zip(wanted, masks, strict=True):
        holding.zero_removed(value, mask)
    holding.zero_together(list(zip(values, masks, strict=True)))
    for got, each in zip(values, wanted, strict=True):
        torch.testing.assert_close(got, each, rtol=0, atol=0, equal_nan=True)
