"""A model with a Quantizer rounds wherever it runs, trains, is saved, copied and resumed."""

import copy
import io

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import checkpoint

from tests.train import quantize_worker
from tests.train.processes import two_processes
from tests.train.quantized_models import run_layer_by_layer
from tests.train.test_quantize_places import Block, Residual, images, network
from twofour.core.errors import GateError, InputError
from twofour.train import (
    Quantizer,
    QuantizerOptions,
    Schedule,
    Sparsifier,
    export_onnx,
    finetune,
)
from twofour.train.explicit_attention import attend
from twofour.train.networks.resnet import ResNet


class Stop(Exception):
    """Raised by a run's progress."""


def quantized(**options):
    torch.manual_seed(0)
    model, x = network(Residual)
    return model, x[0], Quantizer(model, x, QuantizerOptions(**options)).calibrate([x[0]])


def seen_by(module, model, x):
    """What a layer is given, and what it multiplies with."""
    found = []

    def note(args, weight):
        found.extend((args, weight))
        return real(args, weight, *rest)

    real, rest = functional.conv2d, (None, 1, 1)
    forward = module.forward
    module.forward = lambda y: note(y, module.weight)
    try:
        model(x)
    finally:
        module.forward = forward
    return found


def test_rounds_weights_and_activations_and_can_be_switched_off():
    torch.manual_seed(0)
    model, (x,) = network(Residual)
    model.eval()
    names, expected = list(model.state_dict()), model(x)
    quantizer = Quantizer(model, x)
    assert torch.equal(model(x), expected), "not calibrated yet: as it was"
    with pytest.raises(InputError, match="no scales yet"):
        quantizer.enable()
    quantizer.calibrate([x])
    rounded = model(x)
    error = float((rounded - expected).norm().detach() / expected.norm().detach())
    assert 0 < error < 0.05
    with quantizer.off():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), rounded)
    quantizer.enable(False)
    assert torch.equal(model(x), expected)
    quantizer.remove()
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_exported_file_computes_the_same(tmp_path):
    model, x, _ = quantized()
    model.eval()
    export_onnx(model, x, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (got,) = session.run(None, {"x": x.numpy()})
    expected = model(x).detach().numpy()
    assert np.abs(got - expected).max() < 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("activation", ["int8", "uint8"])
def test_each_layer_of_a_deep_file_rounds_as_the_model_does(tmp_path, activation):
    torch.manual_seed(0)
    model, (x,) = network(lambda: ResNet(50, 10))
    Quantizer(model, x, QuantizerOptions(activation=activation)).calibrate([x])
    export_onnx(model.eval(), x, tmp_path / "m.onnx")
    (got, wanted), layers = run_layer_by_layer(tmp_path / "m.onnx", model, x)
    assert len(layers) > 50
    for name, (ours, theirs) in layers.items():
        assert np.abs(ours - theirs).max() <= 1, name
        assert (ours != theirs).mean() < 1e-3, name
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_what_is_changed_in_place_is_rounded_where_it_is_read():
    class InPlace(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = (nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4))
            self.c = nn.Conv2d(4, 4, 1)
            self.in_place = in_place

        def forward(self, x):
            if self.in_place:
                y = self.a(x)
                y.relu_()
                y.add_(self.b(y))
                functional.relu_(y)
                y[:, :2] = 0.5
            else:
                y = functional.relu(self.a(x))
                y = functional.relu(y + self.b(y))
                y = torch.cat([torch.full_like(y[:, :2], 0.5), y[:, 2:]], 1)
            return self.c(y)

    x, results = images(8)[0], []
    for in_place in (True, False):
        model = InPlace(in_place)
        quantizer = Quantizer(model, x, QuantizerOptions("minmax")).calibrate([x])
        with torch.no_grad():
            results.append(model(x))
            with quantizer.off():
                assert not torch.equal(model(x), results[-1])
    assert torch.equal(*results)


def test_copies_averages_and_files_have_their_own_quantizers():
    model, x, quantizer = quantized()
    model.eval()
    expected = model(x)
    twin, average = copy.deepcopy(model), AveragedModel(model).eval()
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    quantizer.enable(False)
    for other in (twin, average, loaded):
        assert torch.equal(other(x), expected)


def test_scales_are_restored_into_a_fresh_model():
    for learned in (False, True):
        model, x, quantizer = quantized(learned_scales=learned)
        model.eval()
        assert len(quantizer.scales) == (len(quantizer.quantizers) if learned else 0)
        torch.manual_seed(5)
        fresh = Residual().eval()
        again = Quantizer(fresh, x, QuantizerOptions(learned_scales=learned))
        again.restore(model.state_dict())
        assert torch.equal(fresh(x), model(x))
    with pytest.raises(InputError, match="expected the scales of a Quantizer, got none"):
        again.restore(Residual().state_dict())
    with pytest.raises(InputError, match="zero_point: expected integers of uint8, got int8"):
        again.restore(quantized(activation="int8")[0].state_dict())


@pytest.mark.parametrize("learned", [False, True])
def test_fine_tuning_holds_masks_and_resumes_bit_for_bit(tmp_path, learned):
    def batches(epoch):
        torch.manual_seed(epoch)
        return [(torch.randn(4, 3, 8, 8), torch.randint(10, (4,))) for _ in range(3)]

    def run(path, stop_in=None):
        def progress(at):
            if at.epoch == stop_in:
                raise Stop

        torch.manual_seed(0)
        model, _ = network(Residual, 8)
        sparsifier = Sparsifier(model).prune()
        options = QuantizerOptions(learned_scales=learned)
        quantizer = Quantizer(model, batches(0)[0][0], options).calibrate(batches(7))
        schedule = Schedule(3, 0.01, ema=0.5)
        finetune(model, batches, schedule, method=sparsifier, checkpoint=path, progress=progress)
        quantizer.verify()
        return model.state_dict(), quantizer

    expected, quantizer = run(tmp_path / "straight.pt")
    with pytest.raises(Stop):
        run(tmp_path / "run.pt", stop_in=2)
    state, _ = run(tmp_path / "run.pt")
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    quantizer.freeze()
    assert not quantizer.scales


def test_a_weight_that_lost_its_mask_is_found():
    torch.manual_seed(0)
    model, (x,) = network(Residual)
    Sparsifier(model).prune()
    quantizer = Quantizer(model, x).calibrate([x])
    with torch.no_grad():
        model.layers[0].conv1.weight += 0.1
    with pytest.raises(GateError, match=r"layers\.0\.conv1"):
        quantizer.verify()


def test_two_processes_train_as_one(tmp_path):
    folder = two_processes(quantize_worker.__file__, tmp_path)
    states = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    for learned, first, second in zip((False, True), *states, strict=True):
        alone = quantize_worker.trained(lambda model: model, learned=learned)
        for name, value in alone.items():
            assert torch.equal(first[name], second[name]), name
            if "quantizers" in name and not learned and not name.endswith("weight.scale"):
                assert torch.equal(first[name], value), "both calibrated on all of the data"


def test_recomputed_and_compiled_forwards_round_too():
    class Recomputed(nn.Module):
        def __init__(self, recompute):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.block, self.side = (
                nn.Conv2d(3, 8, 3),
                Block(8, 8, 1),
                nn.Conv2d(8, 8, 1),
            )
            self.recompute = recompute

        def forward(self, x):
            x = functional.relu(self.stem(x))
            y = self.side(x)  # reads the same tensor, outside of the checkpoint
            if self.recompute is None:
                return self.block(x).mean((2, 3)) + y.mean((2, 3))
            z = checkpoint(self.block, x, use_reentrant=self.recompute)
            return z.mean((2, 3)) + y.mean((2, 3))

    x, gradients = images(8)[0], []
    for recompute, compiled in ((None, False), (False, False), (True, False), (None, True)):
        model = Recomputed(recompute)
        Quantizer(model, x).calibrate([x])
        model.train()
        called = torch.compile(model, backend="eager") if compiled else model
        called(x).square().sum().backward()
        gradients.append(model.block.conv1.weight.grad)
    assert all(torch.equal(gradients[0], each) for each in gradients[1:])


def test_a_part_that_runs_twice_cannot_be_recomputed_alone():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x):
            for _ in range(2):
                x = 10 * checkpoint(self.block, x, use_reentrant=False)
            return x

    model, x = Shared(), torch.randn(3, 4)
    Quantizer(model, x).calibrate([x])
    with pytest.raises(InputError, match="runs several times in the model"):
        model(x).sum().backward()


def test_autocast_rounds_to_the_same_steps():
    model, x, _ = quantized()
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    assert half.dtype is torch.bfloat16
    assert float((half - model(x)).norm() / model(x).norm()) < 0.05


def test_a_forward_that_leaves_the_traced_path_is_refused():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.extra, self.times = nn.Linear(4, 4), nn.Linear(4, 4), 2

        def forward(self, x):
            for _ in range(self.times):
                x = functional.relu(self.a(x))
            return x + self.extra(x) if self.training else x

    model, x = Loop(), torch.randn(3, 4)
    quantizer = Quantizer(model, x).calibrate([x])
    assert quantizer.quantizers.places.stay_float["extra"] == "the example inputs do not reach it"
    model.train()
    model(x)  # a layer that was never traced stays float
    model.times = 3
    with pytest.raises(InputError, match="at a#2/linear, which was not called then"):
        model(x)
    model.times = 2
    model(x)  # the error left nothing behind


def test_a_skipped_layer_does_not_shift_the_scales_of_others():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
            self.skip = False

        def forward(self, x):
            x = x + self.a(x)
            if not self.skip:
                x = x + 100 * self.b(x)
            return x + self.c(x)

    model, x = Skipping(), torch.randn(3, 4)
    Quantizer(model, x, QuantizerOptions(add_inputs="both")).calibrate([x])
    model.skip = True
    with pytest.raises(InputError, match="at add_1, after c, not after b"):
        model(x)


def test_an_interrupted_forward_leaves_nothing_behind():
    class Interrupted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.stop = nn.Linear(4, 4), nn.Linear(4, 4), False

        def forward(self, x):
            x = torch.relu(self.a(x))
            if self.stop:
                raise KeyboardInterrupt
            return self.b(x)

    x = torch.randn(3, 4)
    model, other = Interrupted(), Interrupted()
    Quantizer(model, x).calibrate([x])
    expected = model(x)
    for _ in range(2):
        model.stop = True
        with pytest.raises(KeyboardInterrupt):
            model(x)
        model.stop = False
        Quantizer(other, x).remove()  # not even for other models
        torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=0, atol=0)
        assert torch.equal(model(x), expected)
        assert _get_current_function_mode() is None


def test_a_tensor_read_without_gradients_first_has_them_later():
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            x = torch.relu(self.a(x))
            with torch.no_grad():
                seen = self.b(x)
            return self.c(x) + seen

    model, x = Watched(), torch.randn(3, 4)
    Quantizer(model, x).calibrate([x])
    model(x).sum().backward()
    assert model.a.weight.grad is not None
    assert model.a.weight.grad.any()


def test_a_quantized_teacher_within_the_student():
    class Student(nn.Module):
        def __init__(self, teacher):
            super().__init__()
            self.a, self.teacher = nn.Linear(4, 4), [teacher]

        def forward(self, x):
            with torch.no_grad():
                wanted = self.teacher[0](x)
            return self.a(x) - wanted

    x = torch.randn(3, 4)
    teacher = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    Quantizer(teacher, x).calibrate([x])
    wanted = teacher(x)
    student = Student(teacher)
    Quantizer(student, x).calibrate([x])
    alone = Student(lambda x: wanted)
    alone.load_state_dict(student.state_dict(), strict=False)
    Quantizer(alone, x).calibrate([x])
    assert torch.equal(student(x), alone(x))


def test_calibration_refuses_what_tells_no_range():
    model, x, quantizer = quantized()
    with pytest.raises(InputError, match="no batches"):
        quantizer.calibrate([])
    with pytest.raises(InputError, match="cannot calibrate input"):
        quantizer.calibrate([torch.full_like(x, float("nan"))])
    assert quantizer.quantizers.state == "on", "as before"
    with pytest.raises(InputError, match="never computed relu_relu"):
        quantizer.calibrate([x], lambda model, batch: model.stem(batch))
    with pytest.raises(InputError, match="has a Quantizer already"):
        Quantizer(model, x)


MASKS = {
    "none": lambda: (None, None),
    "causal": lambda: (torch.ones(5, 5).triu(1).bool(), None),
    "added": lambda: (torch.randn(5, 5), None),
    "a head": lambda: (torch.randn(6, 5, 5), torch.tensor([[False] * 3 + [True] * 2] * 3)),
    "padding": lambda: (None, torch.tensor([[False] * 3 + [True] * 2] * 3)),
}


@pytest.mark.parametrize("sizes", [None, 12])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_written_out_computes_the_same(mask, sizes):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, kdim=sizes, vdim=sizes, batch_first=True).eval()
    q, k = torch.randn(3, 5, 16), torch.randn(3, 5, sizes or 16)
    allowed, padding = MASKS[mask]()
    if allowed is not None and allowed.dtype is not torch.bool:
        padding = None if padding is None else torch.where(padding, -torch.inf, 0.0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, q, k):
            return self.attention(q, k, k, key_padding_mask=padding, attn_mask=allowed)

    model = Model()
    expected = model(q, k)
    Quantizer(model, (q, k)).quantizers.state = "on"  # written out, but not rounded yet
    for got, wanted in zip(model(q, k), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    heads = q.unflatten(2, (2, 8)).transpose(1, 2)
    for options in ({"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.rand(5, 5) > 0.2}):
        wanted = functional.scaled_dot_product_attention(heads, heads, heads, **options)
        torch.testing.assert_close(attend(heads, heads, heads, **options), wanted)
