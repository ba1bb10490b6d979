"""Where an engine loses time: each layer beside what its work takes at this machine's rates.

The ideal time of a layer is that of its multiply-adds at the peak of its kind of kernel; one
without multiply-adds is bound by the bytes it moves, copied within the second-level cache. The gap
is what it took beyond. What is known of it follows from what the kernel does (`Work` in the plan)
at measured rates: each is an estimate of its own, and two may overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from twofour.compiler.explain import FALLBACK, layers_of
from twofour.compiler.peak import family
from twofour.compiler.rates import Rates
from twofour.compiler.result_loop import Results
from twofour.engine import Layer, Plan

_NOTABLE = 0.02
"""Of a layer's time: a loss below it is not worth a line."""
_FEW_POSITIONS = 16
"""Below so many, fetching and unpacking a step's weights takes more than a twentieth of it."""


@dataclass(frozen=True)
class Loss:
    """Something that takes time beyond the ideal.

    Attributes:
        kind: "results", "weights", "zeros", "lanes", "positions", "softmax", "bytes", "fallback".
        what: in words.
        time_us: that it takes by itself; None where only the fact is known.
    """

    kind: str
    what: str
    time_us: float | None

    @property
    def text(self) -> str:
        """In words, with its time."""
        return self.what if self.time_us is None else f"{self.what}: {self.time_us:.1f} us"


@dataclass(frozen=True)
class Gap:
    """One layer against the roofline.

    Attributes:
        name: of the layer.
        bound: what the ideal time is that of, "products" or "bytes"; "" where it is not known.
        time_us: as measured at build; None where it was not.
        ideal_us: at the measured rates; None where nothing is known of the layer's work.
        gap_us: what the layer took beyond; all of its time where the ideal is not known.
        share: of the gaps of all layers, 0 to 1.
        losses: what is known of the gap, the largest first.
    """

    name: str
    bound: str
    time_us: float | None
    ideal_us: float | None
    gap_us: float
    share: float
    losses: tuple[Loss, ...]


def gaps(plan: Plan, rates: Rates, profile: int = 1) -> tuple[Gap, ...]:
    """Every layer of a profile against the roofline, in the order they run in.

    Args:
        plan: of an engine.
        rates: of the machine that it was built on.
        profile: its number, from 1.

    Raises:
        InputError: there is no such profile.
    """
    layers = layers_of(plan, profile)
    ideals = [_ideal_us(layer, rates, _threads(layer, plan)) for layer in layers]
    lost = [
        0.0 if layer.time_us is None else layer.time_us - (ideal or 0.0)
        for layer, ideal in zip(layers, ideals, strict=True)
    ]
    whole = sum(max(gap, 0.0) for gap in lost)
    return tuple(
        Gap(
            layer.name,
            "" if ideal is None else "products" if layer.macs else "bytes",
            layer.time_us,
            ideal,
            gap,
            max(gap, 0.0) / whole if whole else 0.0,
            _losses(layer, rates, _threads(layer, plan), gap),
        )
        for layer, ideal, gap in zip(layers, ideals, lost, strict=True)
    )


def _threads(layer: Layer, plan: Plan) -> int:
    """How many the layer's time was measured with: only what was chosen by time has them all."""
    return plan.threads if any(c.time_us is not None for c in layer.candidates) else 1


def _ideal_us(layer: Layer, rates: Rates, threads: int) -> float | None:
    if layer.tactic == FALLBACK:
        return None
    if layer.macs:
        return 1e-3 * layer.macs / rates.peaks.gmacs[family(layer)] / threads
    return 1e-3 * layer.work.moved_bytes / rates.copy_gbps


def _losses(layer: Layer, rates: Rates, threads: int, gap_us: float) -> tuple[Loss, ...]:
    """What is known of a layer's gap."""
    if layer.time_us is None:
        return ()
    if layer.tactic == FALLBACK:
        return (Loss("fallback", "runs on ONNX Runtime: what it has to do is not known", None),)
    if not layer.macs:
        return _slow_bytes(layer, rates)
    least = _NOTABLE * layer.time_us
    found = [*_padding(layer, rates), *_around(layer, rates, gap_us)]
    shared = [
        loss if loss.time_us is None else replace(loss, time_us=loss.time_us / threads)
        for loss in found
    ]
    notable = [loss for loss in shared if loss.time_us is None or loss.time_us >= least]
    return tuple(sorted(notable, key=lambda loss: -(loss.time_us or 0.0)))


def _slow_bytes(layer: Layer, rates: Rates) -> tuple[Loss, ...]:
    if not layer.time_us:
        return ()
    moved = layer.work.moved_bytes
    gbps = 1e-3 * moved / layer.time_us
    what = f"moves {moved / 1e3:.4g} kB at {gbps:.3g} GB/s, a copy {rates.copy_gbps:.3g}"
    return (Loss("bytes", what, None),)


def _padding(layer: Layer, rates: Rates) -> Iterator[Loss]:
    """Products that are computed and not needed."""
    work = layer.work
    ideal_us = 1e-3 * layer.macs / rates.peaks.gmacs[family(layer)]
    if work.k_computed > work.k > 0:
        what = f"K = {work.k} is computed as {work.k_computed}, the rest zeros"
        yield Loss("zeros", what, ideal_us * (work.k_computed / work.k - 1))
    if work.lanes > work.channels > 0:
        what = f"{work.channels} channels in {work.lanes} lanes"
        yield Loss("lanes", what, ideal_us * (work.lanes / work.channels - 1))


def _around(layer: Layer, rates: Rates, gap_us: float) -> Iterator[Loss]:
    """What a kernel does beside its products."""
    work = layer.work
    results = Results.of(layer)
    if results is not None:
        took_us = 1e-3 * work.vectors * rates.result_ns[results]
        what = f"after sums of K = {work.k}: {_result_words(results)}"
        yield Loss("results", what, took_us)
    if layer.weight_bytes:
        what = f"{layer.weight_bytes / 1e3:.4g} kB of weights at {rates.read_gbps:.3g} GB/s"
        yield Loss("weights", what, 1e-3 * layer.weight_bytes / rates.read_gbps)
    if 0 < work.positions < _FEW_POSITIONS:
        many = "s" if work.positions > 1 else ""
        what = f"weights are loaded for {work.positions:.3g} position{many} at a time"
        yield Loss("positions", what, None)
    if work.scores:
        each_ns = 16e3 * gap_us / work.scores
        what = f"softmax of {work.scores} scores: the gap is {each_ns:.2g} ns for 16 of them"
        yield Loss("softmax", what, None)


def _result_words(results: Results) -> str:
    """What is done with sums, in words."""
    parts = ["scale" if results.dtype == "int8" else "bias"]
    more = [f"{results.add} residual"] if results.add else []
    more += [results.activation] if results.activation else []
    parts += more[::-1] if results.add_last else more
    return ", ".join([*parts, f"to {results.out}"])
