"""The steps of a recipe that make an int8 model better without training.

equalize    channels between layers get equal ranges               `equalize.py`
smooth      outliers after normalizations go into the weights      `smooth.py`
round       weights in the integers that change outputs the least  `round_weights.py`
bias        means that rounding shifted are shifted back           `correct.py`

The first two change the float model, before it is calibrated; the last one the int8 model. Not
those of a MatMul: a transformer's errors lie in a few tokens, whose outliers are cut off, and to
shift the mean is to hand them on to all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from twofour.core.data import DataLike, as_data
from twofour.core.errors import InputError
from twofour.core.progress import Report
from twofour.onnx_tools.capture import Samples
from twofour.onnx_tools.correct import correct
from twofour.onnx_tools.equalize import Equalized, equalize
from twofour.onnx_tools.insert import Rounded
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.placement import Placement
from twofour.onnx_tools.round_weights import round_weights
from twofour.onnx_tools.smooth import smooth

_BIASED = ("Conv", "Gemm")
_BIAS_SAMPLES = 128
"""Of which the means are taken: the network is run once for each step of its depth."""


@dataclass(frozen=True)
class StepReport:
    """What a step of the recipe did.

    Attributes:
        name: one of `options.STEPS`.
        changed: how many layers, or groups of them, it changed.
        notes: what is worth telling a person, such as which layers it left and why.
    """

    name: str
    changed: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Steps:
    """What the steps of one quantization share.

    Attributes:
        data: the calibration data.
        options: those whose recipe is followed.
        progress: called while a step runs.
        done: what was done so far.
    """

    data: DataLike | None
    options: QuantizeOptions
    progress: Report
    done: list[StepReport] = field(default_factory=list)

    def on_floats(self, model: ir.Model) -> None:
        """Equalizes and smooths the float model, as far as the recipe says.

        Args:
            model: prepared; changed.

        Raises:
            InputError: the data is missing, or does not fit the model's inputs.
            UnsupportedError: ONNX Runtime cannot run the model.
        """
        ranges, progress = self.options.ranges, self.progress
        if self.options.takes("equalize"):
            samples = self.samples(model, "equalize")
            self._equalized("equalize", equalize(model, samples, ranges, progress=progress))
        if self.options.takes("smooth"):
            samples = self.samples(model, "smooth")
            self._equalized("smooth", smooth(model, samples, ranges, progress))

    def rounded(self, model: ir.Model, placement: Placement) -> Rounded:
        """Chooses the integers of the weights, if the recipe says so; else it leaves that open.

        Args:
            model: prepared, after the steps on floats; it stays as it is.
            placement: whose layers have the weights.

        Raises:
            InputError: the data is missing, or it or a weight is not usable.
            UnsupportedError: ONNX Runtime cannot run the model.
        """
        if not self.options.takes("round"):
            return {}
        samples = self.samples(model, "round")
        found = round_weights(model, placement.layers, samples, self.progress)
        left = [f"to the nearest integers: {reason}" for reason in found.left.values()]
        self._note("round", len(found.weights), left)
        return found.weights

    def on_integers(self, floats: ir.Model, model: ir.Model) -> ir.Model:
        """Corrects the biases of the int8 model, if the recipe says so.

        Args:
            floats: the model before.
            model: the int8 model; it stays as it is.

        Raises:
            InputError: the data is missing, or does not fit the model's inputs.
            UnsupportedError: ONNX Runtime cannot run the model.
        """
        if not self.options.takes("bias"):
            return model
        samples = self.samples(model, "bias", _BIAS_SAMPLES)
        model, report = correct(
            floats, model, samples, moments=1, operators=_BIASED, progress=self.progress
        )
        left = [f"left {each.op}: {each.reason}" for each in report if not each.done]
        self._note("bias", sum(bool(each.done) for each in report), left)
        return model

    def samples(self, model: ir.Model, step: str, most: int | None = None) -> Samples:
        """The calibration data for a step that runs the model by itself.

        Args:
            model: whose inputs it has.
            step: for the message.
            most: samples; None for as many as are calibrated with.

        Raises:
            InputError: it cannot be gone through again.
        """
        if self.data is None or isinstance(self.data, Iterator):
            got = "none" if self.data is None else "a generator, which gives them once"
            raise InputError(
                f"step {step!r} of the recipe runs the model on samples",
                [f"they have to be there for every run, got {got}"],
                "give samples: a list of batches, a dict of arrays, a file, or module:function; "
                f"or leave out the step {step}",
            )
        names = [str(value.name) for value in model.graph.inputs]
        limits = [limit for limit in (self.options.samples, most) if limit is not None]
        limit = min(limits, default=None)
        return Samples(as_data(self.data, names), limit, self.options.threads)

    def _equalized(self, name: str, found: Iterable[Equalized]) -> None:
        every = tuple(found)
        left = [f"left {each.layers[0]}: {each.reason}" for each in every if each.alpha is None]
        self._note(name, sum(each.alpha is not None for each in every), left)

    def _note(self, name: str, changed: int, left: list[str]) -> None:
        counts = Counter(left)
        notes = [
            text if count == 1 else f"{text} ({count} times)" for text, count in counts.items()
        ]
        self.done.append(StepReport(name, changed, tuple(notes)))
