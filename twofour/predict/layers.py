"""Each layer of a model in all its forms: what its dense and its sparse kernels take.

The plans of the forms name layers alike. A form that ONNX Runtime runs faster as a whole has no
layers: what is known of its kernels then comes from the other forms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from twofour.compiler.explain import FALLBACK
from twofour.compiler.forms import Form
from twofour.compiler.whole import OP_TYPE
from twofour.core.plan import IN_FLOAT32, is_sparse
from twofour.engine import Layer, Plan, Work

Plans = Mapping[Form, Plan]


@dataclass(frozen=True)
class Pruned:
    """A layer with a pattern, in one precision.

    Attributes:
        pattern: "2:4" or "2:4/pair".
        sparse_us: of its best sparse kernel; None where it has none.
        chosen_us: of what its engine takes: a dense kernel where sparse ones are slower.
    """

    pattern: str
    sparse_us: float | None
    chosen_us: float | None


@dataclass(frozen=True)
class Times:
    """A layer's kernels in one precision.

    Attributes:
        precision: of the model's form: "f32", "bf16" or "int8".
        computes_in: what the layer really computes in there: "float32", "bfloat16" or "int8".
        dense_us: of its best dense kernel; None where none was timed.
        pruned: with each pattern that was built.
    """

    precision: str
    computes_in: str
    dense_us: float | None
    pruned: tuple[Pruned, ...]

    def to(self, pattern: str) -> Pruned:
        """With a pattern; without times where it was not built."""
        none = Pruned(pattern, None, None)
        return next((each for each in self.pruned if each.pattern == pattern), none)


@dataclass(frozen=True)
class LayerTimes:
    """A layer of the model.

    Attributes:
        name: as plans call it.
        nodes: of the imported model that it computes.
        op: the fused operator in the first form.
        shape: in words.
        share: of the time of all layers in the first form, 0 to 1; None if it was not timed.
        times: for each precision that it has kernels of ours in.
        work: what its kernel does in each precision, a dense one where that is known.
        depthwise: each output channel reads one input channel.
        fallback: why it runs on ONNX Runtime; "" if it does not.
    """

    name: str
    nodes: tuple[str, ...]
    op: str
    shape: str
    share: float | None
    times: tuple[Times, ...]
    work: dict[str, Work]
    depthwise: bool
    fallback: str

    def at(self, precision: str) -> Times | None:
        """Its times in a precision."""
        return next((times for times in self.times if times.precision == precision), None)


def layer_times(plans: Plans, nodes: Sequence[str]) -> tuple[LayerTimes, ...]:
    """Every layer with a weight, in the order they run in.

    Args:
        plans: of all forms that were built; those of one precision begin with the dense one.
        nodes: names of the prunable nodes, in order.
    """
    own = {form: plan for form, plan in plans.items() if not _is_whole(plan)}
    by_name = {form: {layer.name: layer for layer in plan.layers} for form, plan in own.items()}
    if not own:
        why = _reason(next(iter(plans.values())).layers[0])
        return tuple(LayerTimes(n, (n,), "", "", None, (), {}, False, why) for n in nodes)
    first = next(iter(own.values()))
    whole_us = sum(layer.time_us or 0.0 for layer in first.layers)
    shown = [layer for layer in first.layers if layer.pattern or layer.name in nodes]
    return tuple(
        LayerTimes(
            layer.name,
            tuple(name for name in layer.source if name in nodes),
            layer.op,
            layer.shape,
            layer.time_us / whole_us if layer.time_us is not None and whole_us else None,
            tuple(_times(layer.name, by_name)),
            {
                form.precision: layers[layer.name].work
                for form, layers in reversed(by_name.items())
                if layer.name in layers
            },
            layer.tactic.startswith("depthwise"),
            _reason(layer) if layer.tactic == FALLBACK else "",
        )
        for layer in shown
    )


def _is_whole(plan: Plan) -> bool:
    """Whether ONNX Runtime runs all of it as one layer."""
    return [layer.op for layer in plan.layers] == [OP_TYPE]


def _reason(layer: Layer) -> str:
    return "; ".join(layer.notes) or "no kernel takes it"


def _times(name: str, by_name: Mapping[Form, Mapping[str, Layer]]) -> Iterable[Times]:
    """In each precision that has a time."""
    for precision in dict.fromkeys(form.precision for form in by_name):
        forms = {
            form.pattern: layers[name]
            for form, layers in by_name.items()
            if form.precision == precision and name in layers
        }
        if not forms or any(layer.tactic == FALLBACK for layer in forms.values()):
            continue
        any_ = next(iter(forms.values()))
        # Dense kernels compete in every form: where the dense one runs on ONNX Runtime, there.
        dense_us = forms[""].time_us if "" in forms else _best(any_, sparse=False)
        pruned = (
            Pruned(pattern, _best(layer, sparse=True), layer.time_us)
            for pattern, layer in forms.items()
            if pattern
        )
        yield Times(precision, any_.precision, dense_us, tuple(pruned))


def _best(layer: Layer, *, sparse: bool) -> float | None:
    """Of the kernels that skip zeros, or of the others."""
    own = [c for c in layer.candidates if not c.tactic.endswith(IN_FLOAT32)]
    times = [c.time_us for c in own if is_sparse(c.tactic) == sparse and c.time_us is not None]
    return min(times, default=None)
