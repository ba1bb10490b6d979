"""The interval of a drop holds the truth as often as it says: networks whose drop is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from twofour.core.data import Batch
from twofour.core.errors import GateError, InputError
from twofour.evaluate.drop import drop_of
from twofour.evaluate.metric import Array, Kept, Metric, Scorer
from twofour.evaluate.metrics import METRICS, find_metric

RUNS = 100
# Of 100 runs each with a chance of 5 % more than 13 go wrong once in a thousand times.
MOST_WRONG = 13


def kept(metric: Metric, rows: dict[str, Array], labels: Array, digest: str = "") -> Kept:
    return Kept(rows, labels, float(metric.score(rows, labels)), digest)


def top1_pair(random: np.random.Generator, samples: int, lost: float, gained: float) -> list[Kept]:
    """Of each sample the candidate loses or gains it with these chances; drop = lost - gained."""
    draw = random.random(samples)
    before = random.random(samples) < 0.8
    before[draw < lost] = True
    before[(draw >= lost) & (draw < lost + gained)] = False
    after = np.where(draw < lost + gained, ~before, before)
    labels = np.zeros(samples, np.int64)
    return [kept(METRICS["top1"], {"right": each}, labels) for each in (before, after)]


def loss_pair(random: np.random.Generator, samples: int, drop: float) -> list[Kept]:
    """Losses, skewed as they are; on average the candidate's are larger by `drop`."""
    before = random.exponential(0.5, samples)
    after = before + random.exponential(0.2, samples) - 0.2 + drop
    labels = np.zeros(samples, np.int64)
    return [kept(METRICS["loss"], {"error": each}, labels) for each in (before, after)]


def wrong(
    pairs: Callable[[np.random.Generator], list[Kept]], metric: str, truth: float, runs: int = RUNS
) -> list[int]:
    """How often the truth lies below and above the interval."""
    random = np.random.default_rng(1)
    found = [drop_of(METRICS[metric], *pairs(random), 0.95) for _ in range(runs)]
    assert all(each.low <= each.value <= each.high for each in found)
    return [sum(truth < each.low for each in found), sum(truth > each.high for each in found)]


@pytest.mark.parametrize(
    ("samples", "lost", "gained"),
    [
        (1000, 0.03, 0.015),
        (1000, 0.015, 0.0),
        (500, 0.10, 0.085),
        (200, 0.0, 0.0),
        (100, 0.02, 0.005),
        (50, 0.03, 0.03),
        (40, 0.0, 0.02),
    ],
)
def test_top1_is_wrong_as_seldom_as_it_says(samples: int, lost: float, gained: float) -> None:
    def pair(random: np.random.Generator) -> list[Kept]:
        return top1_pair(random, samples, lost, gained)

    assert max(wrong(pair, "top1", 100 * (lost - gained))) <= MOST_WRONG


@pytest.mark.parametrize("samples", [40, 400])
def test_a_loss_is_wrong_as_seldom_as_it_says(samples: int) -> None:
    below, above = wrong(lambda random: loss_pair(random, samples, 0.1), "loss", 0.1)
    assert below <= MOST_WRONG
    # The mean of a few skewed values lies low more often than Student's t knows.
    assert above <= (2 if samples < 100 else 1) * MOST_WRONG


def test_f1_and_correlations_are_wrong_as_seldom_as_they_say() -> None:
    """Their truth is that of very many samples."""

    def f1(random: np.random.Generator, samples: int = 200) -> list[Kept]:
        labels = (random.random(samples) < 0.3).astype(np.int64)
        both = [np.where(random.random(samples) < p, 1 - labels, labels) for p in (0.05, 0.08)]
        two = np.full(samples, 2)
        return [kept(METRICS["f1"], {"class": each, "classes": two}, labels) for each in both]

    def pearson(random: np.random.Generator, samples: int = 200) -> list[Kept]:
        labels = random.normal(size=samples)
        both = [labels + random.normal(0, noise, samples) for noise in (0.5, 0.6)]
        return [kept(METRICS["pearson"], {"score": each}, labels) for each in both]

    for name, pair in (("f1", f1), ("pearson", pearson)):
        many = pair(np.random.default_rng(0), 400_000)
        truth = -METRICS[name].gain(many[0].figure, many[1].figure)
        assert max(wrong(pair, name, truth, RUNS // 2)) <= 8, name


def test_a_bare_bootstrap_would_be_wrong_here() -> None:
    """On 40 samples most candidates that lose 2 % of them lose none."""
    random = np.random.default_rng(1)
    bare = sum(
        np.quantile(-METRICS["top1"].drawn_gains(*top1_pair(random, 40, 0.02, 0.0), 200), 0.95) < 2
        for _ in range(RUNS)
    )
    assert bare > 2 * MOST_WRONG


def test_more_samples_tell_more() -> None:
    random = np.random.default_rng(0)
    found = [
        drop_of(METRICS["top1"], *top1_pair(random, samples, 0.03, 0.02), 0.95)
        for samples in (100, 1000, 10_000)
    ]
    widths = [each.high - each.low for each in found]
    assert widths[0] > 2 * widths[1] > 4 * widths[2] > 0


def test_more_confidence_reaches_further_and_beyond_the_draws() -> None:
    pair = top1_pair(np.random.default_rng(0), 1000, 0.03, 0.02)
    highs = [drop_of(METRICS["top1"], *pair, c).high for c in (0.5, 0.9, 0.99, 0.999, 0.99999)]
    assert highs == sorted(highs)
    assert len(set(highs)) == len(highs)


@pytest.mark.parametrize("name", ["top1", "f1"])
def test_agreeing_on_the_samples_is_not_being_the_same(name: str) -> None:
    """100 samples without a difference leave room for a drop of about 2.3 of 100."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 100)
    rows = {"right": random.random(100) < 0.9}
    if name == "f1":
        rows = {"class": labels.copy(), "classes": np.full(100, 2)}
    one = kept(METRICS[name], rows, labels)
    found = drop_of(METRICS[name], one, one, 0.95)
    assert found.value == 0
    assert found.low < -1
    assert 1 < found.high < 5


def outputs_of(y: Array, labels: Array, batch: int) -> Kept:
    scorer = Scorer(METRICS["top1"], "y")
    for start in range(0, len(y), batch):
        part = slice(start, start + batch)
        scorer.add({"y": y[part]}, Batch({"x": y[part]}, labels[part], start))
    return scorer.result()


def test_the_same_outputs_are_no_drop_at_all() -> None:
    """In other batches, too; and one bit of one output is enough to be another network."""
    random = np.random.default_rng(0)
    y, labels = random.normal(size=(10, 3)).astype(np.float32), random.integers(0, 3, 10)
    one, same = outputs_of(y, labels, 3), outputs_of(y, labels, 4)
    found = drop_of(METRICS["top1"], one, same, 0.95)
    assert (found.value, found.low, found.high) == (0, 0, 0)
    other = y.copy()
    other[9, 2] = np.nextafter(other[9, 2], np.float32(9))
    assert outputs_of(other, labels, 3).outputs_sha256 != one.outputs_sha256


def test_networks_that_put_out_classes_are_not_known_to_be_the_same() -> None:
    labels = np.zeros(4, np.int64)
    scores = np.eye(4, 2, dtype=np.int64)
    assert outputs_of(scores, labels, 2).outputs_sha256 == ""


def test_errors_that_are_the_same_are_no_drop_either() -> None:
    rows = {"error": np.random.default_rng(0).random(50)}
    one = kept(METRICS["mse"], rows, np.zeros(50))
    found = drop_of(METRICS["mse"], one, one, 0.95)
    assert (found.low, found.high) == (0, 0)


def test_few_samples_tell_nothing() -> None:
    found = drop_of(METRICS["top1"], *top1_pair(np.random.default_rng(0), 29, 0.1, 0.0), 0.95)
    assert (found.low, found.high) == (-np.inf, np.inf)


def test_pixels_of_an_image_are_no_samples() -> None:
    """What is drawn is images: an interval over pixels would be narrower than the truth."""
    random = np.random.default_rng(0)
    good = random.random((60, 1)) < 0.9
    before = np.repeat(good, 400, axis=1)
    after = np.repeat(good & (random.random((60, 1)) < 0.9), 400, axis=1)
    labels = np.zeros((60, 400), np.int64)
    pair = [kept(METRICS["top1"], {"right": each}, labels) for each in (before, after)]
    found = drop_of(METRICS["top1"], *pair, 0.95)
    assert found.high - found.low > 8


def test_ones_own_function_has_no_interval(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_gate_metric.py").write_text(
        "def f(outputs, labels):\n    return float(outputs['y'].mean())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    metric = find_metric("own_gate_metric:f")
    pair = [kept(metric, {"output y": np.full(100, value)}, np.zeros(100)) for value in (1.0, 0.75)]
    found = drop_of(metric, *pair, 0.95)
    assert (found.value, found.low, found.high) == (0.25, None, None)


def test_a_metric_without_value_on_many_draws_has_no_ends() -> None:
    """The correlation with labels of which only one differs from the others."""
    random = np.random.default_rng(0)
    labels = np.zeros(60)
    labels[0] = 1.0
    score = np.random.default_rng(0).normal(size=60) + labels

    def strict(rows, labels):  # not a number where the labels are all the same
        return float("nan") if np.ptp(labels) == 0 else float(np.corrcoef(rows["s"], labels)[0, 1])

    metric = Metric("strict", lambda *_: {}, strict)
    pair = [kept(metric, {"s": score + random.normal(0, n, 60)}, labels) for n in (0.1, 0.2)]
    found = drop_of(metric, *pair, 0.95)
    assert (found.low, found.high) == (-np.inf, np.inf)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(np.zeros(50), r"got labels \[60\] and \[50\]"), (np.ones(60), "got other labels")],
)
def test_other_samples_are_refused(labels: Array, message: str) -> None:
    one = Kept({"right": np.ones(60, bool)}, np.zeros(60), 100.0)
    other = Kept({"right": np.ones(len(labels), bool)}, labels, 100.0)
    with pytest.raises(InputError, match=message):
        drop_of(METRICS["top1"], one, other, 0.95)


def test_what_is_no_number_is_not_compared() -> None:
    fine, bad = (Kept({"error": np.ones(60)}, np.zeros(60), f) for f in (1.0, float("nan")))
    with pytest.raises(GateError, match="the candidate's loss is no number"):
        drop_of(METRICS["loss"], fine, bad, 0.95)
    with pytest.raises(InputError, match="the baseline's loss is no number"):
        drop_of(METRICS["loss"], bad, fine, 0.95)
