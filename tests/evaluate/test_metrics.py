"""Each metric against its definition, written another way; and the user's own functions."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from twofour.core.data import Batch
from twofour.core.errors import InputError
from twofour.evaluate.metric import Kept, Metric, Scorer
from twofour.evaluate.metrics import METRICS, find_metric

RNG = np.random.default_rng(0)


def score(metric: Metric | str, y: np.ndarray, labels: np.ndarray, batch: int = 3) -> float:
    metric = METRICS[metric] if isinstance(metric, str) else metric
    scorer = Scorer(metric, "y")
    for start in range(0, len(y), batch):
        part = slice(start, start + batch)
        scorer.add({"y": y[part]}, Batch({"x": y[part]}, labels[part], start))
    return scorer.result().figure


def test_top_k() -> None:
    y = RNG.standard_normal((40, 12)).astype(np.float32)
    labels = RNG.integers(0, 12, 40)
    order = np.argsort(-y, axis=1)
    assert score("top1", y, labels) == pytest.approx(100 * np.mean(order[:, 0] == labels))
    right = (order[:, :5] == labels[:, None]).any(1)
    assert score("top5", y, labels) == pytest.approx(100 * right.mean())


def test_ties_and_nan_are_not_free_hits() -> None:
    """A network that gives the same score to every class is right for class 0 only."""
    y = np.zeros((4, 4), np.float32)
    assert score("top1", y, np.array([0, 1, 2, 3])) == 25.0
    y[0] = np.nan
    assert score("top1", y, np.array([0, 1, 2, 3])) == 0.0


def test_top1_counts_pixels() -> None:
    y = RNG.standard_normal((5, 3, 4, 4)).astype(np.float32)
    labels = RNG.integers(0, 3, (5, 4, 4))
    assert score("top1", y, labels) == pytest.approx(100 * (y.argmax(1) == labels).mean())


def test_f1_is_binary_for_two_classes_and_macro_for_more() -> None:
    found, labels = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    # 2 true positives, 1 false positive, 1 false negative.
    assert score("f1", np.eye(2)[found], labels) == pytest.approx(100 * 2 * 2 / (2 * 2 + 1 + 1))
    found, labels = np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])
    # f1 of the classes: 1, 2/3, 2/3; class 3 never occurs.
    assert score("f1", np.eye(4)[found], labels) == pytest.approx(100 * (1 + 4 / 3) / 3)


def test_correlations() -> None:
    x = np.array([1.0, 2.0, 2.0, 4.0, 5.0, 0.0])[:, None]
    labels = np.array([1.0, 3.0, 2.0, 8.0, 9.0, 1.0])
    assert score("pearson", x, labels) == pytest.approx(np.corrcoef(x[:, 0], labels)[0, 1])
    # ranks by hand: 2 3.5 3.5 5 6 1 and 1.5 4 3 5 6 1.5
    a, b = [2, 3.5, 3.5, 5, 6, 1], [1.5, 4, 3, 5, 6, 1.5]
    assert score("spearman", x, labels) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert score("spearman", np.exp(x), labels) == score("spearman", x, labels)


def test_the_error_of_a_gain_is_that_of_paired_samples() -> None:
    """Of 400 samples 30 become right and 10 wrong: variance (30 + 10) / n^2, less the mean's."""
    before = np.repeat([True, False, True, False], [300, 30, 10, 60])
    after = np.repeat([True, True, False, False], [300, 30, 10, 60])
    labels = np.zeros(400, np.int64)
    kept = [Kept({"right": right}, labels, 100 * right.mean()) for right in (before, after)]
    expected = 100 * np.sqrt(40 / 400 - 0.05**2) / np.sqrt(400)
    assert METRICS["top1"].error(*kept) == pytest.approx(expected, rel=0.2)
    assert METRICS["top1"].error(kept[0], kept[0]) == 0.0


def test_errors_are_better_when_less() -> None:
    y, labels = np.array([[1.0], [2.0]]), np.array([0.0, 4.0])
    assert (score("mse", y, labels), score("mae", y, labels)) == (2.5, 1.5)
    assert METRICS["mse"].gain(2.0, 1.5) == 0.5
    assert METRICS["top1"].gain(2.0, 1.5) == -0.5


@pytest.mark.parametrize(
    ("metric", "y", "labels", "message"),
    [
        ("top1", np.zeros((3, 4)), np.zeros(3), "whole numbers as labels"),
        ("top1", np.zeros((3, 4)), np.array([0, 1, 4]), "labels are no classes"),
        ("top1", np.zeros(3), np.zeros(3, int), "expected scores"),
        ("f1", np.zeros((3, 2, 5)), np.zeros(3, int), "one label for each row"),
        ("spearman", np.zeros((3, 2)), np.zeros(3), "a label for each value"),
        ("mse", np.zeros((3, 2)), np.zeros((3, 3)), "a label for each value"),
    ],
)
def test_what_does_not_match_is_refused(
    metric: str, y: np.ndarray, labels: np.ndarray, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        score(metric, y, labels)


def test_labels_are_needed() -> None:
    with pytest.raises(InputError, match="top1 needs labels"):
        Scorer(METRICS["top1"], "y").add({"y": np.zeros((1, 2))}, Batch({}, None, 0))


OWN = """
import numpy as np
def sts(outputs, labels):
    a, b = outputs["y"][0::2], outputs["y"][1::2]
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return np.corrcoef(cosine, labels[0::2])[0, 1]
def distance(outputs, labels, inputs):
    return abs(outputs["y"] - inputs["x"]).max()
distance.lower_is_better = True
def text(outputs, labels):
    return "good"
def pairs(outputs, labels):
    first, second = outputs["y"][0::2], outputs["y"][1::2]
    assert (first == second).all(), "pairs stay together"
    return float(first.mean())
pairs.group = 2
def none(outputs, labels):
    return 0.0
none.group = "two"
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metric.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_metric", raising=False)


@pytest.mark.usefixtures("own")
def test_a_function_of_the_user() -> None:
    y, labels = RNG.standard_normal((8, 5)), np.repeat(RNG.standard_normal(4), 2)
    cosines = [
        y[i] @ y[i + 1] / np.linalg.norm(y[i]) / np.linalg.norm(y[i + 1]) for i in (0, 2, 4, 6)
    ]
    found = find_metric("own_metric:sts")
    assert score(found, y, labels) == pytest.approx(np.corrcoef(cosines, labels[::2])[0, 1])
    assert found.higher_is_better
    with_inputs = find_metric("own_metric:distance")
    assert score(with_inputs, y, labels) == 0.0
    assert not with_inputs.higher_is_better


@pytest.mark.usefixtures("own")
def test_samples_that_belong_together_are_drawn_together() -> None:
    """And their mean errs as that of half as many samples that stand for themselves."""
    found, random = find_metric("own_metric:pairs"), np.random.default_rng(4)
    values = random.standard_normal(400).astype(np.float32)
    before, after = (
        kept(found, np.repeat(values + other * random.standard_normal(400), 2), np.zeros(800))
        for other in (0, 1)
    )
    error = found.error(before, after)
    assert error == pytest.approx(1 / np.sqrt(400), rel=0.2)
    assert not find_metric("own_metric:sts").resampled
    odd = Kept({"output y": np.zeros(7)}, np.zeros(7), 0.0)
    with pytest.raises(InputError, match="groups of 2 samples"):
        found.error(odd, odd)


def kept(metric: Metric, y: np.ndarray, labels: np.ndarray) -> Kept:
    scorer = Scorer(metric, "y")
    scorer.add({"y": y}, Batch({}, labels, 0))
    return scorer.result()


@pytest.mark.usefixtures("own")
def test_a_group_is_a_number_of_samples() -> None:
    with pytest.raises(InputError, match="attribute 'group' that is none"):
        find_metric("own_metric:none")


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("accuracy", "no metric 'accuracy'"),
        ("no_such_module:f", "cannot import metric no_such_module:f"),
        ("own_metric:f", "no metric function own_metric:f"),
    ],
)
def test_unknown_metrics_are_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_metric(name)


@pytest.mark.usefixtures("own")
def test_a_function_that_returns_no_number_is_refused() -> None:
    with pytest.raises(InputError, match="returned no number"):
        score(find_metric("own_metric:text"), np.zeros((2, 1)), np.zeros(2))


def test_loss_is_the_mean_cross_entropy() -> None:
    scores = np.array([[0.0, 0.0], [1000.0, 0.0], [0.0, np.log(3)]])
    found = METRICS["loss"]
    rows = found.rows({"y": scores}, "y", Batch({}, np.array([0, 0, 1]), 0))
    np.testing.assert_allclose(rows["error"], [np.log(2), 0.0, np.log(4 / 3)], atol=1e-12)
    assert not found.higher_is_better
    with pytest.raises(InputError, match="labels are no classes"):
        found.rows({"y": scores}, "y", Batch({}, np.array([0, 2, 1]), 0))
