"""Batches of any length into a network of whatever batch size it has.

A network that was exported or built for 8 samples runs 13 as 8 and 5, the second batch filled up
with repeated samples whose results are dropped. Where the arrays have one axis more than the
network's inputs, each sample is a whole set of inputs: a network without a batch axis runs them one
by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.data import Batch
from twofour.core.errors import InputError
from twofour.core.plan import Plan
from twofour.evaluate.judge import Predictor
from twofour.onnx_tools.reference import Reference
from twofour.runtime.session import Session

Array = NDArray[Any]
Arrays = dict[str, Array]
MOST = 32
"""Samples in a batch, where the network would take any number."""


@dataclass(frozen=True)
class Feeder:
    """A network that takes any number of samples.

    Attributes:
        run: inputs of an allowed size -> outputs by name.
        ranks: input name -> number of dimensions.
        least: samples that one run takes at least.
        most: samples that one run takes at most.
    """

    run: Callable[[Mapping[str, Array]], Mapping[str, Array]]
    ranks: Mapping[str, int]
    least: int
    most: int

    def __call__(self, inputs: Mapping[str, Array]) -> Arrays:
        """The outputs, one row for each sample.

        Args:
            inputs: by name, [n, ...].

        Raises:
            InputError: the network refuses them, or its outputs have no row for each sample.
        """
        parts = [self._rows(*piece) for piece in self.pieces(inputs)]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def pieces(self, inputs: Mapping[str, Array]) -> Iterator[tuple[Arrays, int, bool]]:
        """What single runs take, how many samples of it count, and whether they are whole sets."""
        count = len(next(iter(inputs.values())))
        if self.whole(inputs):
            for row in range(count):
                yield {name: array[row] for name, array in inputs.items()}, 1, True
            return
        for start in range(0, count, self.most):
            piece = {name: array[start : start + self.most] for name, array in inputs.items()}
            rows = min(self.most, count - start)
            if rows < self.least:
                piece = {k: np.resize(v, (self.least, *v.shape[1:])) for k, v in piece.items()}
            yield piece, rows, False

    def whole(self, inputs: Mapping[str, Array]) -> bool:
        """Whether each sample is a whole set of inputs."""
        return all(array.ndim == self.ranks.get(name, -1) + 1 for name, array in inputs.items())

    def _rows(self, piece: Arrays, count: int, whole: bool) -> Arrays:
        found = self.run(piece)
        if whole:
            return {name: array[None] for name, array in found.items()}
        fed = len(next(iter(piece.values())))
        return {name: rows_of(name, array, fed)[:count] for name, array in found.items()}


def rows_of(name: str, array: Array, fed: int) -> Array:
    """An output with one row for each sample that was fed.

    Raises:
        InputError: several samples were fed, and the output has no axis for them.
    """
    if array.ndim and len(array) == fed:
        return array
    if fed == 1:
        return array[None]
    raise InputError(
        f"output {name!r} has no row for each sample",
        [f"expected {fed} rows, got shape {list(array.shape)}"],
        "build the engine for a batch of 1, and give a model that takes 1",
    )


def engine_range(plan: Plan) -> tuple[int, int]:
    """The fewest and the most samples that one run of an engine takes, by its first profile.

    An engine whose inputs do not share their first dimension has no batch axis: (1, 1).
    """
    profile = plan.profiles[0]
    firsts = {info.dims[0] if info.dims else 1 for info in profile.inputs}
    if len(firsts) != 1:
        return 1, 1
    (first,) = firsts
    if isinstance(first, int):
        return first, first
    least = first.at(tuple(symbol.least for symbol in profile.symbols))
    return least, max(least, min(first.most, MOST))


def engine_predictor(session: Session) -> Predictor:
    """An engine as a function of batches."""
    plan = session.engine.plan
    return _of_batches(Feeder(session.run, _ranks(plan), *engine_range(plan)))


def model_predictor(reference: Reference, plan: Plan) -> Predictor:
    """A model as a function of batches."""
    return _of_batches(model_feeder(reference, plan))


def model_feeder(reference: Reference, plan: Plan) -> Feeder:
    """A model, fed as it was exported and as the plan of its engine tells samples apart."""
    return Feeder(reference.run, _ranks(plan), *_model_range(reference, plan))


def batch_size(reference: Reference, plan: Plan) -> int:
    """Samples at a time that fill a run of the engine and a run of the model."""
    return max(engine_range(plan)[1], _model_range(reference, plan)[0])


def _model_range(reference: Reference, plan: Plan) -> tuple[int, int]:
    firsts = {each.dims[0] if each.dims else None for each in reference.inputs}
    fixed = firsts.pop() if len(firsts) == 1 else None
    if fixed is not None:
        return fixed, fixed
    return (1, 1) if engine_range(plan) == (1, 1) else (1, MOST)


def _ranks(plan: Plan) -> dict[str, int]:
    return {info.name: len(info.shape) for info in plan.inputs}


def _of_batches(feeder: Feeder) -> Predictor:
    def predict(batch: Batch) -> Mapping[str, Array]:
        return feeder(batch.inputs)

    return predict
