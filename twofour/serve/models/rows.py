"""Several requests as one run: which fit together, how they are joined, how results are cut apart.

Rows lie along the first axis of every input and output. Sequences of unlike length lie side by side
once the shorter are padded. What an engine takes is in its plan: each profile has, for the rows and
for the length, one number or a range.

    inputs [2, 5], [1, 7], bucket 8, the engine takes lengths 1-128   ->  one input [3, 7]
    inputs [2, 5], [1, 7], the engine takes [4, 8] only               ->  one input [4, 8]
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import InputError
from twofour.core.plan import Plan, Profile, TensorInfo
from twofour.core.sizes import Count
from twofour.runtime.shapes import bind, shape_text
from twofour.serve.errors import MalformedError
from twofour.serve.models.queue import Job, Key
from twofour.serve.repository.config import Batching, Lengths

Array = NDArray[Any]
Shape = tuple[int, ...]
Range = tuple[int, int]
OPEN = -1
"""Stands for the rows and for the length in the shapes of a key."""
_MOST_KNOWN = 1024  # shapes remembered


@dataclass(frozen=True)
class Place:
    """Where a request belongs.

    Attributes:
        rows: of a batch that it takes.
        length: of its sequences; 0 where the model has none.
        key: requests with an equal one fit together.
    """

    rows: int
    length: int
    key: Key


class Layout:
    """How requests to one engine are joined.

    Attributes:
        most_rows: of one run; 1 where the tensors of the engine have no rows in common.
    """

    def __init__(self, plan: Plan, batching: Batching) -> None:
        """Reads what the engine takes.

        Raises:
            InputError: the configuration asks for rows or lengths that the engine has not.
        """
        self._plan, self._batching = plan, batching
        self._names = tuple(info.name for info in plan.inputs)
        self._axes = _length_axes(plan, batching.lengths)
        self._cuts = _cut_axes(plan, batching.lengths)
        self._rows = [_range(profile, _first_dims(profile)) for profile in plan.profiles]
        self._spans = [self._length_range(profile) for profile in plan.profiles]
        self._rowed = all(self._rows)
        able = max((rows[1] for rows in self._rows if rows), default=1) if all(self._rows) else 1
        self.most_rows = batching.max_size or able
        if self.most_rows > able:
            raise InputError(
                f"batching.max_size is {self.most_rows}, and the engine takes {able} at once",
                [f"{info.name} {shape_text(info, plan.profiles[0])}" for info in plan.inputs],
                "build with an open first dimension: twofour build --shapes NAME:MIN:OPT:MAX",
            )
        self._places: dict[tuple[Shape, ...], Place] = {}
        self._fits: dict[tuple[int, int, Key], Range] = {}

    @property
    def batches(self) -> bool:
        """Requests may share a run."""
        return self.most_rows > 1

    def place(self, inputs: Mapping[str, Array]) -> Place:
        """Where a request belongs.

        Args:
            inputs: name -> array, as the client sent them.

        Raises:
            MalformedError: other names, types or shapes than the engine takes.
        """
        if len(inputs) != len(self._names) or any(name not in inputs for name in self._names):
            raise MalformedError(
                "the inputs given are not those of the model",
                [f"expected {', '.join(self._names)}", f"got {', '.join(inputs) or 'none'}"],
                "send the inputs that the model's metadata names",
            )
        for info in self._plan.inputs:
            if inputs[info.name].dtype != info.dtype:
                raise MalformedError(
                    f"input {info.name!r} has another type than the model's",
                    [f"expected {info.dtype}", f"got {inputs[info.name].dtype}"],
                    "send the datatype that the model's metadata names",
                )
        shapes = tuple([inputs[name].shape for name in self._names])
        place = self._places.get(shapes)
        if place is None:
            if len(self._places) >= _MOST_KNOWN:
                self._places.clear()
            place = self._places[shapes] = self._new_place(shapes)
        return place

    def join(self, jobs: Sequence[Job]) -> Mapping[str, Array]:
        """The inputs of one run.

        Args:
            jobs: of one key, together at most `most_rows`.
        """
        first = jobs[0]
        rows = sum([job.rows for job in jobs])
        length = max([job.length for job in jobs])
        fit = self._fit(rows, length, first.key)
        if len(jobs) == 1 and fit == (first.rows, first.length):
            return first.inputs
        return {name: self._joined(name, jobs, fit) for name in self._names}

    def split(self, outputs: Mapping[str, Array], jobs: Sequence[Job]) -> list[Mapping[str, Array]]:
        """The outputs of each request: views of those of the run."""
        if not self.batches and not self._axes:
            return [outputs]
        parts: list[Mapping[str, Array]] = []
        row = 0
        for job in jobs:
            end = row + job.rows
            part = {name: y[row:end] if self._rowed else y for name, y in outputs.items()}
            for name, axis in self._cuts.items():
                part[name] = part[name][(slice(None),) * axis + (slice(job.length),)]
            parts.append(part)
            row = end
        return parts

    def shapes_to_warm(self) -> list[dict[str, Shape]]:
        """What runs will look like: the smallest, the usual and the largest of each profile."""
        found: list[dict[str, Shape]] = []
        for profile in self._plan.profiles:
            symbols = profile.symbols
            for values in dict.fromkeys(
                (
                    tuple(each.least for each in symbols),
                    tuple(each.usual for each in symbols),
                    tuple(each.most for each in symbols),
                )
            ):
                found.append({info.name: info.shape_at(values) for info in profile.inputs})
        return found

    def rows_of(self, shapes: Mapping[str, Shape]) -> int:
        """Rows of a run of these shapes; 1 where the engine's tensors have none in common."""
        return shapes[self._names[0]][0] if self.batches else 1

    def shapes_of_rows(self, rows: int) -> dict[str, Shape] | None:
        """A run of so many rows, of usual sizes otherwise; None where the engine's are fixed."""
        profile = self._plan.profiles[0]
        index = _symbol(profile, self._plan.inputs[0].dims[0]) if self.batches else None
        if index is None:
            return None
        if not profile.symbols[index].least <= rows <= profile.symbols[index].most:
            return None
        values = [each.usual for each in profile.symbols]
        values[index] = rows
        return {info.name: info.shape_at(values) for info in profile.inputs}

    def _new_place(self, shapes: tuple[Shape, ...]) -> Place:
        """Finds the place of shapes that were not seen yet; refuses what no profile takes."""
        given = dict(zip(self._names, shapes, strict=True))
        if not self.batches and not self._axes:
            place = Place(1, 0, Key(0, shapes))
        else:
            rows = self._common(given, dict.fromkeys(given, 0), "rows")
            length = self._common(given, self._axes, "length") if self._axes else 0
            open_shapes = tuple(
                _opened(shape, (0, self._axes.get(name, 0))) for name, shape in given.items()
            )
            place = Place(rows, length, Key(self._bucket(length), open_shapes))
        if place.rows > self.most_rows:
            raise MalformedError(
                "the request has more rows than a batch may have",
                [f"expected at most {self.most_rows}", f"got {place.rows}"],
                "send it in parts",
            )
        self._fit(place.rows, place.length, place.key)
        return place

    def _fit(self, rows: int, length: int, key: Key) -> Range:
        """The rows and the length that a profile takes, with the least padding.

        Raises:
            MalformedError: no profile takes them.
        """
        wanted = (rows, length, key)
        fit = self._fits.get(wanted)
        if fit is None:
            if len(self._fits) >= _MOST_KNOWN:
                self._fits.clear()
            fit = self._fits[wanted] = self._new_fit(rows, length, key)
        return fit

    def _new_fit(self, rows: int, length: int, key: Key) -> Range:
        choices = {(rows, length)}
        if self._batching.pad:
            for taken, span in zip(self._rows, self._spans, strict=True):
                low, high = taken or (rows, rows)
                shortest, longest = span or (length, length)
                if rows <= high and length <= longest:
                    choices.add((max(rows, low), max(length, shortest)))
        refused: InputError | None = None
        for choice in sorted(choices, key=lambda each: (each[0] * max(each[1], 1), each)):
            try:
                bind(self._plan, self._closed(key, *choice))
            except InputError as e:
                refused = refused or e
            else:
                return choice
        assert refused is not None  # there is always the choice as given
        raise MalformedError(
            "the shapes do not fit the model", refused.reasons, "see the model's metadata"
        ) from refused

    def _closed(self, key: Key, rows: int, length: int) -> dict[str, Shape]:
        """Shapes of a key with these numbers."""
        closed = {}
        for name, shape in zip(self._names, key.shapes, strict=True):
            dims = list(shape)
            if self.batches or self._axes:
                dims[:1] = [rows]
                if name in self._axes:
                    dims[self._axes[name]] = length
            closed[name] = tuple(dims)
        return closed

    def _joined(self, name: str, jobs: Sequence[Job], fit: Range) -> Array:
        """One input of a run: the requests' rows one below the other, and padding."""
        arrays = [job.inputs[name] for job in jobs]
        shape = self._closed(jobs[0].key, *fit)[name]
        if sum([a.shape[0] for a in arrays]) == shape[0] and all(
            [a.shape[1:] == shape[1:] for a in arrays]
        ):
            return np.concatenate(arrays)
        lengths = self._batching.lengths
        fill = lengths.pad.get(name, 0) if lengths else 0
        joined = np.full(shape, fill, arrays[0].dtype)
        row = 0
        for array in arrays:
            joined[(slice(row, row + array.shape[0]), *map(slice, array.shape[1:]))] = array
            row += array.shape[0]
        return joined

    def _common(self, given: Mapping[str, Shape], axes: Mapping[str, int], what: str) -> int:
        """The number that all these inputs have along these axes."""
        found = {}
        for name, axis in axes.items():
            if len(given[name]) <= axis:
                raise MalformedError(
                    f"input {name!r} has too few dimensions",
                    [f"expected its {what} as dimension {axis + 1}", f"got {list(given[name])}"],
                    "see the model's metadata",
                )
            found[name] = given[name][axis]
        if len(set(found.values())) > 1 or min(found.values()) < 1:
            raise MalformedError(
                f"the inputs disagree on their {what}, or have none",
                [f"{name}: {number}" for name, number in found.items()],
                f"send inputs of one {what}, at least 1",
            )
        return next(iter(found.values()))

    def _bucket(self, length: int) -> int:
        lengths = self._batching.lengths
        buckets = lengths.buckets if lengths else ()
        at = bisect.bisect_left(buckets, length)
        return buckets[at] if at < len(buckets) else length

    def _length_range(self, profile: Profile) -> Range | None:
        by_name = {info.name: info for info in profile.inputs}
        dims = [by_name[name].dims[axis] for name, axis in self._axes.items()]
        return _range(profile, dims) if dims else None


def _opened(shape: Shape, axes: tuple[int, ...]) -> Shape:
    return tuple(OPEN if axis in axes else n for axis, n in enumerate(shape))


def _first_dims(profile: Profile) -> list[Count | None]:
    """The first dimension of every input and output; None where there is none to rely on."""
    tensors = (*profile.inputs, *profile.outputs)
    return [info.dims[0] if info.known and info.dims else None for info in tensors]


def _range(profile: Profile, dims: Sequence[Count | None]) -> Range | None:
    """From which to which number dimensions go that are always equal; None: they are not."""
    if len(set(dims)) != 1 or dims[0] is None:
        return None
    dim = dims[0]
    if isinstance(dim, int):
        return dim, dim
    index = _symbol(profile, dim)
    return None if index is None else (profile.symbols[index].least, profile.symbols[index].most)


def _symbol(profile: Profile, dim: Count) -> int | None:
    """The symbol that a dimension is; None: it is fixed, or follows from several."""
    if isinstance(dim, int):
        return None
    for index in range(len(profile.symbols)):
        if dim.terms == ((1, *(int(i == index) for i in range(len(profile.symbols)))),):
            return index
    return None


def _length_axes(plan: Plan, lengths: Lengths | None) -> dict[str, int]:
    """Input -> axis of its length."""
    if lengths is None:
        return {}
    known = {info.name: info for info in plan.inputs}
    for name, axis in lengths.inputs.items():
        if name not in known or axis >= len(known[name].shape):
            raise InputError(
                f"batching.lengths.inputs names {name!r}, axis {axis}",
                [f"the engine has {', '.join(map(_text, plan.inputs))}"],
                "name an input and one of its axes, counted from 0",
            )
    return dict(lengths.inputs)


def _cut_axes(plan: Plan, lengths: Lengths | None) -> dict[str, int]:
    """Output -> axis of its length: as configured, or where it is the same open dimension."""
    if lengths is None:
        return {}
    inputs = {info.name: info for info in plan.inputs}
    name, axis = next(iter(lengths.inputs.items()))
    length = inputs[name].dims[axis]
    cuts = {}
    for info in plan.outputs:
        if info.name in lengths.outputs:
            axis = lengths.outputs[info.name]
            if axis >= len(info.shape):
                raise InputError(
                    f"batching.lengths.outputs names {info.name!r}, axis {axis}",
                    [f"the engine has {_text(info)}"],
                    "name one of its axes, counted from 0",
                )
            cuts[info.name] = axis
        elif not isinstance(length, int) and length in info.dims:
            cuts[info.name] = info.dims.index(length)
    if unknown := sorted(set(lengths.outputs) - {info.name for info in plan.outputs}):
        raise InputError(
            f"batching.lengths.outputs names {', '.join(unknown)}",
            [f"the engine has {', '.join(map(_text, plan.outputs))}"],
            "name outputs of the engine",
        )
    return cuts


def _text(info: TensorInfo) -> str:
    return f"{info.name} {list(info.shape)}"
