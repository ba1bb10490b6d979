"""Products in bfloat16 beside their float32 forms: which layers are faster in float32.

Where bfloat16 is allowed, every product is timed in both. What a form needs around it counts: a
float32 tensor is rounded for a product in bfloat16, unless others read it rounded too, and a tensor
that is held in bfloat16 is made float32 for a product in float32. A layer that loses stays float32
when the network is compiled again, which is kept if all layers together are faster then (build.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from twofour.compiler.layout import Tensor
from twofour.compiler.lower import Section
from twofour.compiler.native import ConvOp
from twofour.compiler.trial import Array, Packed, interleaved, timer_of
from twofour.compiler.tune import Tuner, rounded
from twofour.core.abi import SLACK_BYTES
from twofour.core.memory import address, allocate
from twofour.core.plan import IN_FLOAT32
from twofour.core.sizes import usual
from twofour.engine import Candidate, Layer
from twofour.kernels.cpu.llvm import TOOLS, Source, compile_object
from twofour.kernels.cpu.pointwise import MapConstants, MapProblem, emit_map
from twofour.kernels.cpu.problem import ConvProblem
from twofour.kernels.cpu.program import threads_text
from twofour.kernels.cpu.tactic import Tactic
from twofour.runtime.cpu import Code

_EFFORT = 1  # the best guess of each tactic: a form that is ahead is ahead by more than a tile's
WORTH = 0.97  # of the time: less than this gain is within what measuring twice gives
_ROUNDS = 5


@dataclass(frozen=True)
class FloatForm:
    """A product in bfloat16 as it would be in float32.

    Attributes:
        op: the product.
        problem: in float32.
        w: its weights as kernels take them.
        x: what it reads.
        wide: the same in float32.
    """

    op: ConvOp
    problem: ConvProblem
    w: Array
    x: Tensor
    wide: Tensor


@dataclass(frozen=True)
class Rival:
    """Both times of a product.

    Attributes:
        layer: its name.
        x: the value it reads.
        bf16_us: in bfloat16, without the rounding of x.
        float_us: in float32, with what it takes to make x float32 where that is held in bfloat16.
    """

    layer: str
    x: str
    bf16_us: float
    float_us: float


@dataclass
class Rivals:
    """The products of one engine that are in bfloat16, as they are met.

    Attributes:
        tuner: times the float32 forms.
        found: what was timed.
        casts: of each value that a Cast rounds, the layers that do it; none where the Cast reads
            the caller's array, which a product in float32 has copied as well.
    """

    tuner: Tuner
    found: list[Rival] = field(default_factory=list)
    casts: dict[str, list[int]] = field(default_factory=dict)

    @staticmethod
    def beside(tuner: Tuner) -> Rivals:
        """None found yet; to be timed for as many threads as `tuner` times for."""
        cold_bytes = tuner.cold_bytes
        quick = Tuner(
            tuner.target, tuner.cache, tuner.threads, cold_bytes=cold_bytes, effort=_EFFORT
        )
        return Rivals(quick)

    def time(
        self, form: FloatForm, bf16_us: float, wanted: Callable[[Tactic], str]
    ) -> tuple[Candidate, ...]:
        """Times the float32 form of a product and remembers both times.

        Args:
            form: the float32 form.
            bf16_us: of the kernel in bfloat16 that was chosen.
            wanted: why a tactic is not to be considered ("" if it is).

        Returns:
            The float32 kernels, for the report.
        """
        op = form.op
        chosen, candidates = self.tuner.choose(form.problem, form.w, op.epilogue, 0, wanted)
        assert chosen.time_us is not None
        extra_us = 0.0
        if op.x not in self.casts and chosen.time_us < bf16_us:
            extra_us = self._conversion_us(form)
        self.found.append(Rival(op.name, op.x, bf16_us, chosen.time_us + extra_us))
        return tuple(
            Candidate(each.tactic + IN_FLOAT32, each.config, rounded(each.time_us + extra_us))
            for each in candidates
            if each.time_us is not None
        )

    def _conversion_us(self, form: FloatForm) -> float:
        """The time to make x float32."""
        x, tuner = form.x, self.tuner
        images = usual(x.count)
        views = (x.view, form.wide.view)
        text = emit_map(
            "kernel", MapProblem("convert", images, x.height, x.width, x.channels, *views)
        )
        parts = json.dumps([text, tuner.target.to_json(), TOOLS])
        key = hashlib.sha256(parts.encode()).hexdigest()[:32]
        if key not in tuner.cache.times_us:
            sources = [Source(text, vectorize=True), Source(threads_text(tuner.target.arch))]
            code = Code([compile_object(sources, tuner.target)])
            held, wide = (allocate(images * view.image + SLACK_BYTES, huge=True) for view in views)
            constants = MapConstants().pack()
            packed = Packed(allocate(constants.size + SLACK_BYTES), 0, 1)
            packed.memory[: constants.size] = constants
            pointers = tuple(address(memory) for memory in (held, packed.memory, wide, wide))
            run = timer_of(code, "kernel", (*pointers, 0, images * x.height, 0, 1), packed)
            tuner.cache.times_us |= interleaved({key: run}, _ROUNDS)
        return tuner.cache.times_us[key]

    def faster_in_float(
        self, layers: Sequence[Layer], sections: Iterable[Section]
    ) -> dict[str, str]:
        """The products that should stay float32, each with the reason.

        Args:
            layers: of the plan, with their times.
            sections: of all profiles.
        """
        readers: dict[str, set[str]] = {}
        for section in sections:
            for name in section.outputs:
                readers.setdefault(name, set()).add("")
            for placed in section.ops:
                for name in placed.op.reads:
                    readers.setdefault(name, set()).add(placed.op.name)
        reasons: dict[str, str] = {}
        for x in dict.fromkeys(rival.x for rival in self.found):
            group = [rival for rival in self.found if rival.x == x]
            cast_us = sum(layers[i].time_us or 0.0 for i in self.casts.get(x, ()))
            names = {rival.layer for rival in group}
            if readers[x] == names and (both := _reason(group, cast_us)):
                reasons |= dict.fromkeys(names, both)
                continue
            alone = {name: _reason([r for r in group if r.layer == name], 0.0) for name in names}
            reasons |= {name: reason for name, reason in alone.items() if reason}
        return reasons


def _reason(group: Sequence[Rival], cast_us: float) -> str:
    """Why products of one input, and its rounding if no other needs it, are faster in float32."""
    floats = sum(rival.float_us for rival in group)
    halves = sum(rival.bf16_us for rival in group) + cast_us
    if floats >= WORTH * halves:
        return ""
    cost = f", {cast_us:.2f} of it to round its input" if cast_us else ""
    return f"float32 takes {floats:.2f} us, bfloat16 {halves:.2f}{cost}"
