"""Fake-quantizes a PyTorch model: calibrated in PyTorch, then fine-tuned as before.

    quantizer = Quantizer(model, example_inputs).calibrate(batches)
    finetune(model, batches_of_epoch, schedule, method=sparsifier)   # as without it
    export_onnx(model, example_inputs, "model.onnx")                 # with Q/DQ

Source: Jacob et al. 2018, arXiv:1712.05877; Wu et al. 2020, arXiv:2004.09602; learned scales:
Esser et al. 2020, arXiv:1902.08153.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from twofour.core.errors import GateError, InputError
from twofour.core.progress import Report, silent
from twofour.core.ranges import Range, choose_range
from twofour.train.batches import device_of
from twofour.train.batches import forward as call
from twofour.train.calibration import Batches, Forward, as_it_was, bare, batches_of, count_of
from twofour.train.holding import why_stray
from twofour.train.layers import Prunable, find_weights
from twofour.train.quantize_places import place
from twofour.train.quantize_plan import QuantizerOptions, ScalePlace
from twofour.train.quantize_report import PlaceReport, table
from twofour.train.quantize_run import NAME, Quantizers, State, attach, detach, quantizers_of
from twofour.train.trace import trace

_NAME = "calibration"


class Quantizer:
    """Rounds weights and activations of a model as an int8 engine would, while it runs in floats.

    Where is found on the graph of functions that the model calls with the example inputs, by the
    rules of `quantize_places.py`. The model keeps its modules and parameters; its quantizers are a
    submodule (`model.quantizers`), so they are saved, moved and copied with it. To resume, make the
    Quantizer anew and load what was saved.

    Args:
        model: changed in place; wrapped by `torch.compile` or DistributedDataParallel or not.
        example_inputs: one batch as `batches.forward` takes it; a tuple holds all arguments.
        options: method, kind of activations, what is left out.

    Raises:
        InputError: nothing can be quantized, the model has a Quantizer already, or a pattern of
            names matches nothing.

    Attributes:
        model: not wrapped.
        quantizers: by name; also `model.quantizers`.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, options: QuantizerOptions | None = None
    ) -> None:
        """Finds what to quantize; the model computes as before until it is calibrated."""
        self.model = bare(model)
        self.options = options or QuantizerOptions()
        if quantizers_of(self.model) is not None:
            raise InputError(
                f"{type(self.model).__name__} has a Quantizer already",
                fix="use that one, or call its remove() first",
            )
        graph = trace(self.model, example_inputs, self.options.attention)
        places = place(graph, self.options)
        for path, module in self.model.named_modules():
            known = path in graph.modules or f"{path}.weight" in places.parameters
            if isinstance(module, Prunable) and not known:
                places.stay_float[path] = "the example inputs do not reach it"
        made = Quantizers(places, graph, self.options)
        self.quantizers = made.to(device_of(self.model))
        self._set_weights()
        attach(self.model, self.quantizers)

    def calibrate(
        self, batches: Batches, forward: Forward = call, report: Report = silent
    ) -> Quantizer:
        """Runs the model in eval mode, collects what flows, and chooses all scales.

        Args:
            batches: some hundred samples as in use; run through once.
            forward: runs the model on a batch.
            report: told of each batch.

        Returns:
            itself; from now on the model rounds.

        Raises:
            InputError: there are no batches, a tensor was not finite, or not all of the model ran.
        """
        made = self.quantizers
        before: State = made.state
        made.state, made.observers = "collect", {}
        done = False
        try:
            with as_it_was(self.model), torch.no_grad():
                for index, batch in enumerate(batches_of(batches, self.model, _NAME)):
                    forward(self.model, batch)
                    report(index + 1, count_of(batches), f"{_NAME}: batch")
            ranges = {name: self._range(each) for name, each in made.places.scales.items()}
            done = True
        finally:
            made.observers = {}
            made.state = "on" if done else before
        for name, span in ranges.items():
            made.get(name).set_range(span)
        for name in made:
            made.get(name).mode = "on"
        self.verify()
        return self

    @property
    def scales(self) -> list[nn.Parameter]:
        """The scales that are trained: with `learned_scales`, else none."""
        return [p for p in self.quantizers.parameters() if p.requires_grad]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model computes with floats."""
        before = self.quantizers.state
        self.quantizers.state = "off"
        try:
            yield
        finally:
            self.quantizers.state = before

    def enable(self, rounding: bool = True) -> None:
        """Switches all rounding on or off.

        Raises:
            InputError: on, and there are no scales yet.
        """
        if rounding:
            self._require_calibrated()
        self.quantizers.state = "on" if rounding else "off"

    def freeze(self) -> None:
        """No scale changes any more: learned ones are not trained, those of weights are kept."""
        self._require_calibrated()
        for name in self.quantizers:
            quantizer = self.quantizers.get(name)
            quantizer.follows = False
            for parameter in quantizer.parameters():
                parameter.requires_grad_(False)

    def verify(self) -> None:
        """Checks that each weight is zero, rounded, wherever its mask removes it.

        Raises:
            GateError: names the weights where it is not.
        """
        broken = []
        for ref in find_weights(self.model):
            path = ref.name if ref.name.endswith(ref.attribute) else f"{ref.name}.{ref.attribute}"
            name = self.quantizers.places.parameters.get(path)
            if name is None or ref.mask is None:
                continue
            with torch.no_grad():
                rounded = self.quantizers.get(name)(ref.parameter)
            if (why := why_stray(rounded, ref.mask)) is not None:
                broken.append(f"{ref.name}: {why}")
        if broken:
            raise GateError(
                f"{len(broken)} weights lost their masks",
                broken,
                "call Sparsifier.attach(optimizer) before training",
            )

    def restore(self, state_dict: Mapping[str, Any]) -> Quantizer:
        """Loads `model.state_dict()` of a quantized model, scales included; from now on it rounds.

        Raises:
            InputError: it is of another model, or of one without a Quantizer.
        """
        try:
            self.model.load_state_dict(state_dict)
        except RuntimeError as e:
            reasons = [line.strip() for line in str(e).splitlines()[1:]]
            fix = "prune as that model was pruned, and make the Quantizer with the same options"
            if not any(f"{NAME}." in name for name in state_dict):
                reasons = ["expected the scales of a Quantizer, got none", *reasons]
                fix = "load it before the Quantizer is made, and calibrate"
            raise InputError("cannot load what another model saved", reasons, fix) from e
        return self

    def report(self) -> list[PlaceReport]:
        """One entry for each scale, and each layer or sum that stays float, with the reason."""
        return list(_entries(self.quantizers))

    def table(self) -> str:
        """The report as text of at most 100 columns."""
        return table(self.report())

    def remove(self) -> None:
        """Takes the quantizers out of the model, which is as it was then."""
        detach(self.model)

    def _range(self, scale: ScalePlace) -> Range:
        """What the tensors of a scale span together."""
        if scale.known is not None:
            return scale.known
        spans = []
        for name in scale.origins:
            observer = self.quantizers.observers.get(name)
            if observer is None:
                raise InputError(
                    f"calibration never computed {name}",
                    ["the batches take another path than the example inputs"],
                    "calibrate with batches that run all of the model",
                )
            try:
                seen = observer.histogram()
            except InputError as e:
                raise InputError(f"cannot calibrate {name}", [e.what], e.fix) from e
            spans.append(choose_range(seen, self.options.ranges))
        return Range(min(s.low for s in spans), max(s.high for s in spans))

    def _set_weights(self) -> None:
        """The scales of weights that are parameters, so that their shapes are known."""
        for path, parameter in self.model.named_parameters():
            name = self.quantizers.places.parameters.get(path)
            if name is not None:
                self.quantizers.get(name).set_from(parameter)

    def _require_calibrated(self) -> None:
        modes = (self.quantizers.get(name).mode for name in self.quantizers)
        if any(mode != "on" for mode in modes):
            raise InputError("there are no scales yet", fix="call calibrate(batches) first")


def _entries(quantizers: Quantizers) -> Iterator[PlaceReport]:
    for name, weight in quantizers.places.weights.items():
        yield _entry(quantizers, name, "weight", weight.shape, weight.layers)
    for name, scale in quantizers.places.scales.items():
        yield _entry(quantizers, name, "activation", (), scale.origins)
    for name, reason in quantizers.places.stay_float.items():
        yield PlaceReport(name, "float", reason=reason)


def _entry(
    quantizers: Quantizers, name: str, kind: str, shape: tuple[int, ...], at: tuple[str, ...]
) -> PlaceReport:
    quantizer = quantizers.get(name)
    scale: Tensor | None = quantizer.trained_scale() if quantizer.mode == "on" else None
    largest = None if scale is None else float(scale.max())
    form = "int8" if quantizer.bounds[0] else "uint8"
    return PlaceReport(name, kind, form, shape, at, largest)
