"""Suppressions with random boxes, in the interpreter or on a GPU, compared with the definition."""

from __future__ import annotations

import numpy as np
import torch

from tests.kernels.cuda.interpret import Array
from tests.kernels.cuda.walk_cases import Runner
from twofour.core.suppression import Suppression, suppress
from twofour.kernels.cuda.nms import NmsProblem, recipes

GUARD = -77


def operands(
    sizes: tuple[int, int, int], seed: int, *, ties: bool, centred: bool
) -> tuple[Array, Array]:
    """Boxes [images, places, 4] and scores [images, classes, places].

    With ties, of few different values: equal scores, and boxes that are the same or have no area.
    """
    images, classes, places = sizes
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 6, (images, places, 4)).astype(np.float32)
    if centred:
        corners[..., 2:] /= 3
    scores = random.normal(0, 1, (images, classes, places)).astype(np.float32)
    if ties:
        corners, scores = np.round(corners), np.round(scores * 2) / 2
    return corners, scores


def check_nms(
    boxes: Array, scores: Array, how: Suppression, run: Runner, *, effort: int, device: str = "cpu"
) -> None:
    """All recipes: exactly the rows of the definition, and nothing written behind them."""
    images, classes, places = scores.shape
    # Scores as a network has them: the classes of a place side by side.
    across = np.ascontiguousarray(scores.transpose(0, 2, 1))
    problem = NmsProblem(
        *(images, classes, places, ("float32", 4 * places, 4, 1)),
        ("float32", places * classes, 1, classes), how,
    )  # fmt: skip
    wanted = suppress(boxes, scores, how)
    for recipe in recipes(problem, 90, effort=effort):
        y = torch.full((images * classes * problem.most + 1, 3), GUARD, device=device)
        count = torch.full((2,), GUARD, device=device)
        given = {"boxes": torch.from_numpy(boxes), "scores": torch.from_numpy(across)}
        given = {role: tensor.to(device) for role, tensor in given.items()}
        run(recipe, {**given, "y": y, "count": count})
        assert count.tolist() == [len(wanted), GUARD], recipe.config
        np.testing.assert_array_equal(y[: len(wanted)].cpu().numpy(), wanted, recipe.config)
        assert (y[len(wanted) :] == GUARD).all(), recipe.config
