"""Masks hold under every optimizer, in averages, at any precision, compiled, copied and resumed."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from twofour.core.errors import GateError, InputError
from twofour.train import Sparsifier


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=4),
        nn.Flatten(),
        nn.Linear(32 * 9, 8),
    )


MASKED = ("0", "3", "5")


def loss_of(model, step):
    torch.manual_seed(1000 + step)
    return model(torch.randn(4, 4, 3, 3)).float().square().mean()


def train(model, *optimizers, steps=3):
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()


def strays(model, masks=None):
    """How many weights are not zero where the mask (of `masks`, else its own) is false."""
    source = masks or model
    layers = [(model.get_submodule(n), source.get_submodule(n)) for n in MASKED]
    return sum(int((layer.weight[~other.weight_mask] != 0).sum()) for layer, other in layers)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd, nesterov, foreach": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, foreach=True
    ),
    "sgd, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam, for": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, foreach=False),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_leaves_weights_and_states_masked(name):
    model = network()
    sparsifier = Sparsifier(model).prune()
    optimizer = OPTIMIZERS[name](model.parameters())
    sparsifier.attach(optimizer)
    before = model[3].weight.clone()
    train(model, optimizer)
    sparsifier.verify()
    assert strays(model) == 0
    assert not torch.equal(before, model[3].weight)
    for index in MASKED:
        layer = model.get_submodule(index)
        for state in optimizer.state[layer.weight].values():
            if torch.is_tensor(state) and state.shape == layer.weight.shape:
                assert (state[~layer.weight_mask] == 0).all()


def test_a_quantized_state_has_no_zero_and_is_left_alone():
    model = network()
    sparsifier = Sparsifier(model).prune()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    codes = torch.full_like(model[5].weight, 127, dtype=torch.uint8)
    optimizer.state[model[5].weight]["codes"] = codes
    train(model, optimizer, steps=1)
    assert (codes == 127).all()
    assert strays(model) == 0


def test_lbfgs_that_calls_its_closure_many_times():
    model = network()
    sparsifier = Sparsifier(model).prune()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    sparsifier.attach(optimizer)
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert len(calls) > 4
    sparsifier.verify()
    assert strays(model) == 0


def test_several_optimizers_and_parameter_groups():
    model = network()
    sparsifier = Sparsifier(model).prune()
    first = torch.optim.SGD([{"params": model[0].parameters()}], lr=0.1, momentum=0.9)
    first.add_param_group({"params": list(model[3].parameters()), "lr": 0.2})
    second = torch.optim.AdamW(model[5].parameters(), lr=0.1)
    sparsifier.attach(first)
    sparsifier.attach(second)
    train(model, first, second)
    sparsifier.verify()
    assert strays(model) == 0


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("prune_first", [False, True])
def test_an_average_is_masked_whenever_it_was_made(use_buffers, prune_first):
    model = network()
    sparsifier = Sparsifier(model)
    if prune_first:
        sparsifier.prune()
    decay = get_ema_multi_avg_fn(0.9)
    ema = AveragedModel(model, multi_avg_fn=decay, use_buffers=use_buffers)
    sparsifier.prune()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer, ema)
    assert strays(ema.module) == 0
    for _ in range(3):
        train(model, optimizer, steps=1)
        ema.update_parameters(model)
    sparsifier.verify()
    assert strays(ema.module, model) == 0
    assert not torch.equal(ema.module[0].weight, model[0].weight)
    for name in MASKED:
        mask = ema.module.get_submodule(name).weight_mask
        assert torch.equal(mask, model.get_submodule(name).weight_mask)
    Sparsifier(ema).verify()  # it can be saved and exported by itself


def test_a_copy_that_lost_its_mask_is_named():
    model = network()
    sparsifier = Sparsifier(model).prune()
    ema = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer, ema)
    sparsifier.verify()
    with torch.no_grad():
        ema.module[5].weight.add_(1.0)
    with pytest.raises(GateError, match="copy 0, 5: weight is not 2:4: output channel 0, chan"):
        sparsifier.verify()
    train(model, optimizer, steps=1)
    sparsifier.verify()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[5].weight.add_(1.0)
    with pytest.raises(GateError, match="copy 1, 5: weight is not 2:4"):
        sparsifier.verify(other)


def test_a_copy_of_another_model_is_refused():
    model = network()
    sparsifier = Sparsifier(model).prune()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = network()
    other[5] = nn.Linear(32 * 9, 12)
    del other[3]
    with pytest.raises(InputError, match=r"3: it has no such weight\n  5: it has no such weight"):
        sparsifier.attach(optimizer, other)
    assert not optimizer._optimizer_step_post_hooks


def test_new_masks_reach_the_copies():
    model = network()
    sparsifier = Sparsifier(model).prune()
    ema = AveragedModel(model)
    sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.1), ema)
    swapped = ~model[5].weight_mask
    with torch.no_grad():
        model[5].weight.copy_(torch.randn_like(model[5].weight))
    sparsifier.set_masks({"5": swapped})
    assert torch.equal(ema.module[5].weight_mask, swapped)
    sparsifier.verify()


def test_gradient_scaling_with_a_skipped_step():
    model = network()
    sparsifier = Sparsifier(model).prune()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    weights = []
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, step)
        scaler.scale(loss).backward()
        if step == 1:
            model[3].weight.grad[0, 0, 0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        sparsifier.verify()
        assert strays(model) == 0
        weights.append(model[3].weight.detach().clone())
    assert torch.equal(weights[0], weights[1])  # skipped
    assert not torch.equal(weights[1], weights[2])


def test_nan_gradients_do_not_reach_removed_weights():
    model = network()
    sparsifier = Sparsifier(model).prune()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    loss_of(model, 0).backward()
    model[3].weight.grad.fill_(float("nan"))
    optimizer.step()
    assert strays(model) == 0


def test_accumulated_gradients():
    model = network()
    sparsifier = Sparsifier(model).prune()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    for step in range(6):
        loss_of(model, step).backward()
        if step % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    sparsifier.verify()
    assert strays(model) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)).to(dtype)
    sparsifier = Sparsifier(model).prune()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    model(torch.randn(4, 16, dtype=dtype)).square().mean().backward()
    optimizer.step()
    sparsifier.verify()
    model.to(torch.float32)
    assert model[0].weight_mask.dtype is torch.bool
    sparsifier.verify()


def test_a_value_that_only_float64_can_tell_from_zero_is_found():
    model = nn.Sequential(nn.Linear(8, 8)).double()
    sparsifier = Sparsifier(model).prune()
    with torch.no_grad():
        model[0].weight[~model[0].weight_mask] = 1e-300
    with pytest.raises(GateError, match="hold 4 nonzeros"):
        sparsifier.verify()


def test_copied_and_pickled_models_bring_their_masks():
    model = network()
    Sparsifier(model).prune()
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(pickled, weights_only=False),
    ):
        sparsifier = Sparsifier(other)
        sparsifier.verify()
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
        sparsifier.attach(optimizer)
        train(other, optimizer, steps=1)
        sparsifier.verify()
        assert strays(other) == 0
        assert not torch.equal(other[3].weight, model[3].weight)


def test_a_sparsifier_is_copied_together_with_its_model():
    sparsifier = copy.deepcopy(Sparsifier(network()).prune())
    with torch.no_grad():
        sparsifier.model[3].weight.add_(1.0)
    with pytest.raises(GateError):
        sparsifier.verify()


def saved(model):
    """What a file gives back, without pickles."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_model_that_was_never_pruned_takes_up_a_checkpoint(prefix):
    model = network()
    Sparsifier(model, {"0": "4:8", "*": "2:4"}, exclude=["0"]).prune()
    state = {prefix + name: value for name, value in saved(model).items()}
    fresh = network(seed=1)
    sparsifier = Sparsifier(fresh, "2:4", exclude=["0"]).restore(state)
    sparsifier.verify()
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name
    assert [e.energy_kept for e in sparsifier.report() if e.pruned] == [None, None]
    fresh.load_state_dict(saved(model), strict=True)  # it has the buffers now


def test_a_wrapped_model_takes_up_a_plain_checkpoint():
    model = network()
    Sparsifier(model).prune()
    fresh = nn.DataParallel(network(seed=1))
    Sparsifier(fresh).restore(saved(model)).verify()
    assert torch.equal(fresh.module[3].weight, model[3].weight)


def checkpoint(pattern="2:4", change=lambda model: None, **options):
    model = network()
    change(model)
    Sparsifier(model, pattern, **options).prune()
    return saved(model)


def widen(model):
    model[5] = nn.Linear(32 * 9, 12)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (network().state_dict(), r"expected 3.weight_mask and the like, got no mask"),
        (checkpoint(), "0.weight_mask is of no weight that this Sparsifier prunes"),
        (checkpoint(exclude=["0"], change=widen), r"5: expected a mask of shape \(8, 288\), got"),
        (checkpoint("4:8", exclude=["0"]), "3: mask is not 2:4: output channel 0, tap"),
        (
            {k: v for k, v in checkpoint(exclude=["0"]).items() if k != "5.bias"},
            r'Missing key\(s\) in state_dict: "5.bias"',
        ),
        ({**checkpoint(exclude=["0"]), "9.weight": torch.ones(1)}, "Unexpected key"),
        (
            {**checkpoint(exclude=["0"]), "5.weight_mask": torch.ones(8, 288)},
            "5: expected a mask of dtype torch.bool, got torch.float32",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_leaves_no_mask(state, message):
    fresh = network(seed=1)
    with pytest.raises(InputError, match=message):
        Sparsifier(fresh, exclude=["0"]).restore(state)
    assert not any("mask" in name for name in fresh.state_dict())


def test_masks_of_another_shape_do_not_load_into_a_pruned_model():
    model = network()
    Sparsifier(model).prune()
    with pytest.raises(RuntimeError, match=r"size mismatch for 5.weight_mask"):
        model.load_state_dict(checkpoint(change=widen))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_in_one_graph(backend):
    model = network()
    sparsifier = Sparsifier(model).prune()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    torch._dynamo.reset()
    frames = CompileCounter()

    def count(graph, inputs):
        compiled = frames(graph, inputs)
        return (
            compiled if backend == "eager" else torch._dynamo.lookup_backend(backend)(graph, inputs)
        )

    compiled = torch.compile(model, backend=count, fullgraph=True)
    train(compiled, optimizer, steps=4)
    sparsifier.verify()
    assert strays(model) == 0
    sparsifier.set_masks({"5": model[5].weight_mask.clone()})  # in place: still the same graph
    train(compiled, optimizer, steps=1)
    assert frames.frame_count == 1
    assert Sparsifier(compiled).weights[0].mask is model[0].weight_mask


def test_a_compiled_optimizer_step_masks_too():
    model = network()
    sparsifier = Sparsifier(model).prune()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(3):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        step()
    sparsifier.verify()
    assert strays(model) == 0
