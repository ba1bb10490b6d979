"""Fake quantization against the numpy definitions: the same counts, scales and integers."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from torch import Tensor
from torch.ao.quantization.observer import MovingAverageMinMaxObserver

from twofour.core import numerics
from twofour.core.errors import InputError
from twofour.core.histogram import Histogram
from twofour.core.ranges import Range, RangeOptions, affine, choose_range
from twofour.core.rounding import quantize_weight
from twofour.train.fake_quant import FakeQuant, weight_scale
from twofour.train.observe import Observer

SYMMETRIC, ASYMMETRIC = RangeOptions("mse", "int8"), RangeOptions("mse", "uint8")


def _batches(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (1.0, 0.001, 7.9, 8.0, 300.0)
    made = [torch.randn(3, 5, 7, generator=generator) * size for size in sizes]
    made[1][0] = 0
    return [
        *made,
        torch.zeros(4),
        torch.empty(0, 3),
        torch.tensor([0.5, -0.25, 1e-40, -(2.0**-130)]),
    ]


def _both(batches: list[Tensor]) -> tuple[Histogram, Histogram]:
    ours, theirs = Observer(torch.device("cpu")), Histogram()
    for batch in batches:
        ours.add(batch)
        theirs.add(batch.float().numpy())
        theirs.close_batch()
    return ours.histogram(), theirs


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("turned", [False, True])
def test_counts_are_those_of_the_numpy_histogram(seed: int, turned: bool) -> None:
    batches = _batches(seed)
    ours, theirs = _both(batches[::-1] if turned else batches)
    assert_array_equal(ours.counts, theirs.counts)
    for name in ("zeros", "limit", "low", "high", "average"):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [1e-44], [3.4e38], [1.0], [-1.0, 0.5]])
def test_counts_at_the_ends_of_float32(values: list[float]) -> None:
    ours, theirs = _both([torch.tensor(values)])
    assert_array_equal(ours.counts, theirs.counts)
    assert (ours.zeros, ours.limit, ours.empty) == (theirs.zeros, theirs.limit, theirs.empty)


@pytest.mark.parametrize("method", ["mse", "minmax", "average", "percentile", "entropy"])
@pytest.mark.parametrize("activation", ["int8", "uint8"])
def test_scale_is_the_one_of_the_file_side(method: str, activation: str) -> None:
    options = RangeOptions(method, activation, 99.0)  # type: ignore[arg-type]
    quant, seen = FakeQuant(options), Histogram()
    quant.mode = "collect"
    for batch in _batches(1)[:3]:
        assert quant(batch) is batch
        seen.add(batch.numpy())
        seen.close_batch()
    quant.compute()
    scheme = affine(choose_range(seen, options), options.activation)
    assert quant.mode == "on"
    assert (float(quant.scale), int(quant.zero_point)) == (scheme.scale, scheme.zero_point)
    x = _batches(2)[0]
    expected = numerics.quantize(x.numpy(), scheme.scale, scheme.zero_point, scheme.dtype)
    assert_array_equal(quant.integers(x).numpy(), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_weight_scales_are_those_of_the_file_side(axis: int) -> None:
    w = torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    w[2], w[:, 3], w[0, 0] = 0, 1e-40, 1e-30
    w8, scale = quantize_weight(w.numpy(), axis)
    quant = FakeQuant(SYMMETRIC, axis=axis)
    quant.mode = "on"
    rounded = quant(w)
    assert_array_equal(quant.scale.numpy(), scale)
    assert_array_equal(weight_scale(w, axis).numpy(), scale)
    assert_array_equal(quant.integers(w).numpy(), w8)
    shape = [-1 if i == axis else 1 for i in range(4)]
    np.testing.assert_allclose(
        rounded.numpy(), quant.integers(w).numpy() * scale.reshape(shape), rtol=1e-6
    )
    assert (rounded[w == 0] == 0).all()
    assert quant.integers(w).min() >= -127


def test_weight_scale_follows_its_values_unless_told_not_to() -> None:
    quant, w = FakeQuant(SYMMETRIC, axis=0), torch.tensor([[1.0, -2.0], [0.5, 0.25]])
    quant.mode = "on"
    quant(w)
    quant(w * 3)
    assert_array_equal(quant.scale.numpy(), weight_scale(w * 3, 0).numpy())
    quant.follows = False
    assert quant(w * 6).abs().max() == quant(w * 3).abs().max()


def test_gradient_goes_through_where_nothing_was_clipped() -> None:
    quant = FakeQuant(SYMMETRIC)
    quant.set_range(Range(-1.27, 1.27))
    quant.mode = "on"
    x = torch.tensor([0.5, 1.2, 5.0, -5.0], requires_grad=True)
    quant(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("axis", [None, 0])
def test_learned_scale_has_the_gradient_of_lsq(axis: int | None) -> None:
    quant = FakeQuant(SYMMETRIC, axis=axis, learned=True)
    x = torch.tensor([[0.54, 1.26, 9.0, -9.0, -0.333]], requires_grad=True)
    if axis is None:
        quant.set_range(Range(-1.27, 1.27))
    else:
        quant.set_from(x / 10)
        quant.scale.data.fill_(0.01)
    quant.mode = "on"
    least, most = quant.bounds
    quant(x).sum().backward()
    steps = x.detach().double().numpy()[0] / np.float32(0.01)
    inside = (steps > least) & (steps < most)
    each = np.where(inside, np.rint(steps) - steps, np.clip(steps, least, most))
    assert quant.log_factor is not None
    assert quant.log_factor.grad is not None
    assert x.grad is not None
    wanted = each.sum() * 0.01 / (most * 0.01) ** 2
    assert quant.log_factor.grad.sum().item() == pytest.approx(wanted, rel=1e-4)
    assert x.grad[0].tolist() == inside.astype(float).tolist()


def test_learned_scale_rounds_like_a_fixed_one_and_stays_positive() -> None:
    fixed, learned = FakeQuant(ASYMMETRIC), FakeQuant(ASYMMETRIC, learned=True)
    for quant in (fixed, learned):
        quant.set_range(Range(-0.3, 2.0))
        quant.mode = "on"
    x = torch.linspace(-1, 3, 4001)
    assert torch.equal(fixed(x), learned(x))
    assert learned.log_factor is not None
    learned.log_factor.data.fill_(-1e4)
    assert learned(x).isfinite().all()
    assert learned.trained_scale() > 0


def test_learning_the_scale_lowers_the_error() -> None:
    torch.manual_seed(0)
    x = torch.randn(4096)
    quant = FakeQuant(RangeOptions("minmax"), learned=True)
    quant.set_range(Range(-40.0, 40.0))
    quant.mode = "on"
    optimizer = torch.optim.Adam(quant.parameters(), 0.02)
    errors = []
    for _ in range(150):
        loss = (quant(x) - x).square().mean()
        errors.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert errors[-1] < errors[0] / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("learned", [False, True])
def test_other_types_are_rounded_in_float32(dtype: torch.dtype, learned: bool) -> None:
    quant = FakeQuant(SYMMETRIC, learned=learned)
    quant.set_range(Range(-2.0, 2.0))
    quant.mode = "on"
    x = torch.randn(50).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = quant(x)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, quant(x.float()).to(dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    quant = FakeQuant(SYMMETRIC)
    quant.mode = "collect"
    quant(torch.tensor([1.0, bad]))
    quant(torch.ones(3))
    with pytest.raises(InputError, match="NaN or infinite"):
        quant.compute()
    with pytest.raises(InputError, match="not finite"):
        FakeQuant(SYMMETRIC, axis=0).set_from(torch.tensor([[1.0, bad]]))


def test_without_values_there_is_no_scale() -> None:
    quant = FakeQuant(SYMMETRIC)
    quant.mode = "collect"
    assert quant(torch.empty(0, 4)).shape == (0, 4)
    with pytest.raises(InputError, match="no scale yet"):
        quant.compute()
    with pytest.raises(InputError, match="unknown mode"):
        quant.mode = "maybe"  # type: ignore[assignment]


def test_zeros_alone_have_scale_one() -> None:
    quant = FakeQuant(SYMMETRIC)
    quant.mode = "collect"
    quant(torch.zeros(4))
    quant.compute()
    assert float(quant.scale) == 1
    assert quant(torch.empty(0)).shape == (0,)


@pytest.mark.parametrize("learned", [False, True])
def test_what_was_saved_is_on_where_it_is_loaded(learned: bool) -> None:
    quant, weight = FakeQuant(ASYMMETRIC, learned=learned), FakeQuant(SYMMETRIC, 1, learned)
    w = torch.randn(3, 5)
    weight.set_from(w)
    quant.set_range(Range(-1, 2))
    fresh, other = FakeQuant(ASYMMETRIC, learned=learned), FakeQuant(SYMMETRIC, 1, learned)
    fresh.load_state_dict(quant.state_dict())
    other.load_state_dict(weight.state_dict())
    assert (fresh.mode, other.mode) == ("on", "on")
    quant.mode = weight.mode = "on"
    for a, b in ((quant, fresh), (weight, other), (copy.deepcopy(weight), weight)):
        assert torch.equal(a(w), b(w))
        assert a.zero_point.dtype == (torch.uint8 if a.axis is None else torch.int8)


def test_values_between_two_steps_are_divided_as_files_divide_them() -> None:
    quant = FakeQuant(SYMMETRIC)
    quant.set_range(Range(-1.0, 1.0))
    quant.mode = "on"
    x = (torch.arange(-128, 128) + 0.5) * quant.scale
    x = torch.cat([x, x.nextafter(torch.tensor(9.0)), x.nextafter(torch.tensor(-9.0))])
    expected = numerics.quantize(x.numpy(), float(quant.scale), 0)
    inverse = torch.round(x * (1 / quant.scale)).clamp(-128, 127)
    assert (inverse.numpy() != expected).any(), "the sample can tell"
    assert_array_equal(quant.integers(x).numpy(), expected)
    assert_array_equal(quant(x).numpy(), numerics.dequantize(expected, quant.scale.numpy(), 0))


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_scales_of_another_kind_of_integers_are_refused(kind: str) -> None:
    saved = FakeQuant(RangeOptions("mse", kind))  # type: ignore[arg-type]
    saved.set_range(Range(0, 2))
    other = FakeQuant(ASYMMETRIC if kind == "int8" else SYMMETRIC)
    with pytest.raises(RuntimeError, match=rf"zero_point: expected integers of .*, got {kind}"):
        other.load_state_dict(saved.state_dict())
    assert not other.calibrated


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("log_factor", [-1e6, -80.0, 40.0])
def test_a_learned_scale_that_vanishes_gives_no_nan(log_factor: float, axis: int | None) -> None:
    quant = FakeQuant(SYMMETRIC, axis, learned=True)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 100
    if axis is None:
        quant.set_range(Range(-1, 1))
    else:
        quant.set_from(x)
    quant.mode = "on"
    assert quant.log_factor is not None
    quant.log_factor.data.fill_(log_factor)
    rounded = quant(x.requires_grad_())
    rounded.sum().backward()
    assert quant.log_factor.grad is not None
    assert x.grad is not None
    for found in (rounded, x.grad, quant.log_factor.grad):
        assert found.isfinite().all()


def test_a_channel_of_zeros_can_learn_to_be_something() -> None:
    quant, w = FakeQuant(SYMMETRIC, 0, learned=True), torch.tensor([[0.5, -1.27], [0.0, 0.0]])
    quant.set_from(w)
    assert_array_equal(quant.scale.detach().numpy(), np.full(2, 0.01, np.float32))
    quant.set_from(torch.zeros(2, 2))
    assert_array_equal(quant.scale.detach().numpy(), np.ones(2, np.float32))


@pytest.mark.parametrize(
    "quant",
    [FakeQuant(SYMMETRIC), FakeQuant(SYMMETRIC, learned=True), FakeQuant(SYMMETRIC, axis=0)],
    ids=["activation", "learned", "weight"],
)
def test_compiled_is_the_same(quant: FakeQuant) -> None:
    x = torch.randn(4, 3)
    if quant.axis is None:
        quant.set_range(Range(-1, 1))
    quant.mode = "on"
    compiled = torch.compile(quant, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), quant(x))
    compiled(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_moving_average_is_that_of_torch() -> None:
    histogram, observer = Histogram(), MovingAverageMinMaxObserver()
    for i in range(100):
        x = (1 + i % 5) * np.random.default_rng(i).standard_normal((16, 9), np.float32)
        histogram.add(x)
        histogram.close_batch()
        observer(torch.from_numpy(x))
    assert histogram.average is not None
    # torch keeps float32, which rounds 100 times
    expected = float(observer.min_val), float(observer.max_val)
    assert histogram.average == pytest.approx(expected, rel=100 * 2.0**-23)
