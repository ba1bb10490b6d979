"""Weights to prune, of all shapes that matter to a pattern, half of them full of ties."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from twofour.core.patterns import Pattern

NAMES = ("2:4", "2:4/pair", "2:4/2d", "4:8", "1:4", "1:2/pair", "1:3/2d", "4:8/2d", "6:16")


@st.composite
def weights_with_pattern(draw, names=NAMES):
    """A float32 weight, half of the time with many equal values, and the name of its pattern."""
    name = draw(st.sampled_from(names))
    pattern = Pattern.parse(name)
    rows = draw(st.sampled_from((1, 16, 31, 32, 33, 48, 64, 80)))
    if pattern.both:
        rows = draw(st.integers(1, 5)) * pattern.m
    taps = draw(st.sampled_from(((), (1, 1), (3, 3), (2,))))
    shape = (rows, pattern.m * draw(st.integers(1, 3)), *taps)
    if draw(st.booleans()):
        random = np.random.default_rng(draw(st.integers(0, 999)))
        return random.standard_normal(shape, np.float32), name
    few = st.sampled_from((0.0, 1.0, -1.0, 2.0))
    return draw(arrays(np.float32, shape, elements=few, fill=few)), name
