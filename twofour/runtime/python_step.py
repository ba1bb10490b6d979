"""A step of an engine that an installed plugin runs in Python, by its operator's meaning."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import EngineError, InputError, UnsupportedError
from twofour.core.plan import CONSTANT, LEFT_OUT, PluginCall
from twofour.core.plan_check import ITEM_BYTES
from twofour.core.plugins import Operator, require
from twofour.engine import Bytes, Engine, Step
from twofour.runtime.shapes import Bound

Array = NDArray[Any]


class PythonStep:
    """A plugin's operator."""

    def __init__(self, step: Step, engine: Engine, dtypes: dict[str, str]) -> None:
        """Finds the operator among the installed ones.

        Args:
            step: the step.
            engine: has it.
            dtypes: of the plain tensors by name.

        Raises:
            UnsupportedError: the plugin is not installed, or in another version.
        """
        call = next(call for call in engine.plan.plugins if call.step == step.symbol)
        self._operator = require(call.domain, call.name, call.version, call.package)
        self._function = _callable(self._operator)
        self._attributes = json.loads(call.attributes)
        for name, value in self._attributes.items():
            if isinstance(value, list):
                self._attributes[name] = tuple(value)
        held = engine.subgraphs.get(step.symbol, np.zeros(0, np.uint8))
        self._operands = _operands(call, step.inputs, held)
        self._outputs = [(name, np.dtype(dtypes[name])) for name in step.outputs]
        self._symbol = step.symbol

    def run(self, tensors: dict[str, Array], bound: Bound) -> None:
        """Calls the meaning.

        Raises:
            InputError: it fails on these values.
            EngineError: it gives something else than the plan says.
        """
        given = [tensors[each] if isinstance(each, str) else each for each in self._operands]
        try:
            results = self._function(*given, **self._attributes)
        except Exception as error:
            raise InputError(
                f"the plugin operator {self._operator} failed in step {self._symbol!r}",
                [f"{type(error).__name__}: {error}"],
            ) from error
        values = results if isinstance(results, tuple) else (results,)
        if len(values) != len(self._outputs):
            raise self._surprise(f"{len(values)} results, expected {len(self._outputs)}")
        for (name, dtype), value in zip(self._outputs, values, strict=True):
            array = np.asarray(value, order="C")
            expected = bound.shapes.get(name, array.shape)
            if array.shape != expected or array.dtype != dtype:
                raise self._surprise(
                    f"{name!r} as {array.dtype} {list(array.shape)}, the plan says"
                    f" {dtype} {list(expected)}"
                )
            tensors[name] = array

    def _surprise(self, what: str) -> EngineError:
        return EngineError(
            f"the plugin operator {self._operator} gives something else than its rule for shapes",
            [f"it gives {what}"],
            "mend the plugin, and build the engine again",
        )


def _callable(operator: Operator) -> Any:
    """Its meaning in numpy.

    Raises:
        UnsupportedError: it has none by now.
    """
    if not callable(operator.meaning):
        raise UnsupportedError(
            f"the plugin operator {operator} has no meaning in numpy",
            ["it had one when the engine was built"],
            "build the engine again",
        )
    return operator.meaning


def _operands(call: PluginCall, inputs: tuple[str, ...], held: Bytes) -> list[str | Array | None]:
    """For each input the name of a tensor, a constant, or None."""
    constants = iter(_constants(call, held))
    found: list[str | Array | None] = []
    for index in call.operands:
        if index == CONSTANT:
            found.append(next(constants))
        else:
            found.append(None if index == LEFT_OUT else inputs[index])
    return found


def _constants(call: PluginCall, held: Bytes) -> list[Array]:
    """The constants of a call, read-only."""
    return [
        np.frombuffer(held[begin:end].tobytes(), info.dtype).reshape(info.shape)
        for info, (begin, end) in zip(call.constants, call.places(ITEM_BYTES), strict=True)
    ]
