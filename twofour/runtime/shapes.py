"""Which profile takes which shapes, and what its tensors measure then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from twofour.core.errors import InputError
from twofour.core.plan import Plan, Profile, TensorInfo
from twofour.core.sizes import Size, written

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Bound:
    """A profile at certain shapes.

    Attributes:
        profile: its index in the plan.
        values: of its symbols.
        shapes: of every plain tensor whose shape is known before running, by name.
    """

    profile: int
    values: tuple[int, ...]
    shapes: Shapes


def bind(plan: Plan, shapes: Shapes) -> Bound:
    """The first profile that the inputs fit.

    Args:
        plan: of the engine.
        shapes: of the inputs by name: of each input, and of nothing else.

    Raises:
        InputError: they fit none; says for each profile which dimension does not, and what would.
    """
    reasons: list[str] = []
    for index, profile in enumerate(plan.profiles):
        values: dict[int, tuple[int, str]] = {}
        wrong = [r for info in profile.inputs for r in _misfits(profile, info, shapes, values)]
        if not wrong:
            found = tuple(values[i][0] for i in range(len(profile.symbols)))
            sizes = {info.name: info.shape_at(found) for info in profile.tensors if info.known}
            return Bound(index, found, sizes)
        reasons += [f"profile {index + 1}: {'; '.join(wrong)}"] if plan.profiles[1:] else wrong
    raise InputError(
        f"the inputs {'fit no profile of' if plan.profiles[1:] else 'do not fit'} the engine",
        [*_expected(plan), f"got {_got(shapes)}", *reasons],
        "reshape them, or build for these shapes: " + _option(shapes),
    )


def shape_text(info: TensorInfo, profile: Profile) -> str:
    """The dimensions for people, open ones with their range: [batch 1-8, 3, 32, 32]."""
    if not info.known:
        return "[?]"
    return f"[{', '.join(_dim(profile, dim) for dim in info.dims)}]"


def refusal(plan: Plan, name: str, inputs: Mapping[str, object]) -> InputError:
    """What is wrong with the inputs, by name or type.

    Args:
        plan: of the engine.
        name: the first that does not fit, or "" where there are too many.
        inputs: as given.
    """

    def wanted(info: TensorInfo) -> str:
        return f"{info.name} {info.dtype} {shape_text(info, plan.profiles[0])}"

    if name not in inputs:
        return InputError(
            "the inputs given are not those of the engine",
            [
                f"expected {', '.join(map(wanted, plan.inputs))}",
                f"got {', '.join(map(str, inputs)) or 'none'}",
            ],
            "name each array as the model names its input",
        )
    info = next(info for info in plan.inputs if info.name == name)
    array = inputs[name]
    if not isinstance(array, np.ndarray):
        found, fix = type(array).__name__, "pass a numpy array"
    else:
        found, fix = array.dtype.name, f"convert it with .astype({info.dtype!r})"
    what = f"input {name!r} does not fit the engine"
    return InputError(what, [f"expected {info.dtype}", f"got {found}"], fix)


def _dim(profile: Profile, dim: int | Size) -> str:
    if isinstance(dim, int):
        return str(dim)
    for index, symbol in enumerate(profile.symbols):
        if dim.terms == _alone(profile, index):
            return f"{symbol.name} {symbol.least}-{symbol.most}"
    return written(dim, profile.symbols)


def _alone(profile: Profile, index: int) -> tuple[tuple[int, ...], ...]:
    """The terms of one symbol by itself."""
    return ((1, *(int(i == index) for i in range(len(profile.symbols)))),)


def _misfits(
    profile: Profile, info: TensorInfo, shapes: Shapes, values: dict[int, tuple[int, str]]
) -> list[str]:
    """Why an input does not fit; notes what the symbols stand for, and where that was seen."""
    shape = shapes[info.name]
    if len(shape) != len(info.shape):
        return [f"{info.name}: expected {len(info.shape)} dimensions, got {len(shape)}"]
    wrong = []
    for axis, (dim, number) in enumerate(zip(info.dims, shape, strict=True)):
        here = f"{info.name}[{axis}]"
        if isinstance(dim, int):
            wrong += [f"{here}: expected {dim}, got {number}"] if number != dim else []
            continue
        index = next(i for i in range(len(profile.symbols)) if dim.terms == _alone(profile, i))
        symbol = profile.symbols[index]
        known, there = values.setdefault(index, (number, here))
        if not symbol.least <= number <= symbol.most:
            wrong.append(
                f"{here}: expected {symbol.name} from {symbol.least} to {symbol.most}, got {number}"
            )
        elif known != number:
            wrong.append(f"{here}: {symbol.name} is {known} in {there}, got {number}")
    return wrong


def _expected(plan: Plan) -> list[str]:
    """What each profile takes."""
    several = len(plan.profiles) > 1
    return [
        (f"profile {index} takes " if several else "expected ")
        + ", ".join(f"{t.name} {t.dtype} {shape_text(t, profile)}" for t in profile.inputs)
        for index, profile in enumerate(plan.profiles, 1)
    ]


def _got(shapes: Shapes) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


def _option(shapes: Shapes) -> str:
    return " ".join(
        f"--shapes {name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items() if shape
    )
