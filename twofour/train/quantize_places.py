"""Decides which tensors of a traced model are quantized, and which share a scale.

The rules are those for ONNX files (`docs/quantize.md`), so that the file that is exported from a
model is quantized as its float file would be:

1. Each convolution, linear layer and product with a constant weight takes quantized activations
   and weights.
2. A residual sum takes a quantized shortcut. The convolution that ends in the sum, or whose
   activation does, hands over floats.
3. An average pooling before a layer of rule 1 takes quantized activations.
4. What only moves data before a quantized tensor moves quantized data: its inputs are quantized
   with the same scale. What is joined shares the scale that holds the values of each part.
5. Everything that reads a quantized tensor reads its rounded values, what the user excluded and
   the model's results excepted.
6. A sum that a normalization of rows reads stays float, and so do its operands.
7. Both products of an attention take quantized operands: q, k and v symmetric, the softmax with the
   range 0 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from twofour.core.errors import InputError
from twofour.core.ranges import Range
from twofour.train.attention_places import Attention, find_attention
from twofour.train.operators import (
    ACTIVATIONS,
    CONVOLUTIONS,
    FLOAT_WEIGHTED,
    Layer,
    fold_batchnorm,
    is_average,
    is_mover,
    is_normalized,
    is_sum,
    layer_of,
    moved_from,
    operand,
)
from twofour.train.quantize_plan import Places, QuantizerOptions, Read, ScalePlace, WeightPlace
from twofour.train.trace import Call, Graph, Value
from twofour.train.watch import Site

_NOT_CLAMPING = frozenset("silu gelu hardswish hardsigmoid sigmoid tanh mul multiply".split())
_PASSED_THROUGH = ("add", "mean")


def layer_name(layer: Layer) -> str:
    """That of the module which owns the weight, else that of the site."""
    parameter, site = layer.weight.parameter, str(layer.call.site)
    if parameter is None or not parameter.endswith("weight") or layer.call.site.call:
        return site
    owner = parameter.removesuffix(".weight")
    return owner if owner == layer.call.site.path or not owner else site


def place(graph: Graph, options: QuantizerOptions) -> Places:
    """Applies the rules above.

    Args:
        graph: as traced; BatchNorm is folded in it.
        options: of these, `add_inputs`, `attention`, `include` and `exclude` count here.

    Raises:
        InputError: nothing can be quantized, or a name pattern matches nothing.
    """
    calls = fold_batchnorm(graph.calls)
    found = {call: layer for call in calls if (layer := layer_of(call)) is not None}
    excluded = {call: why for call in calls if (why := _why_excluded(call, found, options))}
    _require_matches(calls, found, options)
    layers = {call: layer for call, layer in found.items() if call not in excluded}
    if not layers:
        raise _nothing(calls, excluded)
    stream = {call for call in calls if is_sum(call) and is_normalized(call.outputs[0])}
    wanted = [layer.x for layer in layers.values()]
    for call in calls:
        if call not in excluded and call not in stream:
            wanted += _add_inputs(call, layers, options) + _pool_input(call, layers)
    scales = _Scales(frozenset(excluded))
    for value in wanted:
        scales.take(value)
    attentions = _attentions(calls, excluded) if options.attention else []
    for attention in attentions:
        for value in (*attention.operands, attention.softmax):
            scales.alone(value)
    stay = set(excluded) | stream
    result = _Naming(graph, layers, stay).places(scales, attentions)
    result.stay_float = _reasons(calls, found, excluded, graph.composite)
    return result


def _attentions(calls: list[Call], excluded: Mapping[Call, str]) -> list[Attention]:
    """Rule 7, in the order that scales are taken."""
    found = [find_attention(call) for call in calls if call not in excluded]
    return [each for each in found if each is not None and each.product not in excluded]


def _add_inputs(call: Call, layers: Mapping[Call, Layer], options: QuantizerOptions) -> list[Value]:
    """Rule 2: the inputs of a residual sum that are quantized; none for any other call."""
    inputs = [value for value in call.inputs.values() if not value.constant]
    if not is_sum(call) or len(inputs) != 2 or inputs[0] is inputs[1]:
        return []
    if inputs[0].shape != inputs[1].shape or not all(value.floating for value in inputs):
        return []
    if _power_of(*inputs) or _power_of(*reversed(inputs)):
        return []  # x + c * x**3, part of an activation
    if not any(_from_layer(value, layers) for value in inputs):
        return []
    lengths = {v: layer.sum_length for v in inputs if (layer := _ending(v, layers)) is not None}
    if options.add_inputs == "both" or not lengths:
        return inputs
    fused = max(lengths, key=lambda value: lengths[value])
    return [value for value in inputs if value is not fused]


def _ending(value: Value, layers: Mapping[Call, Layer]) -> Layer | None:
    """The layer that computes the value for one reader only, an activation behind it included."""
    if len(value.readers) != 1 or value.returned:
        return None
    layer = None if value.producer is None else layers.get(value.producer)
    if layer is not None:
        return layer if layer.ends else None
    return _activated(value, layers)


def _activated(value: Value, layers: Mapping[Call, Layer]) -> Layer | None:
    """The convolution whose activation, one that kernels add a residual behind, it is."""
    found: set[Call] = set()
    waiting = [value]
    while waiting:
        call = waiting.pop().producer
        if call is not None and call in layers:
            found.add(call)
        elif call is None or call.function not in _NOT_CLAMPING:
            return None
        else:
            waiting += [v for v in call.inputs.values() if not v.constant]
    call = found.pop() if len(found) == 1 else None
    return layers[call] if call is not None and call.function in CONVOLUTIONS else None


def _pool_input(call: Call, layers: Mapping[Call, Layer]) -> list[Value]:
    """Rule 3: the input of an average pooling whose result a layer takes."""
    x = operand(call)
    if x is None or not is_average(call):
        return []
    readers = [reader for reader, _ in call.outputs[0].readers]
    while len(readers) == 1 and is_mover(readers[0]):
        readers = [reader for reader, _ in readers[0].outputs[0].readers]
    return [x] if any(reader in layers for reader in readers) else []


def _from_layer(value: Value, layers: Mapping[Call, Layer]) -> bool:
    """Whether the first input's chain of activation, pooling, moving, adding starts at a layer."""
    call = value.producer
    while call is not None and call not in layers:
        passed = call.function in ACTIVATIONS or call.function in _PASSED_THROUGH
        source = operand(call)
        if source is None or not (passed or is_average(call) or moved_from(call)):
            return False
        call = source.producer
    return call is not None


def _power_of(value: Value, base: Value) -> bool:
    """Whether the value is `base` times itself and constants."""
    call = value.producer
    if call is None or call.function not in ("mul", "pow"):
        return False
    given = [v for v in call.inputs.values() if not v.constant]
    return all(v is base or _power_of(v, base) for v in given)


class _Scales:
    """Tensors that are quantized, in groups of one scale; see `onnx` files' rule 4."""

    def __init__(self, excluded: frozenset[Call]) -> None:
        self.excluded = excluded
        self.source_of: dict[Value, Value] = {}
        self.origins: dict[Value, list[Value]] = {}

    def take(self, value: Value) -> None:
        """Adds a tensor, and what its data is moved from, however far."""
        if value in self.source_of:
            return
        found = [] if value.producer in self.excluded else moved_from(value.producer)
        for source in found:
            self.take(source)
        if not found:
            self.alone(value)
            return
        first = self.source_of[found[0]]
        for source in found[1:]:
            self._join(first, self.source_of[source])
        self.source_of[value] = first

    def alone(self, value: Value) -> None:
        """Adds a tensor with a scale of its own."""
        if value not in self.source_of:
            self.source_of[value] = value
            self.origins[value] = [value]

    def _join(self, first: Value, other: Value) -> None:
        if first is not other:
            self.origins[first] += self.origins.pop(other)
            for value, source in self.source_of.items():
                if source is other:
                    self.source_of[value] = first


class _Naming:
    """Gives quantizers their names, and turns tensors into arguments of sites."""

    def __init__(self, graph: Graph, layers: Mapping[Call, Layer], stay: set[Call]) -> None:
        self.layers = layers
        self.stay = stay
        self.inputs = graph.inputs
        self._taken: set[str] = set()

    def places(self, scales: _Scales, attentions: list[Attention]) -> Places:
        """All of it."""
        result = Places()
        reads: dict[Site, list[Read]] = {}
        symmetric = {scales.source_of[v] for each in attentions for v in each.operands}
        known = {each.softmax: Range(0.0, 1.0) for each in attentions}
        for source, origins in scales.origins.items():
            named = {value: self._free(self._tensor(value)) for value in origins}
            name = next(iter(named.values()))
            span = known.get(source) if len(origins) == 1 else None
            scale = ScalePlace(name, tuple(named.values()), source in symmetric, span)
            result.scales[name] = scale
            for value, origin in named.items():
                for call, at in value.readers:
                    if call not in self.stay:
                        reads.setdefault(call.site, []).append(Read(at, name, origin))
                        if at in call.changed:
                            result.changes[call.site] = (*result.changes.get(call.site, ()), at)
        for (weight, axis), layers in self._weights().items():
            name = self._free(weight.parameter or f"{layers[0].call.site}/weight")
            if weight.parameter is not None:
                result.parameters[weight.parameter] = name
            names = tuple(layer_name(layer) for layer in layers)
            result.weights[name] = WeightPlace(name, axis, weight.shape, names)
            for layer in layers:
                reads.setdefault(layer.call.site, []).append(Read(layer.place, name))
                result.quantized[layer_name(layer)] = layer.call.site
        result.reads = {site: tuple(each) for site, each in reads.items()}
        return result

    def _weights(self) -> dict[tuple[Value, int], list[Layer]]:
        found: dict[tuple[Value, int], list[Layer]] = {}
        for layer in self.layers.values():
            found.setdefault((layer.weight, layer.axis), []).append(layer)
        return found

    def _tensor(self, value: Value) -> str:
        """`layer1.0/relu`: where it is computed; `input` of the model."""
        if value.producer is None:
            if value in self.inputs:
                at = self.inputs.index(value)
                return f"input_{at}" if at else "input"
            return f"read by {value.readers[0][0].site}"
        site = str(value.producer.site)
        return f"{site}_{value.output}" if value.output else site

    def _free(self, name: str) -> str:
        """As the name of a submodule: letters, digits and _, each once."""
        plain = "".join(c if c.isalnum() else "_" for c in name)
        found, number = plain, 1
        while found in self._taken:
            number += 1
            found = f"{plain}_{number}"
        self._taken.add(found)
        return found


def _names(call: Call, found: Mapping[Call, Layer]) -> tuple[str, ...]:
    """What patterns are compared with: the call, the layer, the module and those around it."""
    parts = call.site.path.split(".") if call.site.path else []
    around = [".".join(parts[: i + 1]) for i in range(len(parts))]
    layer = (layer_name(found[call]),) if call in found else ()
    return (str(call.site), *layer, *around)


def _matches(call: Call, found: Mapping[Call, Layer], patterns: tuple[str, ...]) -> str | None:
    names = _names(call, found)
    return next((p for p in patterns if any(fnmatchcase(name, p) for name in names)), None)


def _why_excluded(call: Call, found: Mapping[Call, Layer], options: QuantizerOptions) -> str:
    """Why the user does not want it, or ""."""
    pattern = _matches(call, found, options.exclude)
    if pattern is not None:
        return f"excluded by {pattern!r}"
    if call in found and options.include and _matches(call, found, options.include) is None:
        return "not matched by include"
    return ""


def _require_matches(
    calls: list[Call], found: Mapping[Call, Layer], options: QuantizerOptions
) -> None:
    for option, patterns in {"include": options.include, "exclude": options.exclude}.items():
        for pattern in patterns:
            if not any(_matches(call, found, (pattern,)) for call in calls):
                names = [layer_name(layer) for layer in found.values()][:20]
                raise InputError(
                    f"the pattern {pattern!r} of {option} matches nothing",
                    ["the layers are " + ", ".join(names)],
                    "use these names, those of modules, or of functions such as layer1.0/add",
                )


def _nothing(calls: list[Call], excluded: Mapping[Call, str]) -> InputError:
    reasons = [f"{call.site}: {why}" for call, why in list(excluded.items())[:20]]
    got = ", ".join(dict.fromkeys(call.function for call in calls))
    return InputError(
        "the model has nothing to quantize",
        ["expected a convolution or linear layer with a constant weight", f"got {got}", *reasons],
        "change include and exclude, or use the float model as it is",
    )


def _reasons(
    calls: list[Call],
    found: Mapping[Call, Layer],
    excluded: Mapping[Call, str],
    composite: Mapping[Site, str],
) -> dict[str, str]:
    """Why what could be quantized, or has weights, stays float."""
    reasons = {}
    for call in calls:
        if call in excluded:
            name = layer_name(found[call]) if call in found else str(call.site)
            reasons[name] = excluded[call]
        elif call.site in composite:
            reasons[str(call.site)] = composite[call.site]
        elif call.function in FLOAT_WEIGHTED and any(v.constant for v in call.inputs.values()):
            reasons[str(call.site)] = f"{call.function} is not quantized"
        elif is_sum(call) and is_normalized(call.outputs[0]):
            reasons[str(call.site)] = "a normalization reads this sum: the stream stays float"
    return reasons
