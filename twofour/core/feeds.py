"""What a model is given in one run, from samples.

    input of the model    array of the data         what a run gets
    x [n, 3, 8, 8]        x [samples, 3, 8, 8]      several samples along the batch axis
    x [1, 3, 8, 8]        x [samples, 3, 8, 8]      one sample
    x [4, 3]              x [samples, 3]            four samples; at the end some repeat
    state [2, n, 128]     state [samples, 2, 1, 128]    the whole input of one sample
    rate []               rate [samples]            the number of one sample
    rate []               rate []                   the same number in every run

Axis 0 of an array counts the samples. Where the array has as many axes as the model's input, that
axis takes the place of the batch axis. Where it has one more, each entry is a whole input, and a
run is one sample: so an input whose axis 0 is no batch is given with an axis in front.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.data import Batch, Data
from twofour.core.errors import InputError

Array = NDArray[Any]


@dataclass(frozen=True)
class Form:
    """What a model says of one of its inputs.

    Attributes:
        name: of the input.
        dtype: numpy's name of its type; "" where the model does not tell.
        dims: sizes, and names of those that are open, "?" where one has none; None where even
            their number is open. Dimensions of one name are equal, in whichever inputs they are.
    """

    name: str
    dtype: str
    dims: tuple[int | str, ...] | None

    def text(self, samples: bool = False) -> str:
        """Type and dimensions in words, with an axis for the samples in front if asked for."""
        dims = ["?"] if self.dims is None else [str(dim) for dim in self.dims]
        return f"{self.dtype or '?'} [{', '.join(['samples'] * samples + dims)}]"

    def takes(self, array: Array) -> bool:
        """Whether a run can be given the array."""
        if self.dtype and array.dtype.name != self.dtype:
            return False
        if self.dims is None:
            return True
        sizes = zip(self.dims, array.shape, strict=False)
        same = all(dim == size or isinstance(dim, str) for dim, size in sizes)
        return len(self.dims) == array.ndim and same


@dataclass(frozen=True)
class Run:
    """One run of a model.

    Attributes:
        feeds: what it is given: input name -> array.
        batch: the samples in it.
    """

    feeds: dict[str, Array]
    batch: Batch


def runs(data: Data, forms: Sequence[Form], most: int, limit: int | None = None) -> Iterator[Run]:
    """Goes through the samples in order.

    Args:
        data: with an array for each input.
        forms: of every input of the model.
        most: samples in a run, where the model leaves that open; >= 1.
        limit: stop after so many samples; None for all.

    Raises:
        InputError: an array does not fit its input, or the data is not usable (see
            `Data.batches`).
    """
    fixed = _fixed_batch(forms)
    for batch in data.batches(fixed or most, limit):
        whole = {form.name for form in forms if _is_whole(form, batch.inputs[form.name])}
        parts = _singles(batch) if whole else [batch]
        for part in parts:
            feeds = {
                name: array[0, ...] if name in whole else _filled(array, fixed, alone=bool(whole))
                for name, array in part.inputs.items()
            }
            _require_fit(data.source, forms, feeds, batch.inputs)
            yield Run(feeds, part)


def _fixed_batch(forms: Sequence[Form]) -> int | None:
    """The size of axis 0 that the model fixes; None if it does not, or not to one number."""
    sizes = {form.dims[0] for form in forms if form.dims and isinstance(form.dims[0], int)}
    return int(sizes.pop()) if len(sizes) == 1 else None


def _is_whole(form: Form, array: Array) -> bool:
    """Whether each entry of the array is an input as the model wants it."""
    return form.dims is not None and array.ndim == len(form.dims) + 1


def _singles(batch: Batch) -> list[Batch]:
    """One batch for each sample."""
    return [
        Batch(
            {name: array[i : i + 1] for name, array in batch.inputs.items()},
            None if batch.labels is None else batch.labels[i : i + 1],
            batch.start + i,
        )
        for i in range(len(batch))
    ]


def _filled(array: Array, size: int | None, alone: bool) -> Array:
    """A last, smaller batch for a model of fixed batch size: its samples repeat."""
    if size is None or alone or len(array) == size:
        return array
    return np.resize(array, (size, *array.shape[1:]))


def _require_fit(
    source: str, forms: Sequence[Form], feeds: dict[str, Array], arrays: dict[str, Array]
) -> None:
    wrong = [form for form in forms if not form.takes(feeds[form.name])]
    problems = [] if wrong else _contradictions(forms, feeds)
    for form in wrong:
        array, dims = arrays[form.name], form.dims
        in_front = dims is None or not dims or (isinstance(dims[0], int) and dims[0] != 1)
        got = f"{array.dtype} [{', '.join(map(str, array.shape))}]"
        problems.append(f"{form.name}: expected {form.text(in_front)}, got {got}")
    if problems:
        raise InputError(
            f"data {source} does not fit the model's inputs",
            problems,
            "prepare the samples as for inference, x.astype(numpy.float32) for instance; where "
            "axis 0 of an input is no batch, put an axis in front that counts the samples",
        )


def _contradictions(forms: Sequence[Form], feeds: dict[str, Array]) -> list[str]:
    """Dimensions of one name and several sizes."""
    seen: dict[str, tuple[int, str]] = {}
    found = []
    for form in forms:
        sizes = zip(form.dims or (), feeds[form.name].shape, strict=False)
        for axis, (dim, size) in enumerate(sizes):
            if not isinstance(dim, str) or dim == "?":
                continue
            known, there = seen.setdefault(dim, (size, f"{form.name}[{axis}]"))
            if known != size:
                found.append(f"{dim} is {known} in {there} of a run, {size} in {form.name}[{axis}]")
    return found
