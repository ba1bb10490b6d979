"""The models of the onnx package's own backend test: what ONNX Runtime runs, builds and is equal.

Some two thousand models of one or a few operators. `-m slow` goes through all of them (some ten
minutes), otherwise a sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import onnxruntime as ort
import pytest
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase

from tests.compiler.test_any_model import session_of
from twofour.compiler.build import build
from twofour.compiler.second_opinion import ERRORS
from twofour.core.errors import UnsupportedError
from twofour.engine import DTYPES
from twofour.runtime.session import Session

# Float sums in another order, of values around 1; and tables of ONNX Runtime's own.
RTOL, ATOL = 1e-3, 1e-5
EVERY = 53
# Built for one shape each: a shape with a 0 is no shape of a profile.
EMPTY = "test_sequence_model8"


@cache
def node_models() -> list[TestCase]:
    """Those of one operator each; making them runs every operator in numpy."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return list(collect_testcases(None))


def file_models() -> Iterator[tuple[str, onnx.ModelProto, list[np.ndarray]]]:
    """Those of several operators, that stand in files."""
    folder = Path(onnx.backend.test.__file__).parent / "data"
    for path in sorted(folder.glob("*/*/model.onnx")):
        model, inputs = onnx.load(path), []
        for index, _ in enumerate(model.graph.input):
            file = path.parent / "test_data_set_0" / f"input_{index}.pb"
            if file.is_file():
                inputs.append(onnx.TensorProto.FromString(file.read_bytes()))
        if path.parent.name != EMPTY:
            yield path.parent.name, model, inputs


def feeds_of(model: onnx.ModelProto, arrays: list) -> dict[str, np.ndarray]:
    """Inputs by name; those of the files stand as tensors."""
    names = [value.name for value in model.graph.input]
    if len(arrays) < len(names):  # the others are initializers
        held = {tensor.name for tensor in model.graph.initializer}
        names = [name for name in names if name not in held]
    return {
        name: onnx.numpy_helper.to_array(a) if isinstance(a, onnx.TensorProto) else a
        for name, a in zip(names, arrays, strict=False)
    }


def check(name: str, model: onnx.ModelProto, arrays: list, folder: Path) -> str:
    """What became of it: "equal", or why it is none of ours."""
    onnx.save(model, folder / "m.onnx")
    try:
        session = session_of(folder / "m.onnx")
        feeds = feeds_of(model, arrays)
        want = session.run(None, feeds)
    except (*ERRORS, TypeError):
        return "ONNX Runtime refuses it"
    kinds = [_kind(end) for end in (*session.get_inputs(), *session.get_outputs())]
    shapes = {k: a.shape for k, a in feeds.items() if isinstance(a, np.ndarray) and a.size}
    if set(kinds) - DTYPES:
        with pytest.raises(UnsupportedError, match="an engine does not pass on"):
            build(model, shapes=shapes, tuning_effort=0)
        return "its inputs or outputs are of another kind"
    with Session(build(model, shapes=shapes, tuning_effort=0)) as own:
        got = own.run({k: np.asarray(a) for k, a in feeds.items()})
    assert list(got) == [end.name for end in session.get_outputs()], name
    for (end, ours), theirs in zip(got.items(), want, strict=True):
        theirs = np.asarray(theirs)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), (name, end)
        np.testing.assert_allclose(ours, theirs, RTOL, ATOL, err_msg=f"{name} {end}")
    return "equal"


def _kind(end: ort.NodeArg) -> str:
    """Numpy's name of its type."""
    name = end.type.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def models() -> list[tuple[str, onnx.ModelProto, list]]:
    """All of them."""
    nodes = [(case.name, case.model, case.data_sets[0][0]) for case in node_models()]
    return [*nodes, *file_models()]


def test_a_sample(tmp_path) -> None:
    found = [check(*each, tmp_path) for each in models()[::EVERY]]
    assert found.count("equal") >= len(found) / 2


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, EVERY))
def test_all_of_them(part, tmp_path) -> None:
    for each in models()[part::EVERY]:
        check(*each, tmp_path)
