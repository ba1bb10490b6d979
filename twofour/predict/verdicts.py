"""Whether a layer is worth pruning, and why not: judged for one form of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from twofour.compiler.forms import Form
from twofour.engine import Work
from twofour.predict.layers import LayerTimes

LEAST_GAIN = 1.05
"""Times as fast: less is within what measuring twice gives, and costs accuracy all the same."""
LEAST_SAVED = 0.001
"""Of a run."""
_SHORT_K = 128
_LANES = 16
_MEMORY_BOUND = 0.5  # of a layer's time, to copy its activations within L2


@dataclass(frozen=True)
class Verdict:
    """One layer.

    Attributes:
        layer: its name.
        pays: whether it is worth pruning.
        dense_us: of its best dense kernel; None where none was timed.
        sparse_us: of its best sparse kernel; None where none was timed.
        saves: share of a dense run that pruning it saves, 0 to 1; 0 where sparse is slower.
        reason: why it is not worth it; "" where it is.
    """

    layer: str
    pays: bool
    dense_us: float | None
    sparse_us: float | None
    saves: float
    reason: str


@dataclass(frozen=True)
class Court:
    """What verdicts are made by.

    Attributes:
        form: that the model is to have.
        run_us: of the layers of its dense form together.
        refusals: why nodes cannot be pruned to its pattern, by name.
        copy_gbps: bytes in and out together that a core moves within L2; infinity where that is
            not known, as on a GPU.
    """

    form: Form
    run_us: float
    refusals: Mapping[str, str]
    copy_gbps: float

    def judge(self, layer: LayerTimes) -> Verdict:
        """Whether a layer is worth pruning."""
        times = layer.at(self.form.precision)
        dense = times.dense_us if times else None
        sparse = times.to(self.form.pattern).sparse_us if times else None
        saves = max(dense - sparse, 0.0) / self.run_us if dense and sparse else 0.0
        reason = self._refusal(layer, sparse)
        if not reason and dense and sparse:
            reason = self._loss(layer.work[self.form.precision], dense, sparse)
        return Verdict(layer.name, not reason, dense, sparse, saves, reason)

    def _refusal(self, layer: LayerTimes, sparse: float | None) -> str:
        """Why there is no sparse kernel; "" where there is one."""
        if layer.fallback:
            return f"runs on ONNX Runtime: {layer.fallback}"
        if layer.depthwise:
            return "depthwise: a channel reads one input channel only"
        if found := [self.refusals[node] for node in layer.nodes if node in self.refusals]:
            return found[0]
        return "" if sparse else "no sparse kernel takes it"

    def _loss(self, work: Work, dense: float, sparse: float) -> str:
        """Why its sparse kernel gains too little; "" where it gains enough."""
        if dense < LEAST_GAIN * sparse:
            cause = self._cause(work, dense)
            return f"dense kernels are as fast{': ' * bool(cause)}{cause}"
        if dense - sparse < LEAST_SAVED * self.run_us:
            return f"saves less than {LEAST_SAVED:.1%} of a run"
        return ""

    def _cause(self, work: Work, dense: float) -> str:
        """What the layer's time goes to instead of multiply-adds."""
        if work.moved_bytes / (self.copy_gbps * 1e3) > _MEMORY_BOUND * dense:
            return "memory-bound on activations"
        if 0 < work.k < _SHORT_K:
            return f"sums of {work.k} products are short"
        if work.channels % _LANES:
            return f"{work.channels} output channels leave lanes idle"
        return ""
