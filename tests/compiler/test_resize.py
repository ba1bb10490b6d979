"""Linear resizing of images, natively, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from tests.compiler.engines import reference, run_twice, steps
from tests.graphs import graph
from twofour.compiler.build import build
from twofour.compiler.native import NotNative
from twofour.compiler.native_resize import read_linear

RANDOM = np.random.default_rng(0)
MODES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")


def network(channels: int, attributes: str, scales: tuple[float, float], size: tuple[int, int]):
    """A convolution, what is resized, and another convolution."""
    shape = f"float[2,{channels},{size[0]},{size[1]}]"
    return graph(
        f"(float[2,3,5,7] x) => ({shape} y) {{ a = Conv (x, u)"
        f' b = Resize <mode = "linear", {attributes}> (a, , scales) y = Conv (b, v) }}',
        u=RANDOM.normal(size=(channels, 3, 1, 1)).astype(np.float32),
        v=RANDOM.normal(size=(channels, channels, 1, 1)).astype(np.float32),
        scales=np.array([1, 1, *scales], np.float32),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("channels", "scales", "size"),
    [
        (16, (2, 2), (10, 14)),
        (5, (3, 1), (15, 7)),
        (33, (1.6, 0.5), (8, 3)),
        (1, (0.2, 4), (1, 28)),
    ],
)
def test_any_scale(
    mode: str, channels: int, scales: tuple[float, float], size: tuple[int, int]
) -> None:
    model = network(channels, f'coordinate_transformation_mode = "{mode}"', scales, size)
    inputs = {"x": RANDOM.normal(size=(2, 3, 5, 7)).astype(np.float32)}
    engine = build(model, tuning_effort=0)
    assert steps(engine) == [("native", ["Conv", "Resize", "Conv"])]
    got, want = run_twice(engine, inputs)["y"], reference(model, inputs)["y"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_several_threads_and_batches() -> None:
    model = network(16, 'coordinate_transformation_mode = "half_pixel"', (2, 2), (10, 14))
    inputs = {"x": RANDOM.normal(size=(2, 3, 5, 7)).astype(np.float32)}
    engine = build(model, tuning_effort=0)
    one, two = run_twice(engine, inputs, 1)["y"], run_twice(engine, inputs, 2)["y"]
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ("antialias = 1", "no antialiasing"),
        ('coordinate_transformation_mode = "half_pixel_symmetric"', "no coordinates"),
        ('keep_aspect_ratio_policy = "not_larger"', "aspect ratio"),
    ],
)
def test_what_is_left_to_onnx_runtime(attributes: str, reason: str) -> None:
    model = graph(
        f'(float[1,4,6,6] x) => (float[1,4,12,12] y) {{ y = Resize <mode = "linear", {attributes}>'
        " (x, , , sizes) }",
        opset=19,
        sizes=np.array([1, 4, 12, 12]),
    )
    with pytest.raises(NotNative, match=reason):
        read_linear(model.graph[0])
