"""Joining requests and cutting results apart are inverses, whatever an engine takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.engines import image, image_engine, text, text_engine
from twofour.core.errors import InputError
from twofour.core.plan import Plan, TensorInfo
from twofour.serve.errors import MalformedError
from twofour.serve.models.queue import Job
from twofour.serve.models.rows import Layout
from twofour.serve.repository.config import Batching

TEXTS = Batching.model_validate(
    {"lengths": {"inputs": {"ids": 1, "mask": 1}, "buckets": [4, 8], "pad": {"ids": 7}}}
)


def job(layout: Layout, inputs: dict[str, Any]) -> Job:
    place = layout.place(inputs)
    return Job(inputs, place.rows, place.length, place.key, 1, 0, None, lambda _: None)


def fixed_plan() -> Plan:
    """A network for 2 rows of length 8, or 4 of length 16, and nothing else."""
    plan = text_engine().plan
    profiles = [
        replace(
            plan.profiles[0],
            inputs=(
                TensorInfo("ids", "int64", (rows, length)),
                TensorInfo("mask", "float32", (rows, length)),
            ),
            outputs=(
                TensorInfo("tokens", "float32", (rows, length, 4)),
                TensorInfo("mean", "float32", (rows, 4)),
            ),
            symbols=(),
        )
        for rows, length in ((2, 8), (4, 16))
    ]
    return replace(plan, profiles=tuple(profiles))


def test_rows_come_from_the_engine() -> None:
    assert Layout(image_engine().plan, Batching()).most_rows == 8
    assert Layout(image_engine().plan, Batching(max_size=3)).most_rows == 3
    with pytest.raises(InputError, match=r"max_size is 9, and the engine takes 8"):
        Layout(image_engine().plan, Batching(max_size=9))


def test_lengths_that_the_engine_has_not() -> None:
    for lengths in ({"inputs": {"idz": 1}}, {"inputs": {"ids": 2}}):
        with pytest.raises(InputError, match=r"batching\.lengths.inputs names"):
            Layout(text_engine().plan, Batching.model_validate({"lengths": lengths}))
    outputs = {"inputs": {"ids": 1}, "outputs": {"z": 1}}
    with pytest.raises(InputError, match=r"batching\.lengths.outputs names z"):
        Layout(text_engine().plan, Batching.model_validate({"lengths": outputs}))


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({}, "not those of the model"),
        ({**image(), "z": np.zeros(1)}, "not those of the model"),
        ({"z": np.zeros(1, np.float32)}, "not those of the model"),
        ({"x": np.zeros((1, 4, 6, 6))}, "got float64"),
        ({"x": np.zeros((0, 4, 6, 6), np.float32)}, "have none"),
        ({"x": np.zeros((9, 4, 6, 6), np.float32)}, "at most 8"),
        ({"x": np.zeros((1, 4, 6), np.float32)}, "expected 4 dimensions, got 3"),
        ({"x": np.zeros((), np.float32)}, "too few dimensions"),
        ({"x": np.zeros((1, 4, 6, 7), np.float32)}, r"x\[3\]: expected 6, got 7"),
    ],
)
def test_refusals(inputs: dict[str, Any], reason: str) -> None:
    with pytest.raises(MalformedError, match=reason):
        Layout(image_engine().plan, Batching()).place(inputs)


def test_inputs_have_to_agree() -> None:
    layout = Layout(text_engine().plan, TEXTS)
    ids, mask = text(2, 5)["ids"], text(2, 5)["mask"]
    with pytest.raises(MalformedError, match="disagree on their rows"):
        layout.place({"ids": ids, "mask": mask[:1]})
    with pytest.raises(MalformedError, match="disagree on their length"):
        layout.place({"ids": ids, "mask": mask[:, :4]})
    with pytest.raises(MalformedError, match="from 1 to 16, got 17"):
        layout.place(text(1, 17))


def test_buckets_decide_who_shares_a_batch() -> None:
    layout = Layout(text_engine().plan, TEXTS)
    keys = {length: layout.place(text(1, length)).key for length in (1, 4, 5, 8, 9, 10)}
    assert keys[1] == keys[4] != keys[5] == keys[8] != keys[9] != keys[10]


def test_shapes_of_so_many_rows() -> None:
    found = Layout(text_engine().plan, TEXTS).shapes_of_rows(3)
    assert found == {"ids": (3, 4), "mask": (3, 4)}, "of the usual length"
    assert Layout(fixed_plan(), TEXTS).shapes_of_rows(2) is None
    assert Layout(image_engine().plan, Batching(max_size=1)).shapes_of_rows(2) is None


def test_lengths_are_cut_without_batches_too() -> None:
    lengths = {"inputs": {"ids": 1, "mask": 1}, "outputs": {"tokens": 1}}
    alone = Batching.model_validate({"max_size": 1, "lengths": lengths})
    layout = Layout(fixed_plan(), alone)
    one = job(layout, text(1, 3))
    outputs = {"tokens": np.zeros((2, 8, 4)), "mean": np.zeros((2, 4))}
    (part,) = layout.split(outputs, [one])
    assert part["tokens"].shape == (1, 3, 4)


def test_one_request_goes_as_it_came() -> None:
    layout = Layout(image_engine().plan, Batching())
    inputs = image(3)
    assert layout.join([job(layout, inputs)])["x"] is inputs["x"]


def test_padding_up_to_what_the_engine_takes() -> None:
    layout = Layout(fixed_plan(), TEXTS)
    assert layout.most_rows == 4
    one = job(layout, text(1, 3))
    joined = layout.join([one])
    assert joined["ids"].shape == (2, 8)
    assert (joined["ids"][0, 3:] == 7).all()
    assert (joined["ids"][1] == 7).all()
    assert (joined["mask"][0] == [1, 1, 1, 0, 0, 0, 0, 0]).all()
    joined = layout.join([job(layout, text(1, 7)), job(layout, text(2, 8))])
    assert joined["ids"].shape == (4, 16), "the least profile that takes 3 rows of length 8"
    strict = Layout(fixed_plan(), TEXTS.model_copy(update={"pad": False}))
    strict.place(text(2, 8))
    with pytest.raises(MalformedError, match="do not fit the model"):
        strict.place(text(1, 8))


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(5, 8)), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_split_undoes_join(sizes: list[tuple[int, int]]) -> None:
    """A network that hands its input on: each request gets back what it sent."""
    layout = Layout(text_engine(most=16).plan, TEXTS)
    jobs = [job(layout, text(rows, length, i)) for i, (rows, length) in enumerate(sizes)]
    joined = layout.join(jobs)
    assert joined["ids"].shape == (sum(r for r, _ in sizes), max(n for _, n in sizes))
    tokens = np.repeat(joined["ids"][..., None], 4, axis=2)
    outputs = {"tokens": tokens, "mean": joined["mask"].sum(1, keepdims=True)}
    for one, part in zip(jobs, layout.split(outputs, jobs), strict=True):
        np.testing.assert_array_equal(part["tokens"][..., 0], one.inputs["ids"])
        np.testing.assert_array_equal(part["mean"][:, 0], one.inputs["mask"].sum(1))
