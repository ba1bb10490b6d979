"""Fine-tuning learns, resumes without a difference, and refuses foreign files."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from twofour.core.errors import GateError, InputError
from twofour.train import Schedule, Sparsifier, evaluate, finetune, load_checkpoint, predict

SCHEDULE = Schedule(epochs=3, lr=0.1)


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
    history = finetune(model, batches, SCHEDULE, sparsifier=sparsifier)
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
    history = finetune(
        model, batches, dataclasses.replace(SCHEDULE, bf16=True), sparsifier=sparsifier
    )
    assert math.isfinite(history[-1].loss)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Stop(Exception):
    """Stands for a power cut."""


def test_stopped_in_an_epoch_and_resumed_equals_uninterrupted(tmp_path):
    straight, sparsifier = pruned()
    expected = finetune(straight, batches, SCHEDULE, sparsifier=sparsifier)

    def stop(at):
        if (at.epoch, at.batch) == (1, 4):
            raise Stop

    checkpoint = tmp_path / "new" / "run.pt"
    model, sparsifier = pruned()
    with pytest.raises(Stop):
        finetune(
            model, batches, SCHEDULE, sparsifier=sparsifier, checkpoint=checkpoint, progress=stop
        )
    model, sparsifier = pruned()
    torch.manual_seed(77)  # another process would have other randomness
    epochs = []
    history = finetune(
        model,
        batches,
        SCHEDULE,
        sparsifier=sparsifier,
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
    finetune(model, batches, SCHEDULE, sparsifier=sparsifier, checkpoint=tmp_path / "run.pt")
    seen = []
    finetune(
        model,
        batches,
        SCHEDULE,
        sparsifier=sparsifier,
        checkpoint=tmp_path / "run.pt",
        progress=seen.append,
    )
    assert seen == []


def test_foreign_checkpoints_are_refused(tmp_path):
    model, sparsifier = pruned()
    checkpoint = tmp_path / "run.pt"
    finetune(model, batches, SCHEDULE, sparsifier=sparsifier, checkpoint=checkpoint)
    with pytest.raises(InputError, match=r"another schedule\n  lr: 0.1 there, 0.2 here"):
        finetune(
            model,
            batches,
            dataclasses.replace(SCHEDULE, lr=0.2),
            sparsifier=sparsifier,
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
        sparsifier=sparsifier,
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
        finetune(model, batches, SCHEDULE, sparsifier=sparsifier, progress=spoil)


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


def test_a_teacher_is_copied_and_stays_as_it_is() -> None:
    """Wrong labels do little harm to a model that listens to its teacher alone."""
    teacher, _ = pruned()
    finetune(teacher, batches, SCHEDULE)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    wrong = [(x, (labels + 1) % 3) for x, labels in batches(0)]
    schedule = dataclasses.replace(SCHEDULE, teacher_share=1.0, temperature=2.0)

    def distance(guide) -> float:
        model, sparsifier = pruned()
        finetune(model, lambda _: wrong, schedule, sparsifier=sparsifier, teacher=guide)
        return sum(float((predict(model, x) - predict(teacher, x)).norm()) for x, _ in wrong)

    assert distance(teacher) < 0.5 * distance(None)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
