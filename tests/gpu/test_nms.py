"""Suppression of boxes on a GPU: exactly the rows of the definition."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from tests.compiler.engines import reference
from tests.compiler.test_build_detection import detector, image
from tests.gpu.launch import capability, launch, median_us, prepared
from tests.kernels.cuda.nms_cases import check_nms, operands
from twofour.compiler.build import build
from twofour.core.suppression import Suppression
from twofour.kernels.cuda.kernel import Recipe
from twofour.kernels.cuda.nms import NmsProblem, recipes
from twofour.runtime.session import Session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is here"),
]


def run(recipe: Recipe, tensors: Mapping[str, torch.Tensor]) -> None:
    launch(recipe, tensors, capability())


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_the_rows_are_those_of_the_definition(centred: bool, ties: bool) -> None:
    for sizes in ((2, 3, 900), (1, 2, 8400)):
        boxes, scores = operands(sizes, 3, ties=ties, centred=centred)
        how = Suppression(50, 0.45, 0.2, centred)
        check_nms(boxes, scores, how, run, effort=0, device="cuda")


def test_how_fast_it_is() -> None:
    """As detectors have it: 80 classes, 8400 places, few scores above the threshold."""
    boxes, scores = operands((1, 80, 8400), 0, ties=False, centred=False)
    how = Suppression(100, 0.5, 2.5)
    kinds = ("float32", 33600, 4, 1), ("float32", 80 * 8400, 8400, 1)
    problem = NmsProblem(1, 80, 8400, *kinds, how)
    tensors = {"boxes": torch.from_numpy(boxes).cuda(), "scores": torch.from_numpy(scores).cuda()}
    tensors["y"] = torch.zeros(80 * problem.most, 3, dtype=torch.int64, device="cuda")
    tensors["count"] = torch.zeros(1, dtype=torch.int64, device="cuda")
    for recipe in recipes(problem, capability()):
        us = median_us(prepared(recipe, tensors, capability()), repeats=3, rounds=3)
        print(f"  nms 80 x 8400, {tensors['count'].item()} left, {recipe.config:28} {us:9.1f} us")


@pytest.mark.parametrize("seed", [1, 2])
def test_a_detector_gives_as_many_rows_as_there_are(seed: int) -> None:
    model = detector()
    with Session(build(model, target="cuda", tuning_effort=0)) as session:
        rows = session.run(image(seed))["chosen"]
    wanted = reference(model, image(seed))["chosen"]
    assert rows.shape == wanted.shape
    assert (rows == wanted).all()
