"""The DATA argument: arrays named like the model's inputs, plus optional `labels`, in batches.

A source is an `.npz` file, a directory of `.npy` files, or `module:function`, a function without
arguments that returns an iterable of batches, each a dict of arrays. Axis 0 of an array counts the
samples; a number without axes is that of every sample. How samples become the inputs of a run is
told in `feeds.py`. Files are read as streams, so memory holds one batch, not the set; nothing is
unpickled. Each batch is checked when it is read: names, lengths, and no NaN or infinity.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.columns import Column, directory_columns, npz_columns
from twofour.core.errors import InputError

Array = NDArray[Any]
Arrays = Mapping[str, Array]

LABELS = "labels"
MAX_SAMPLE_BYTES = 2**31
_FUNCTION = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")
_FIX_FUNCTION = "name a function without arguments that returns an iterable of dicts of arrays"
_FIX_NAMES = "name the arrays like the model's inputs, as in numpy.savez('data.npz', {})"


@dataclass(frozen=True)
class Batch:
    """Consecutive samples.

    Attributes:
        inputs: model input name -> array [n, ...]; every array has the same n >= 1.
        labels: [n, ...], or None where the source has none.
        start: index of the first sample within the source.
    """

    inputs: dict[str, Array]
    labels: Array | None
    start: int

    def __len__(self) -> int:
        """The number of samples."""
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True)
class Data:
    """A source of samples that can be gone through more than once.

    Attributes:
        source: what the user called it, for messages.
        names: the model's inputs.
        count: samples in it; None where only reading it through would tell.
        read: yields dicts of arrays with at most the given number of samples, unchecked.
    """

    source: str
    names: tuple[str, ...]
    count: int | None
    read: Callable[[int], Iterator[Arrays]]

    def batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yields the samples in order, `size` at a time; a batch may be smaller.

        Args:
            size: most samples in a batch, >= 1.
            limit: stop after so many samples; None for all.

        Raises:
            InputError: the source is empty, unreadable, not finite, or of unequal lengths.
        """
        start = 0
        for arrays in self.read(size):
            length = self._check(arrays, start)
            for offset in range(0, length, size):
                end = min(offset + size, length)
                if limit is not None:
                    end = min(end, offset + limit - start)
                yield self._batch(arrays, offset, end, start)
                start += end - offset
                if limit is not None and start >= limit:
                    return
        if start == 0:
            raise InputError(
                f"data {self.source} holds no samples",
                ["expected at least 1 sample, got 0"],
                "give some hundred samples of what the model will see",
            )

    def _batch(self, arrays: Arrays, offset: int, end: int, start: int) -> Batch:
        labels = None if LABELS in self.names else arrays.get(LABELS)
        return Batch(
            {name: _part(arrays[name], offset, end) for name in self.names},
            None if labels is None else labels[offset:end],
            start,
        )

    def _check(self, arrays: Arrays, start: int) -> int:
        """Returns the number of samples; start is the index of the first."""
        _require_names(self.source, self.names, arrays)
        lengths = {name: len(array) if array.ndim else -1 for name, array in arrays.items()}
        length = _require_lengths(self.source, self.names, lengths)
        for name in self.names:
            _require_finite(self.source, name, arrays[name], start)
        return length


DataLike = Data | str | os.PathLike[str] | Arrays | Iterable[Arrays]


def load_data(spec: str | os.PathLike[str], names: Iterable[str]) -> Data:
    """Opens a DATA argument and checks all that can be checked without reading it through.

    Args:
        spec: path of an `.npz` file or of a directory of `.npy` files, or `module:function`. The
            module is looked for in the working directory too.
        names: the model's inputs.

    Raises:
        InputError: there is no such file, directory or function, it is not what its name says, it
            has no array for an input, the arrays' lengths differ, or it is empty.
    """
    text, path, names = os.fspath(spec), Path(spec), tuple(names)
    if path.is_dir():
        return _from_columns(text, names, directory_columns(path))
    if path.exists():
        return _from_columns(text, names, npz_columns(path))
    found = _FUNCTION.fullmatch(text)
    if found is not None:
        return _from_function(text, names, import_function(text, "data", _FIX_FUNCTION))
    raise InputError(
        f"no data at {text}",
        ["expected an .npz file, a directory of .npy files, or module:function"],
        "check the path: there is no such file or directory",
    )


def as_data(data: DataLike, names: Iterable[str]) -> Data:
    """Takes what Python passes: a DATA argument, a dict of arrays, or an iterable of such dicts.

    An iterable is gone through once per pass, so a generator serves one pass only.

    Raises:
        InputError: as `load_data`.
    """
    names = tuple(names)
    if isinstance(data, Data):
        return data
    if isinstance(data, (str, os.PathLike)):
        return load_data(data, names)
    if isinstance(data, Mapping):
        whole = {name: np.asarray(array) for name, array in data.items()}
        _require_names("arrays", names, whole)
        lengths = [len(whole[name]) for name in names if whole[name].ndim]
        return Data("arrays", names, lengths[0] if lengths else None, lambda _: iter([whole]))
    return Data("batches", names, _count(data, names), lambda _: _arrays_of("batches", data))


def _count(batches: Iterable[Any], names: tuple[str, ...]) -> int | None:
    """How many samples are in a sequence of batches; None where it is none, or not of its form."""
    if not isinstance(batches, Sequence) or not names:
        return None
    firsts: list[Any] = [
        each.get(names[0]) if isinstance(each, Mapping) else None for each in batches
    ]
    shapes = [np.shape(first) for first in firsts]
    return sum(shape[0] for shape in shapes) if all(shapes) else None


# Files.


def _from_columns(source: str, names: tuple[str, ...], columns: Mapping[str, Column]) -> Data:
    _require_names(source, names, columns)
    wanted = {name: columns[name] for name in (*names, LABELS) if name in columns}
    for column in wanted.values():
        if column.dtype.kind not in "biuf" or column.row_bytes > MAX_SAMPLE_BYTES:
            raise InputError(
                f"{column.where} cannot be used as data",
                [
                    f"expected numbers, at most {MAX_SAMPLE_BYTES} bytes a sample",
                    f"got dtype {column.dtype}, {column.row_bytes} bytes a sample",
                ],
                "save numeric arrays with one sample per index of axis 0",
            )
    lengths = {name: column.shape[0] if column.shape else -1 for name, column in wanted.items()}
    count = _require_lengths(source, names, lengths)

    def read(size: int) -> Iterator[Arrays]:
        with ExitStack() as stack:
            single = {name: column.number() for name, column in wanted.items() if not column.shape}
            streams = {
                name: column.rows(size, stack) for name, column in wanted.items() if column.shape
            }
            for first in zip(*streams.values(), strict=True):
                yield single | dict(zip(streams, first, strict=True))

    return Data(source, names, count, read)


# Functions.


def import_function(spec: str, what: str, fix: str) -> Callable[..., Any]:
    """The function that the user named as `module:function`.

    Args:
        spec: its name; the module is looked for in the working directory too.
        what: it is to the user, such as "data".
        fix: which function is expected, as in "name a function without arguments".

    Raises:
        InputError: there is none.
    """
    module, _, function = spec.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (ImportError, SyntaxError) as error:
        raise InputError(
            f"cannot import {what} {spec}",
            [f"{type(error).__name__}: {error}"],
            f"make `python -c 'import {module}'` work here, or give a path that exists",
        ) from error
    if not callable(found):
        raise InputError(
            f"no {what} function {spec}", [f"module {module} has no function {function!r}"], fix
        )
    return found  # type: ignore[no-any-return]


def _from_function(
    source: str, names: tuple[str, ...], function: Callable[[], Iterable[Any]]
) -> Data:
    return Data(source, names, None, lambda _: _arrays_of(source, function()))


def _arrays_of(source: str, batches: Iterable[Any]) -> Iterator[Arrays]:
    if not isinstance(batches, Iterable):
        raise InputError(
            f"data {source} is not batches",
            [f"expected an iterable of dicts of arrays, got {type(batches).__name__}"],
            "yield dicts such as {'x': array}",
        )
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise InputError(
                f"batch {index} of data {source} is not a dict",
                [f"expected a dict of arrays, got {type(batch).__name__}"],
                "yield dicts such as {'x': array}",
            )
        yield {str(name): np.asarray(array) for name, array in batch.items()}


def _part(array: Array, start: int, end: int) -> Array:
    """Samples `start` to `end`; of a number without axes, as many copies."""
    return array[start:end] if array.ndim else np.broadcast_to(array, (end - start,))


# Checks.


def _require_names(source: str, names: tuple[str, ...], got: Mapping[str, Any]) -> None:
    missing = [name for name in names if name not in got]
    if missing:
        raise InputError(
            f"data {source} has no array for input {missing[0]!r}",
            [f"expected arrays {', '.join(names)}", f"got {', '.join(got) or 'none'}"],
            _FIX_NAMES.format(_as_keyword(missing[0])),
        )


def _as_keyword(name: str) -> str:
    """How an array of this name is handed to numpy.savez."""
    return f"{name}=..." if name.isidentifier() else f"**{{{name!r}: ...}}"


def _require_lengths(source: str, names: tuple[str, ...], lengths: Mapping[str, int]) -> int:
    used = {name: lengths[name] for name in (*names, LABELS) if name in lengths}
    if not used:
        raise InputError(
            f"data {source} has no arrays", ["the model has no inputs"], "check the model"
        )
    counted = {name: size for name, size in used.items() if size >= 0 or name == LABELS}
    if len(set(counted.values())) != 1 or min(counted.values()) < 0:
        found = ", ".join(
            f"{name} {size if size >= 0 else '(a scalar)'}" for name, size in used.items()
        )
        raise InputError(
            f"arrays of data {source} do not match",
            ["expected the same number of samples along axis 0 of each", f"got {found}"],
            "give each input and the labels one entry per sample; where axis 0 of an input is no "
            "batch, put an axis in front that counts the samples",
        )
    length = next(iter(counted.values()))
    if length == 0:
        raise InputError(
            f"data {source} holds no samples",
            ["expected at least 1 sample, got 0"],
            "give some hundred samples of what the model will see",
        )
    return length


def _require_finite(source: str, name: str, array: Array, start: int) -> None:
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"array {name!r} of data {source} is not numeric",
            [f"expected numbers, got dtype {array.dtype}"],
            "yield numeric arrays",
        )
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return
    bad = ~np.isfinite(array)
    sample, *rest = (int(i) for i in np.argwhere(bad)[0])
    value = array[(sample, *rest)]
    index = ", ".join(map(str, (start + sample, *rest)))
    raise InputError(
        f"data {source} is not finite: {name}[{index}] is {value}",
        [f"expected finite numbers, got {int(bad.sum())} NaN or infinite values in this batch"],
        "mend or drop these samples",
    )
