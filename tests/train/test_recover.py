"""Fine-tuning learns, resumes without a difference, and refuses foreign files."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from twofour.core.errors import GateError, InputError
from twofour.train import (
    AdamW,
    Schedule,
    Sgd,
    Sparsifier,
    evaluate,
    finetune,
    load_checkpoint,
    predict,
    recover,
)

SCHEDULE = Schedule(epochs=3, lr=0.1)


@pytest.fixture(autouse=True)
def _each_batch(monkeypatch):
    monkeypatch.setattr(recover, "PROGRESS_EVERY_S", 0.0)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3))


def batches(epoch):
    random = torch.Generator().manual_seed(epoch)
    x = torch.randn(10, 32, 8, generator=random)
    return [(part, part[:, :3].argmax(1)) for part in x]


def pruned():
    model = network()
    return model, Sparsifier(model).prune()


def test_learns_with_the_masks_held():
    model, sparsifier = pruned()
    x, y = batches(99)[0]
    before = evaluate(model, x, y)
    history = finetune(model, batches, SCHEDULE, method=sparsifier)
    assert [entry.epoch for entry in history] == [0, 1, 2]
    assert history[-1].loss < history[0].loss
    assert history[-1].accuracy > history[0].accuracy
    assert evaluate(model, x, y) > before
    assert not model.training
    sparsifier.verify()


def test_progress_counts_every_batch_and_the_rate_follows_a_cosine():
    model = network()
    seen = []
    finetune(model, batches, dataclasses.replace(SCHEDULE, epochs=2), progress=seen.append)
    assert [(at.epoch, at.batch) for at in seen] == [(e, b) for e in (0, 1) for b in range(1, 11)]
    assert all(at.batches == 10 for at in seen)
    assert SCHEDULE.rate(0, 100) == SCHEDULE.lr
    assert SCHEDULE.rate(50, 100) == pytest.approx(SCHEDULE.lr / 2)
    assert SCHEDULE.rate(100, 100) == pytest.approx(0)


def test_bf16_keeps_float32_weights():
    model, sparsifier = pruned()
    history = finetune(model, batches, dataclasses.replace(SCHEDULE, bf16=True), method=sparsifier)
    assert math.isfinite(history[-1].loss)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Stop(Exception):
    """Stands for a power cut."""


def test_stopped_in_an_epoch_and_resumed_equals_uninterrupted(tmp_path):
    straight, sparsifier = pruned()
    expected = finetune(straight, batches, SCHEDULE, method=sparsifier)

    def stop(at):
        if (at.epoch, at.batch) == (1, 4):
            raise Stop

    checkpoint = tmp_path / "new" / "run.pt"
    model, sparsifier = pruned()
    with pytest.raises(Stop):
        finetune(model, batches, SCHEDULE, method=sparsifier, checkpoint=checkpoint, progress=stop)
    model, sparsifier = pruned()
    torch.manual_seed(77)  # another process would have other randomness
    epochs = []
    history = finetune(
        model,
        batches,
        SCHEDULE,
        method=sparsifier,
        checkpoint=checkpoint,
        progress=lambda at: epochs.append(at.epoch),
    )
    assert set(epochs) == {1, 2}
    assert history == expected
    for name, value in straight.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert [path.name for path in checkpoint.parent.iterdir()] == ["run.pt"]

    again, _ = pruned()
    assert load_checkpoint(checkpoint, again) == expected
    assert torch.equal(again[0].weight, straight[0].weight)


def test_finished_run_is_not_trained_again(tmp_path):
    model, sparsifier = pruned()
    finetune(model, batches, SCHEDULE, method=sparsifier, checkpoint=tmp_path / "run.pt")
    seen = []
    finetune(
        model,
        batches,
        SCHEDULE,
        method=sparsifier,
        checkpoint=tmp_path / "run.pt",
        progress=seen.append,
    )
    assert seen == []


def test_foreign_checkpoints_are_refused(tmp_path):
    model, sparsifier = pruned()
    checkpoint = tmp_path / "run.pt"
    finetune(model, batches, SCHEDULE, method=sparsifier, checkpoint=checkpoint)
    with pytest.raises(InputError, match=r"another schedule\n  lr: 0.1 there, 0.2 here"):
        finetune(
            model,
            batches,
            dataclasses.replace(SCHEDULE, lr=0.2),
            method=sparsifier,
            checkpoint=checkpoint,
        )
    other = nn.Linear(8, 3)
    with pytest.raises(InputError, match="another model"):
        finetune(other, batches, SCHEDULE, checkpoint=checkpoint)
    with pytest.raises(InputError, match="cannot read"):
        load_checkpoint(tmp_path / "none.pt", model)


@pytest.mark.parametrize("keep", [0, 10, 500, -1])
def test_damaged_checkpoints_are_refused(tmp_path, keep):
    model, sparsifier = pruned()
    checkpoint = tmp_path / "run.pt"
    finetune(
        model,
        batches,
        dataclasses.replace(SCHEDULE, epochs=1),
        method=sparsifier,
        checkpoint=checkpoint,
    )
    checkpoint.write_bytes(checkpoint.read_bytes()[:keep])
    with pytest.raises(InputError, match="cannot read"):
        load_checkpoint(checkpoint, model)


def test_other_torch_files_are_refused(tmp_path):
    model = network()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(InputError, match="is no fine-tuning checkpoint"):
        load_checkpoint(tmp_path / "weights.pt", model)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="is no fine-tuning checkpoint"):
        load_checkpoint(tmp_path / "list.pt", model)


def test_diverged_training_stops():
    with pytest.raises(InputError, match="training loss became nan in epoch 0, batch 1"):
        finetune(
            network(),
            lambda epoch: [batches(0)[0], (torch.full((4, 8), math.nan), torch.zeros(4).long())],
            SCHEDULE,
        )


def test_a_mask_lost_while_training_is_named():
    model, sparsifier = pruned()

    def spoil(at):
        with torch.no_grad():
            model[3].weight.fill_(1.0)

    with pytest.raises(GateError, match="3: weight is not 2:4"):
        finetune(model, batches, SCHEDULE, method=sparsifier, progress=spoil)


def test_predict_and_evaluate_by_hand():
    model = network()
    model.train()
    x = torch.randn(7, 8)
    model.eval()
    expected = model(x)
    model.train()
    torch.testing.assert_close(predict(model, x, batch_size=3), expected)
    assert model.training
    labels = expected.argmax(1)
    labels[:2] = (labels[:2] + 1) % 3
    assert evaluate(model, x, labels, batch_size=2) == pytest.approx(5 / 7)
    with pytest.raises(InputError, match="got 0 labels, 0 samples"):
        evaluate(model, x[:0], labels[:0])
    with pytest.raises(InputError, match="got 6 labels, 7 samples"):
        evaluate(model, x, labels[:6])


def flattened(value):
    return {name: v.clone() for name, v in value.state_dict().items()}


FULL = Schedule(
    epochs=3,
    lr=0.02,
    warmup=0.2,
    final_lr=0.001,
    optimizer=AdamW(weight_decay=0.1),
    label_smoothing=0.1,
    clip_norm=1.0,
    ema=0.9,
    seed=4,
)


def test_everything_at_once_resumes_bit_for_bit(tmp_path):
    def run(checkpoint=None, stop_in=None):
        def progress(at):
            if at.epoch == stop_in:
                raise Stop

        model = nn.Sequential(*network(), nn.BatchNorm1d(3))
        sparsifier = Sparsifier(model).prune()
        try:
            history = finetune(
                model,
                batches,
                FULL,
                method=sparsifier,
                evaluate=lambda m: evaluate(m, *batches(99)[0]),
                checkpoint=checkpoint,
                progress=progress,
            )
        except Stop:
            return None
        return history, flattened(model)

    history, weights = run()
    run(tmp_path / "run.pt", stop_in=2)
    torch.manual_seed(1234)
    resumed, same = run(tmp_path / "run.pt")
    assert resumed == history
    assert all(torch.equal(same[name], value) for name, value in weights.items())
    loaded = nn.Sequential(*network(), nn.BatchNorm1d(3))
    Sparsifier(loaded).prune()
    load_checkpoint(tmp_path / "run.pt", loaded)
    assert all(torch.equal(flattened(loaded)[name], value) for name, value in weights.items())


def test_the_average_is_evaluated_and_stays_or_goes():
    seen = []

    def figure(model):
        assert not model.training
        seen.append(model[0].weight.detach().clone())
        return len(seen)

    averaged, last = network(), network()
    history = finetune(averaged, batches, FULL, evaluate=figure)
    assert [entry.evaluated for entry in history] == [1, 2, 3]
    assert torch.equal(averaged[0].weight, seen[-1])
    finetune(last, batches, dataclasses.replace(FULL, ema_stays=False), evaluate=figure)
    assert torch.equal(seen[2], seen[5]), "the average is the same"
    plain = network()
    finetune(plain, batches, dataclasses.replace(FULL, ema=0.0))
    assert torch.equal(last[0].weight, plain[0].weight), "keeping an average changes no step"
    assert not torch.equal(last[0].weight, averaged[0].weight)


def test_the_rate_rises_in_steps_or_a_share_and_falls_to_the_last_one():
    schedule = Schedule(lr=1.0, warmup=4, final_lr=0.1)
    assert [schedule.rate(i, 104) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule.rate(54, 104) == pytest.approx(0.55)
    assert schedule.rate(104, 104) == pytest.approx(0.1)
    assert Schedule(warmup=0.1).warmup_steps(200) == 20
    model = nn.Linear(8, 3, bias=False)
    constant = lambda model, batch: model.weight.sum()  # noqa: E731
    before = model.weight.detach().clone()
    plain = Schedule(2, 0.1, warmup=0.5, optimizer=Sgd(0.0, 0.0))
    finetune(model, lambda _: batches(0), plain, loss=constant)
    total = sum(plain.rate(i, 20) for i in range(20))
    torch.testing.assert_close(before - model.weight, torch.full((3, 8), total))


def test_weights_decay_but_not_the_vectors_unless_asked():
    still = lambda model, batch: sum(p.sum() * 0 for p in model.parameters())  # noqa: E731
    for optimizer in (Sgd(0.0, 0.5, decay_vectors=False), AdamW(weight_decay=0.5)):
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        nn.init.ones_(model[0].bias)
        finetune(model, batches, Schedule(1, 0.1, optimizer=optimizer), loss=still)
        assert torch.equal(model[0].bias, torch.ones(8))
        assert torch.equal(model[1].weight, torch.ones(8))
        vectors = dataclasses.replace(optimizer, decay_vectors=True)
        before = model[0].weight.detach().clone()
        finetune(model, batches, Schedule(1, 0.1, optimizer=vectors), loss=still)
        assert model[0].weight.norm() < 0.9 * before.norm()
        assert (model[0].bias < 0.9).all()
        assert (model[1].weight < 0.9).all()


def test_clipped_gradients_have_the_norm():
    model = nn.Linear(8, 3, bias=False)
    before = model.weight.detach().clone()
    options = Schedule(1, 1.0, optimizer=Sgd(0.0, 0.0), clip_norm=0.01)
    finetune(model, lambda _: batches(0)[:1], options)
    assert float((model.weight.detach() - before).norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_loss_of_the_users_on_mappings():
    target = nn.Linear(8, 3)
    model = nn.Linear(8, 3)
    told = [{"input": x} for x, _ in batches(0)]
    loss = lambda model, batch: (model(**batch) - target(**batch).detach()).square().mean()  # noqa: E731
    history = finetune(model, lambda _: told, Schedule(8, 0.5), loss=loss)
    assert history[-1].loss < 0.05 * history[0].loss
    assert math.isnan(history[-1].accuracy)
    with pytest.raises(InputError, match=r"needs \(x, labels\) batches\n  got a dict"):
        finetune(model, lambda _: told, Schedule(1))
    with pytest.raises(InputError, match="label_smoothing belongs to the default loss"):
        finetune(model, lambda _: told, Schedule(1, label_smoothing=0.1), loss=loss)


def test_schedules_that_cannot_be_followed():
    with pytest.raises(InputError) as caught:
        Schedule(epochs=-1, lr=math.nan, warmup=1.5, ema=1.0)
    assert caught.value.reasons == (
        "epochs: expected 0 or more; got -1",
        "lr: expected a finite rate above 0; got nan",
        "warmup: expected steps, 0 or more, or a share below 1.0; got 1.5",
        "final_lr: expected 0 to lr, which is nan; got 0.0",
        "ema: expected 0 to 1, 1 excluded; got 1.0",
    )


def test_another_optimizer_in_the_checkpoint_is_named(tmp_path):
    model = network()
    finetune(model, batches, Schedule(1), checkpoint=tmp_path / "run.pt")
    other = Schedule(1, optimizer=Sgd(momentum=0.5))
    with pytest.raises(InputError, match=r"optimizer\.momentum: 0\.9 there, 0\.5 here"):
        finetune(model, batches, other, checkpoint=tmp_path / "run.pt")


def test_an_epoch_longer_than_it_says_is_refused():
    class Longer(list):
        def __len__(self):
            return 3

    with pytest.raises(InputError, match="epoch 0 has more batches than its length said"):
        finetune(network(), lambda epoch: Longer(batches(epoch)), SCHEDULE)


def test_progress_is_rare_and_the_last_batch_is_always_told(monkeypatch):
    monkeypatch.setattr(recover, "PROGRESS_EVERY_S", 3600.0)
    seen = []
    finetune(network(), batches, dataclasses.replace(SCHEDULE, epochs=2), progress=seen.append)
    assert [(at.epoch, at.batch) for at in seen] == [(0, 10), (1, 10)]


def test_a_compiled_model_trains_and_its_checkpoint_fits_the_plain_one(tmp_path):
    model, sparsifier = pruned()
    compiled = torch.compile(model, backend="eager")
    finetune(compiled, batches, SCHEDULE, method=sparsifier, checkpoint=tmp_path / "run.pt")
    plain, _ = pruned()
    load_checkpoint(tmp_path / "run.pt", plain)
    assert torch.equal(plain[0].weight, model[0].weight)


def test_each_epoch_and_each_seed_has_randomness_of_its_own():
    drawn = []

    def loss(model, batch):
        drawn.append(float(torch.rand(())))
        return model(batch[0]).sum() * 0

    for seed in (0, 0, 1):
        finetune(network(), lambda _: batches(0)[:1], Schedule(3, 0.1, seed=seed), loss=loss)
    assert drawn[:3] == drawn[3:6]
    assert len({*drawn[:3], *drawn[6:]}) == 6


def test_label_smoothing_is_that_of_torch():
    model = nn.Linear(8, 3)
    x, labels = batches(0)[0]
    expected = functional.cross_entropy(model(x), labels, label_smoothing=0.3).item()
    options = Schedule(1, 0.1, label_smoothing=0.3)
    history = finetune(model, lambda _: [(x, labels)], options)
    assert history[0].loss == pytest.approx(expected)
    assert expected != pytest.approx(functional.cross_entropy(model(x), labels).item())


class Short(list):
    def __len__(self):
        return 11


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (lambda epoch: [], "expected a sized iterable of one or more; got a list of none"),
        (lambda epoch: iter(batches(epoch)), "got a list_iterator without a length"),
        (lambda epoch: Short(batches(epoch)), "fewer batches than its length said\n.*11, got 10"),
    ],
)
def test_epochs_that_cannot_be_counted(told, message):
    with pytest.raises(InputError, match=message):
        finetune(network(), told, SCHEDULE)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: 1.0, "got float"),
        (lambda model, batch: model(batch[0]), r"got shape \[32, 3\]"),
        (lambda model, batch: torch.ones(()), r"got shape \[\], without a gradient"),
    ],
)
def test_losses_that_cannot_be_trained_with(loss, message):
    with pytest.raises(InputError, match=message):
        finetune(network(), batches, SCHEDULE, loss=loss)


def test_a_warm_up_longer_than_the_training_is_refused():
    with pytest.raises(InputError, match="31 steps is longer than the training, which has 30"):
        finetune(network(), batches, dataclasses.replace(SCHEDULE, warmup=31))
    assert Schedule(warmup=np.int64(3)).warmup_steps(30) == 3


def test_numbers_of_numpy_in_a_schedule_resume(tmp_path):
    schedule = Schedule(epochs=2, lr=np.float64(0.1), warmup=np.int64(2))
    model, sparsifier = pruned()
    history = finetune(model, batches, schedule, method=sparsifier, checkpoint=tmp_path / "run.pt")
    again, sparsifier = pruned()
    resumed = finetune(again, batches, schedule, method=sparsifier, checkpoint=tmp_path / "run.pt")
    assert resumed == history


def test_evaluating_keeps_the_mode_of_each_module():
    model = nn.Sequential(network(), nn.BatchNorm1d(3)).train()
    model[1].eval()
    x, y = batches(0)[0]
    evaluate(model, x, y)
    assert (model.training, model[1].training) == (True, False)
    with pytest.raises(RuntimeError):
        predict(model, x[:, :3])
    assert (model.training, model[1].training) == (True, False)


def test_a_checkpoint_for_a_model_without_masks_is_not_to_be_deleted(tmp_path):
    model, sparsifier = pruned()
    finetune(model, batches, SCHEDULE, method=sparsifier, checkpoint=tmp_path / "run.pt")
    with pytest.raises(InputError, match=r"fix: build the model of that run, and make masks"):
        load_checkpoint(tmp_path / "run.pt", network())


def test_a_refused_checkpoint_leaves_the_model_as_it_was(tmp_path):
    path = tmp_path / "run.pt"
    finetune(network(), batches, SCHEDULE, checkpoint=path)
    other = network()
    other[3] = nn.Linear(32, 5)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    for load in (
        lambda: finetune(other, batches, SCHEDULE, checkpoint=path),
        lambda: load_checkpoint(path, other),
    ):
        with pytest.raises(InputError, match=r"3.bias: \[3\] there, \[5\] here"):
            load()
        assert all(torch.equal(before[n], value) for n, value in other.state_dict().items())


def test_a_last_step_that_breaks_the_weights_is_noticed_and_not_saved(tmp_path):
    def loss(model, batch):
        output = model(batch[0])
        if batch[0] is told[-1][0]:
            output.register_hook(lambda gradient: gradient * math.nan)
        return output.square().mean()

    told = batches(0)
    with pytest.raises(InputError, match=r"epoch 0 ended with weights that are not finite\n  0\.w"):
        finetune(network(), lambda e: told, SCHEDULE, loss=loss, checkpoint=tmp_path / "run.pt")
    assert not (tmp_path / "run.pt").exists()


def test_no_advice_to_delete_a_folder(tmp_path):
    for path in (tmp_path, tmp_path / "absent.pt"):
        with pytest.raises(InputError, match="fix: name the file"):
            load_checkpoint(path, network())


def test_a_loader_itself_is_no_function_of_the_epoch():
    with pytest.raises(InputError, match="each epoch\n  fix: lambda epoch: loader"):
        finetune(network(), batches(0), SCHEDULE)
