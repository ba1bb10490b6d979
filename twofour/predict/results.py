"""The results of a forecast, as plain data."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from glob import escape
from typing import Any

from twofour.compiler.forms import Form
from twofour.core.version import __version__
from twofour.predict.layers import LayerTimes
from twofour.predict.verdicts import Verdict


@dataclass(frozen=True)
class Run:
    """One run of the whole model in one form.

    Attributes:
        name: the form in words.
        precision: "f32", "bf16" or "int8".
        pattern: "", "2:4" or "2:4/pair".
        everywhere: whether all layers that can be are pruned, not only those where it pays.
        time_us: of one run.
        measured: of an engine that ran; else the layers' times added to one that did.
        vs_f32: times as fast as dense float32; None if that was not forecast.
        vs_int8: times as fast as dense INT8; None if that was not forecast.
        dense: layers whose sparse kernel is slower, so that the engine takes a dense one; where
            not everything is pruned, all layers left dense that could be pruned.
    """

    name: str
    precision: str
    pattern: str
    everywhere: bool
    time_us: float
    measured: bool
    vs_f32: float | None
    vs_int8: float | None
    dense: tuple[str, ...] = ()


@dataclass(frozen=True)
class Forecast:
    """What was found.

    Attributes:
        model: its file's name.
        target: what kernels were made for.
        cpu: that they were timed on.
        threads: they were timed with.
        inputs: name -> shape.
        notes: what the user should know about the model.
        layers: every layer with a weight, in order.
        runs: of the whole model.
        judged: the form that verdicts are about, the fastest one; None without a pattern.
        verdicts: for each of `layers`; empty without `judged`.
        skip: names for `twofour prune --skip`: layers that could be pruned but should not.
        version: of twofour.
    """

    model: str
    target: str
    cpu: str
    threads: int
    inputs: dict[str, tuple[int, ...]]
    notes: tuple[str, ...]
    layers: tuple[LayerTimes, ...]
    runs: tuple[Run, ...]
    judged: Form | None
    verdicts: tuple[Verdict, ...]
    skip: tuple[str, ...]
    version: str = __version__

    @property
    def worth(self) -> tuple[str, ...]:
        """Names of the layers worth pruning."""
        return tuple(verdict.layer for verdict in self.verdicts if verdict.pays)

    def commands(self) -> tuple[str, ...]:
        """How to go on; nothing where pruning does not pay."""
        if self.judged is None or not self.worth:
            return ()
        skips = "".join(f" --skip {shlex.quote(escape(name))}" for name in self.skip)
        pattern = self.judged.pattern
        return (
            f"twofour prune {shlex.quote(self.model)} -o sparse.onnx --pattern {pattern}{skips}",
            f"Sparsifier(model, pattern={pattern!r}, exclude={[escape(n) for n in self.skip]!r})",
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data: dicts, lists, strings, numbers."""
        plain = asdict(self)
        verdicts = plain.pop("verdicts") or [None] * len(self.layers)
        for layer, verdict in zip(plain["layers"], verdicts, strict=True):
            del layer["work"]
            layer["verdict"] = verdict
        return {**plain, "worth": list(self.worth), "commands": list(self.commands())}
