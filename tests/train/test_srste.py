"""SR-STE does what the paper's equation says, step by step, and ends with locked masks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.train.resuming import stopped_and_resumed
from twofour.core.errors import InputError, UnsupportedError
from twofour.train import AdamW, Schedule, Sgd, Sparsifier, SrSte, finetune, load_checkpoint
from twofour.train.masks import mask_of

DECAY = 0.05


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(self.norm(self.conv(x)).relu().mean((2, 3)))


class Sparse(torch.autograd.Function):
    """The paper's layer: sparse forward, straight through and decay backward."""

    @staticmethod
    def forward(ctx, weight):
        mask = mask_of(weight.detach().square(), "2:4")
        ctx.save_for_backward(weight, mask)
        return torch.where(mask, weight, 0.0)

    @staticmethod
    def backward(ctx, grad):
        weight, mask = ctx.saved_tensors
        return torch.add(grad, torch.where(mask, 0.0, weight), alpha=DECAY)


class Reference(Net):
    def forward(self, x):
        y = functional.conv2d(x, Sparse.apply(self.conv.weight), self.conv.bias, padding=1)
        y = self.norm(y).relu().mean((2, 3))
        return functional.linear(y, Sparse.apply(self.linear.weight), self.linear.bias)


def batches(epoch=0, count=6):
    random = torch.Generator().manual_seed(epoch)
    x = torch.randn(count, 16, 4, 5, 5, generator=random)
    return [(part, part.mean((2, 3)).argmax(1)) for part in x]


def train(model, optimizer, told):
    for x, labels in told:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        yield


@pytest.mark.parametrize("options", [Sgd(weight_decay=0.01), AdamW(weight_decay=0.1)])
def test_each_step_is_that_of_the_paper(options):
    reference, model = Reference(), Net()
    srste = SrSte(Sparsifier(model), 30, decay=DECAY, freeze=1.0)
    optimizer = options.build(model, 0.05)
    srste.attach(optimizer)
    told = batches(count=30)
    steps = zip(
        train(reference, options.build(reference, 0.05), told),
        train(model, optimizer, told),
        strict=True,
    )
    flipped = 0
    for _ in steps:
        for name in ("conv", "linear"):
            dense = getattr(reference, name).weight.detach()
            assert torch.equal(srste.dense(name), dense)
            mask = mask_of(dense.square(), "2:4")
            assert torch.equal(getattr(model, name).weight, torch.where(mask, dense, 0.0))
            assert torch.equal(getattr(model, name).weight_mask, mask)
        assert torch.equal(model.linear.bias, reference.linear.bias)
        flipped += srste.flip_rate() > 0
    assert flipped > 3, "masks moved, else this proves little"
    x = told[0][0]
    assert torch.equal(model(x), reference(x))


def test_the_flip_rate_by_hand():
    model = nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 3, 2, 1, 1, 2, 3, 4]]).repeat(2, 1))
    srste = SrSte(Sparsifier(model), 2, decay=0.0, freeze=1.0)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    srste.attach(optimizer)
    model.weight.grad = torch.zeros(2, 8)
    model.weight.grad[0, 3] = -9.0  # 1 -> 10: in, and 3 goes out
    optimizer.step()
    model.weight.grad = torch.zeros(2, 8)
    optimizer.step()
    assert srste.flip_rate() == pytest.approx(2 / 16 / 2)
    assert srste.flip_rate() == 0.0
    assert model.weight[0, :4].tolist() == [4, 0, 0, 10]


def test_after_the_freeze_the_masks_stay_and_momentum_is_masked():
    model = Net()
    sparsifier = Sparsifier(model)
    srste = SrSte(sparsifier, 20, freeze=0.5)
    optimizer = Sgd().build(model, 0.1)
    srste.attach(optimizer)
    masks = []
    for step, _ in enumerate(train(model, optimizer, batches(count=20)), 1):
        masks.append(model.conv.weight_mask.clone())
        assert srste.frozen == (step >= 10)
    assert not torch.equal(masks[0], masks[9])
    assert all(torch.equal(mask, masks[9]) for mask in masks[9:])
    momentum = optimizer.state[model.conv.weight]["momentum_buffer"]
    assert not momentum[~model.conv.weight_mask].any()
    kept = {entry.name: entry.energy_kept for entry in sparsifier.report()}
    assert 0.5 < kept["conv"] < 1, "of the dense weight at the freeze"
    assert srste.finish() is sparsifier
    assert not [name for name in model.state_dict() if name.endswith("_dense")]
    sparsifier.verify()
    with pytest.raises(InputError, match="locked"):
        sparsifier.prune()
    for _ in train(model, optimizer, batches(1)):
        sparsifier.verify()


@pytest.mark.parametrize("freeze", [0.0, 0.5, 1.0])
def test_in_the_loop_and_resumed_bit_for_bit(tmp_path, freeze):
    def prepare():
        model = Net()
        return model, SrSte(Sparsifier(model), 24, freeze=freeze)

    _, expected = stopped_and_resumed(prepare, batches, Schedule(4, 0.05, ema=0.9), tmp_path, 3)
    plain = Net()
    Sparsifier(plain).prune()
    load_checkpoint(tmp_path / "run.pt", plain)
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in expected.items())


def test_it_learns_and_copies_follow():
    model = Net()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    srste = SrSte(Sparsifier(model), 60)
    optimizer = Sgd().build(model, 0.1)
    srste.attach(optimizer, averaged)
    told = batches(count=60)
    before = mean_loss(model, told)
    for _ in train(model, optimizer, told):
        averaged.update_parameters(model)
    srste.finish().verify(averaged)
    assert mean_loss(model, told) < 0.8 * before


@torch.no_grad()
def mean_loss(model, told):
    return float(sum(functional.cross_entropy(model(x), labels) for x, labels in told)) / len(told)


def test_refusals():
    model = Net()
    with pytest.raises(InputError, match="got decay -1, freeze 2"):
        SrSte(Sparsifier(model), 5, decay=-1, freeze=2)
    with pytest.raises(InputError, match="number of training steps\n  expected above 0; got 0"):
        SrSte(Sparsifier(model), 0)
    with pytest.raises(InputError, match="this sparsifier locks them"):
        SrSte(Sparsifier(model, locked=True), 5)
    with pytest.raises(InputError, match="masks by magnitude, and this sparsifier by wanda"):
        SrSte(Sparsifier(model, criterion="wanda"), 5)
    srste = SrSte(Sparsifier(model), 5)
    with pytest.raises(InputError, match="never attached"):
        srste.finish()
    with pytest.raises(InputError, match="lacks 2 of the weights to prune\n  conv, linear"):
        srste.attach(torch.optim.SGD(copy.deepcopy(model).parameters(), 0.1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    srste.attach(optimizer)
    with pytest.raises(InputError, match="attached already"):
        srste.attach(optimizer)
    with pytest.raises(UnsupportedError, match="a step with a closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(InputError, match="needs 4 steps of the optimizer\n  0 were done"):
        srste.finish()
    state = SrSte(Sparsifier(Net()), 5, decay=0.5).state_dict()
    with pytest.raises(InputError, match=r"decay: 0\.5 there, 0\.0002 here"):
        srste.load_state_dict(state)
    with pytest.raises(InputError, match="no dense weight"):
        srste.dense("norm")
    short = SrSte(Sparsifier(Net()), 5)
    with pytest.raises(InputError, match=r"4 epochs of 6 batches are 24\n  fix: .*steps=24"):
        finetune(short.sparsifier.model, batches, Schedule(4), method=short)


def test_steps_that_a_gradient_scaler_skips_do_not_keep_it_from_finishing():
    model = Net()
    srste = SrSte(Sparsifier(model), 6, freeze=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    srste.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for i, (x, labels) in enumerate(batches()):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), labels) * (torch.inf if i == 0 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert srste.step == 5
    srste.finish().verify()
