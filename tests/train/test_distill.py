"""A student copies its teacher at the outputs and inside, with or without labels."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from twofour.core.errors import InputError
from twofour.train import Distiller, Schedule, Sparsifier, finetune, predict


class Net(nn.Module):
    def __init__(self, width=16, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(8, width)
        self.second = nn.Linear(width, 3)

    def forward(self, x):
        return self.second(self.first(x).relu())


def data(count=32, seed=5):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=random)
    return x, x[:, :3].argmax(1)


def test_the_loss_is_that_of_the_papers():
    student, teacher = Net(seed=1), Net(seed=2)
    x, labels = data()
    got, wanted = student(x), teacher(x)
    temperature, share = 3.0, 0.7
    p = (wanted / temperature).softmax(1)
    q = (got / temperature).softmax(1)
    soft = temperature**2 * (p * (p / q).log()).sum(1).mean()
    hard = functional.cross_entropy(got, labels, label_smoothing=0.1)
    s, t = student.first(x), teacher.first(x)
    inside = ((s - t) ** 2).mean() / (t**2).mean()
    distiller = Distiller(student, teacher, temperature, share, {"first": 2.0}, label_smoothing=0.1)
    torch.testing.assert_close(distiller(x), soft + 2 * inside)
    expected = share * soft + (1 - share) * hard + 2 * inside
    torch.testing.assert_close(distiller(x, labels), expected)
    torch.testing.assert_close(distiller.loss(student(x), x, labels), expected)


@pytest.mark.parametrize("outputs", ["mse", "cosine"])
def test_other_outputs(outputs):
    student, teacher = Net(seed=1), Net(seed=2)
    x, _ = data()
    got, wanted = student(x), teacher(x)
    expected = {
        "mse": ((got - wanted) ** 2).mean(),
        "cosine": 1 - ((got * wanted).sum(1) / (got.norm(dim=1) * wanted.norm(dim=1))).mean(),
    }[outputs]
    distiller = Distiller(student, teacher, outputs=outputs)
    torch.testing.assert_close(distiller(x), expected)
    same = Distiller(copy.deepcopy(teacher), teacher, hidden={"first": 1.0}, outputs=outputs)
    assert same(x).item() == pytest.approx(0, abs=1e-6)


def test_regression_labels_count_and_cosine_has_none():
    student, teacher = Net(seed=1), Net(seed=2)
    x, labels = data()
    target = torch.randn(len(x), 3)
    got, wanted = student(x), teacher(x)
    expected = 0.9 * functional.mse_loss(got, wanted) + 0.1 * functional.mse_loss(got, target)
    torch.testing.assert_close(Distiller(student, teacher, outputs="mse")(x, target), expected)
    with pytest.raises(InputError, match="cosine compares embeddings, and has no use for labels"):
        Distiller(student, teacher, outputs="cosine")(x, labels)


def test_the_teacher_gets_no_gradient_and_stays_in_eval_mode():
    student, teacher = Net(), Net(seed=1).train()
    distiller = Distiller(student, teacher, hidden={"first": 1.0})
    assert not teacher.training
    teacher.train()
    distiller(data()[0]).backward()
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_hooks_go_when_it_closes_and_evaluating_the_student_leaves_nothing():
    student, teacher = Net(), Net(seed=1)
    x, _ = data()
    with Distiller(student, teacher, hidden={"first": 1.0}) as distiller:
        outputs = student(x)
        with torch.no_grad():
            student(x[:3])
        distiller.loss(outputs, x)
        with pytest.raises(InputError, match="hidden layer 'first' gave no output"):
            distiller.loss(outputs, x)
    assert not student.first._forward_hooks
    assert not teacher.first._forward_hooks


def test_mappings_and_a_forward_of_the_users():
    student, teacher = Net(seed=1), Net(seed=2)
    x, _ = data()
    torch.testing.assert_close(
        Distiller(student, teacher)({"x": x}), Distiller(student, teacher)(x)
    )
    distiller = Distiller(student, teacher, outputs="mse", forward=lambda model, x: model.first(x))
    expected = functional.mse_loss(student.first(x), teacher.first(x))
    torch.testing.assert_close(distiller(x), expected)


def test_wrapped_students():
    student, teacher = Net(seed=1), Net(seed=2)
    x, labels = data()
    expected = Distiller(student, teacher, hidden={"first": 1.0})(x, labels)
    for wrap in (nn.DataParallel, lambda m: torch.compile(m, backend="aot_eager")):
        wrapped = wrap(copy.deepcopy(student))
        got = Distiller(wrapped, teacher, hidden={"first": 1.0})(x, labels)
        torch.testing.assert_close(got, expected)
        got.backward()


def test_under_autocast_the_losses_are_float32():
    student, teacher = Net(seed=1), Net(seed=2)
    distiller = Distiller(student, teacher, hidden={"first": 1.0})
    with torch.autocast("cpu", torch.bfloat16):
        loss = distiller(*data())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, distiller(*data()), rtol=0.05, atol=0)


def test_refusals():
    student = Net()
    teacher = Net(seed=1)
    wrong = "share: expected 0 to 1; got 2\n  outputs: expected logits, mse or cosine; got kl"
    with pytest.raises(InputError, match=wrong):
        Distiller(student, teacher, share=2, outputs="kl")
    with pytest.raises(InputError, match=r"the student has no module 'frist'\n  fix: .*first"):
        Distiller(student, teacher, hidden={"frist": 1.0})
    with pytest.raises(InputError, match="share weights"):
        Distiller(student, student)
    x, _ = data()
    shapes = r"shape of hidden layer 'first'\n  student \[32, 16\], teacher \[32, 8\]"
    with Distiller(student, Net(8), hidden={"first": 1.0}) as distiller:
        with pytest.raises(InputError, match=shapes):
            distiller(x)
    with pytest.raises(InputError, match="the student's outputs are no tensor but list"):
        Distiller(student, teacher).loss([x], x)
    assert not student.first._forward_hooks, "a refused distiller leaves no hooks"


def test_in_the_loop_wrong_labels_do_little_harm_and_no_labels_none():
    """Wrong labels do little harm to a model that listens to its teacher alone."""
    teacher = Net(32)
    schedule = Schedule(epochs=6, lr=0.1)
    batches = [data(seed=i) for i in range(10)]
    finetune(teacher, lambda _: batches, schedule)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    wrong = [(x, (labels + 1) % 3) for x, labels in batches]

    def distance(told, **options):
        model = copy.deepcopy(teacher)
        sparsifier = Sparsifier(model).prune()
        loss = Distiller(model, teacher, **options) if options else None
        history = finetune(model, lambda _: told, schedule, method=sparsifier, loss=loss)
        assert math.isnan(history[-1].accuracy) == isinstance(told[0], torch.Tensor)
        return sum(float((predict(model, x) - predict(teacher, x)).norm()) for x, _ in wrong)

    misled = distance(wrong)
    alone = distance(wrong, share=1.0, temperature=2.0)
    unlabelled = distance([x for x, _ in wrong], temperature=2.0)
    assert alone < 0.3 * misled
    assert unlabelled == alone
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_layers_inside_an_attention_block_are_seen_in_eval_mode_too():
    def block(seed):
        torch.manual_seed(seed)
        return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    student, teacher = block(0), block(1)
    x = torch.randn(2, 5, 16)
    for name in ("linear1", "self_attn"):
        with Distiller(student, teacher, outputs="mse") as plain:
            without = plain(x)
        with Distiller(student, teacher, hidden={name: 1.0}, outputs="mse") as distiller:
            assert distiller(x) > without


def test_what_would_be_broadcast_or_say_nothing_is_refused():
    student, teacher = nn.Linear(8, 1), nn.Linear(8, 1)
    x = data()[0]
    with pytest.raises(InputError, match=r"outputs \[32, 1\], labels \[32\]"):
        Distiller(student, teacher, outputs="mse")(x, torch.randn(32))
    with pytest.raises(InputError, match="logits are of two classes or more"):
        Distiller(student, teacher)(x)
    with pytest.raises(InputError, match="label_smoothing: expected 0 where outputs are no logits"):
        Distiller(student, teacher, outputs="mse", label_smoothing=0.1)
    with pytest.raises(InputError, match="label_smoothing: expected 0 to 1"):
        Distiller(student, teacher, label_smoothing=1.5)
