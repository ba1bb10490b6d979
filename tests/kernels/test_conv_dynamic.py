"""Integer products of rows that carry their scale: equal to the definition bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.kernels.harness import GUARD, MARGIN, Case, make, targets
from twofour.core.abi import SLACK_BYTES
from twofour.core.dynamic import ROW_ZERO
from twofour.core.functions import NO_ACTIVATION, Activation
from twofour.core.numerics import Window, convolve, requantize
from twofour.core.target import Target
from twofour.kernels.cpu.llvm import Source, compile_object
from twofour.kernels.cpu.problem import ConvProblem, Strides
from twofour.kernels.cpu.quantize_rows import row_tail
from twofour.kernels.cpu.tactic import tactics
from twofour.runtime.cpu import Code, address, allocate

TARGETS = targets()
PATTERNS = {
    "": ("dense", "dense sdot"),
    "2:4": ("2:4 H", "2:4 C", "2:4 tbl"),
    "2:4/pair": ("2:4 pair", "2:4 pair tbl"),
}
# Rows around tiles, channels around what formats take at once, outputs around the blocks.
SIZES = [(1, 4, 16), (5, 33, 32), (29, 64, 48), (7, 130, 24)]
SPARSE_SIZES = [(1, 8, 32), (5, 36, 32), (29, 64, 64), (7, 132, 32)]


@dataclass(frozen=True)
class Rows:
    """A product whose rows carry scales and zero points.

    Attributes:
        case: the product, x as stored.
        form: "row" or "tensor".
        scale: float32 [rows, 1].
        zero: int32 [rows, 1]; that of a row is known beforehand.
    """

    case: Case
    form: str
    scale: np.ndarray
    zero: np.ndarray

    @staticmethod
    def of(form: str, size: tuple[int, int, int], **options) -> Rows:
        rows, k, n = size
        random = np.random.default_rng(rows)
        window = Window((1, 1))
        case = make(random, batch=rows, height=1, width=1, c=k, n=n, window=window, **options)
        scale = random.uniform(0.01, 3, (rows, 1)).astype(np.float32)
        zero = random.integers(0, 256, (rows, 1)).astype(np.int32)
        return Rows(case, form, scale, np.full_like(zero, ROW_ZERO) if form == "row" else zero)

    @property
    def problem(self) -> ConvProblem:
        (rows, _, _, k), pixel = self.case.x.shape, row_tail(self.case.x.shape[-1])[1]
        assert self.case.problem().out_h == rows
        column = Strides(rows * pixel, pixel, pixel)
        return replace(self.case.problem(), x=column, c=k, dynamic=self.form)

    def expected(self) -> np.ndarray:
        case = self.case
        sums = convolve(case.x, case.w, case.window).astype(np.int32)
        zero = self.zero[:, None, None]
        sums = sums - zero * case.w.reshape(case.w.shape[0], -1).sum(1, dtype=np.int32)
        return requantize(sums, case.epilogue, case.residual, self.scale[:, None, None])

    def stored(self) -> np.ndarray:
        """The rows with their tails, garbage in between."""
        rows, k = self.case.x.reshape(len(self.scale), -1).shape
        begin, pixel = row_tail(k)
        memory = allocate(rows * pixel + SLACK_BYTES)
        memory[:] = GUARD
        body = memory[: rows * pixel].reshape(rows, pixel)
        body[:, :k] = self.case.x.reshape(rows, k)
        body[:, begin : begin + 4] = self.scale.view(np.uint8)
        body[:, begin + 4 : begin + 8] = self.zero.view(np.uint8)
        return memory


def run(one: Rows, target: Target, pattern: str) -> list[np.ndarray]:
    """The results of the tactics of a pattern in all their configurations."""
    problem, case = one.problem, one.case
    chosen = [t for t in tactics() if t.dtype == "int8" and t.name in PATTERNS[pattern]]
    chosen = [t for t in chosen if t.is_for(target.isa)]
    options = [
        (tactic, config)
        for tactic in chosen
        if not tactic.refuse(problem, case.w, target.isa)
        for config in tactic.configs(problem, target.isa)
    ]
    texts = [t.kernel.emit(f"k{i}_", problem, c, target.isa) for i, (t, c) in enumerate(options)]
    code = Code([compile_object([Source(text) for text in texts], target)])
    x, results = one.stored(), []
    for index, (tactic, config) in enumerate(options):
        zero = ROW_ZERO if one.form == "row" else 1
        packed = tactic.kernel.pack(case.w, problem, config, case.epilogue, zero)
        weights = allocate(packed.size + SLACK_BYTES)
        weights[: packed.size] = packed
        want = one.expected()
        y = np.full(2 * MARGIN + want.nbytes, GUARD, np.uint8)
        r = case.residual if case.residual is not None else x
        begin = (address(x), address(weights), address(y) + MARGIN, address(r))
        pieces, panels = tactic.kernel.work(problem, config)
        code.kernel(f"k{index}_")(*begin, 0, pieces, 0, panels)
        assert (y[:MARGIN] == GUARD).all()
        assert (y[-MARGIN:] == GUARD).all()
        results.append(y[MARGIN:-MARGIN].view(np.float32).reshape(want.shape))
    return results


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("form", ["row", "tensor"])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_tactic_is_the_definition(target, form, pattern) -> None:
    tried = 0
    for size in SPARSE_SIZES if pattern else SIZES:
        one = Rows.of(form, size, pattern=pattern, out="float32")
        for got in run(one, target, pattern):
            np.testing.assert_array_equal(got, one.expected())
            tried += 1
    assert tried


@pytest.mark.parametrize("activation", [NO_ACTIVATION, Activation("Relu"), Activation("Gelu")])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_residual_and_activation(target, activation) -> None:
    for form in ("row", "tensor"):
        one = Rows.of(form, (9, 36, 32), out="float32", add="float32", activation=activation)
        for got in run(one, target, ""):
            np.testing.assert_array_equal(got, one.expected())


def test_the_scale_of_a_row_is_read() -> None:
    one = Rows.of("row", (5, 36, 32), out="float32")
    other = replace(one, scale=one.scale * np.float32(2))
    (first, *_), (second, *_) = (run(each, TARGETS[0], "") for each in (one, other))
    assert (first != second).any()
