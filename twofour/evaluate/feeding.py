"""The same runs for a model and its engine, and their outputs as one row for each sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import InputError
from twofour.core.feeds import Form, Run
from twofour.core.plan import Plan, Profile, TensorInfo
from twofour.onnx_tools.reference import Reference
from twofour.runtime.session import Session

Array = NDArray[Any]
Predictor = Callable[[Run], Mapping[str, Array]]
"""Outputs by name, one row for each sample of the run."""
MOST = 32
"""Samples in a run, where the engine would take any number."""


def engine_forms(plan: Plan) -> tuple[tuple[Form, ...], int]:
    """What an engine says of its inputs, and the most samples in a run, by its first profile.

    A batch that is open, but never 1, counts as fixed to its usual size: so a last, smaller batch
    is filled up.
    """
    profile = plan.profiles[0]
    forms = tuple(Form(t.name, t.dtype, _dims(t, profile)) for t in profile.inputs)
    mosts = [t.shape[0] for t in profile.inputs if t.shape]
    return forms, max(1, min([*mosts, MOST]))


def _dims(info: TensorInfo, profile: Profile) -> tuple[int | str, ...]:
    found: list[int | str] = []
    least = info.shape_at([symbol.least for symbol in profile.symbols])
    for axis, dim in enumerate(info.dims):
        if isinstance(dim, int):
            found.append(dim)
        elif axis == 0 and least[0] > 1:
            found.append(info.usual_shape[0])
        else:
            found.append("?")
    return tuple(found)


def engine_predictor(session: Session) -> Predictor:
    """An engine as a function of runs."""

    def predict(run: Run) -> dict[str, Array]:
        return rows(session.run(run.feeds), run)

    return predict


def model_predictor(reference: Reference) -> Predictor:
    """A model as a function of runs."""

    def predict(run: Run) -> dict[str, Array]:
        return rows(reference.run(run.feeds), run)

    return predict


def rows(outputs: Mapping[str, Array], run: Run) -> dict[str, Array]:
    """The outputs with one row for each sample, without those that only filled up the run.

    Raises:
        InputError: there are several samples, and an output has no axis for them.
    """
    return {name: _rows(name, np.asarray(array), run) for name, array in outputs.items()}


def _rows(name: str, array: Array, run: Run) -> Array:
    samples, fed = len(run.batch), _fed(run)
    if array.ndim and len(array) == fed:
        return array[:samples]
    if fed == 1:
        return array[None]
    raise InputError(
        f"output {name!r} has no row for each sample",
        [f"expected {fed} rows, got shape {list(array.shape)}"],
        "build the engine for a batch of 1",
    )


def _fed(run: Run) -> int:
    """Samples in a run, those that fill it up included; 1 where an input is given whole."""
    given = run.batch.inputs
    if any(array.ndim != given[name].ndim for name, array in run.feeds.items()):
        return 1
    return max(len(array) for array in run.feeds.values())
