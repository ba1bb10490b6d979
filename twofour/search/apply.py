"""Makes the network that choices mean: pruned where they say so, with Q/DQ where they say int8.

    model = apply(load_model("model.onnx"), {"conv1": "dense f32", "conv2": "2:4 int8"}, "data.npz")
    engine = compile_model(model, with_choices({...}, BuildOptions()))

Layers that are not named stay as they are. The file does not tell bfloat16 from float32; a build
is told by its options (`with_choices`). What belongs to a float layer (network.py) stays float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from twofour.compiler.build import BuildOptions
from twofour.compiler.forms import BF16, F32, INT8
from twofour.compiler.prunable import Network, named
from twofour.core.data import DataLike
from twofour.core.errors import InputError
from twofour.core.patterns import is_pattern
from twofour.core.progress import Report, Stage, silent, unseen
from twofour.onnx_tools.one_shot import Calibration
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.prepare import prepare
from twofour.onnx_tools.promises import promise, require_kept
from twofour.onnx_tools.prune import Pruned, prune
from twofour.onnx_tools.quantize import Quantized, quantize_with_report
from twofour.onnx_tools.weights import layer_weights
from twofour.search.choices import Choice, parse_choices
from twofour.search.names import exactly
from twofour.search.network import layers_of, owners

PruneMethod = Literal["magnitude", "wanda", "sparsegpt"]
METHODS = ("magnitude", "wanda", "sparsegpt")


@dataclass(frozen=True)
class ApplyOptions:
    """How layers are pruned and quantized.

    Attributes:
        method: of pruning: sparsegpt also changes the weights that stay; magnitude needs no data.
        samples: of the data that pruning reads at most; None for all.
        memory_bytes: that pruning may keep of the inputs of layers.
        threads: of ONNX Runtime; 0 for as many as there are cores.
        quantize: recipe, ranges, placement, samples to calibrate with, which is done for each
            network anew; `exclude` holds beside the choices.
    """

    method: PruneMethod = "sparsegpt"
    samples: int | None = 512
    memory_bytes: int = 2**30
    threads: int = 0
    quantize: QuantizeOptions = field(
        default_factory=lambda: QuantizeOptions(recipe="balanced", samples=128)
    )

    def __post_init__(self) -> None:
        """Refuses an unknown method. Raises InputError."""
        if self.method not in METHODS:
            raise InputError(
                f"unknown way to prune {self.method!r}", [f"expected one of {', '.join(METHODS)}"]
            )

    @property
    def quantizing(self) -> QuantizeOptions:
        """With the threads of this."""
        return replace(self.quantize, threads=self.threads)


class Catalogue:
    """The weights of all layers pruned to each pattern; a pattern is made when first asked for.

    Weights are chosen with what layers read in the model as it is, as far as the statistics of all
    fit the memory; so each fits whatever the other layers are pruned to.

    Args:
        model: float, with named nodes.
        data: that pruning reads.
        options: how to prune.
        stage: shows the progress.
    """

    def __init__(
        self, model: Network, data: DataLike, options: ApplyOptions, stage: Stage = unseen
    ) -> None:
        """Nothing is pruned yet."""
        self.model, self._data, self._options, self._stage = model, data, options, stage
        self._made: dict[str, tuple[Network, dict[str, Pruned]]] = {}

    def network(self, pattern: str) -> Network:
        """The model with all its layers pruned that can be."""
        return self._of(pattern)[0]

    def refused(self, pattern: str) -> dict[str, str]:
        """The layers that cannot be pruned, and why."""
        network, report = self._of(pattern)
        kept = {
            str(node.name) for node, w in layer_weights(network) if is_pattern(w.values, pattern)
        }
        return {n: each.reason for n, each in report.items() if each.reason and n not in kept}

    def _of(self, pattern: str) -> tuple[Network, dict[str, Pruned]]:
        if pattern not in self._made:
            with self._stage(f"pruning to {pattern}, {self._options.method}") as report:
                pruned, entries = prune(self.model, pattern, calibration=self._calibration(report))
            self._made[pattern] = pruned, {each.node: each for each in entries}
        return self._made[pattern]

    def _calibration(self, report: Report) -> Calibration | None:
        options, method = self._options, self._options.method
        if method == "magnitude":
            return None
        return Calibration(
            self._data,
            method,
            samples=options.samples,
            memory_bytes=options.memory_bytes,
            threads=options.threads,
            progress=report,
        )


def with_weights(
    model: Network, patterns: Mapping[str, str], networks: Mapping[str, Network]
) -> Network:
    """A copy in which layers have the weights of others, and promise their patterns.

    Args:
        model: with named nodes.
        patterns: of the layers that change, by name.
        networks: of each pattern: the same model with its weights pruned.
    """
    model = model.clone()
    made = {
        pattern: {str(node.name): weight for node, weight in layer_weights(networks[pattern])}
        for pattern in set(patterns.values())
    }
    promised = {}
    for node, weight in layer_weights(model):
        pattern = patterns.get(str(node.name))
        if pattern is not None:
            weight.store(made[pattern][str(node.name)].stored)
            promised[weight.name] = pattern
    promise(model, promised)
    require_kept(model, "pruning")
    return model


def apply(
    model: Network,
    choices: Mapping[str, str],
    data: DataLike,
    options: ApplyOptions | None = None,
    report: Report = silent,
) -> Network:
    """Prunes and quantizes a float model as choices say.

    Args:
        model: float; stays as it is.
        choices: name of a layer, as `twofour inspect` shows it -> such as "2:4 int8".
        data: samples like those the model will see, gone through several times.
        options: how to prune and to quantize.
        report: called while pruning and calibrating.

    Returns:
        A new model. It promises the patterns of its weights.

    Raises:
        InputError: an unknown layer or choice, or a layer that cannot have its choice.
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    model, options = named(model), options or ApplyOptions()
    wanted = parse_choices(choices)
    require_layers(model, wanted)
    catalogue = Catalogue(model, data, options)
    return applied(catalogue, wanted, data, options, report)


def applied(
    catalogue: Catalogue,
    choices: Mapping[str, Choice],
    data: DataLike,
    options: ApplyOptions,
    report: Report = silent,
) -> Network:
    """The same, of a model whose pruned weights are kept between calls."""
    model = catalogue.model
    patterns = {name: choice.pattern for name, choice in choices.items() if choice.pattern}
    networks = {}
    for pattern in dict.fromkeys(patterns.values()):
        networks[pattern] = catalogue.network(pattern)
        refused = catalogue.refused(pattern)
        if wrong := [n for n, p in patterns.items() if p == pattern and n in refused]:
            raise InputError(
                f"cannot prune {wrong[0]!r} to {pattern}",
                [refused[wrong[0]]],
                "choose dense for it",
            )
    pruned = with_weights(model, patterns, networks) if patterns else model
    if all(choice.precision != INT8 for choice in choices.values()):
        return pruned
    return quantized(pruned, choices, data, options, report).model


def quantized(
    model: Network,
    choices: Mapping[str, Choice],
    data: DataLike,
    options: ApplyOptions,
    report: Report = silent,
) -> Quantized:
    """Quantizes the layers whose choice is int8; what belongs to others stays float."""
    owner = owners(model)
    floats = [
        node
        for node, layer in owner.items()
        if layer not in choices or choices[layer].precision != INT8
    ]
    how = options.quantizing
    exclude = (*how.exclude, *exactly(floats, prepare(model)))
    return quantize_with_report(model, data, replace(how, exclude=exclude), report)


def with_choices(choices: Mapping[str, str], options: BuildOptions) -> BuildOptions:
    """The options that build what `apply` made: which layers may be bfloat16.

    Raises:
        InputError: a choice means nothing.
    """
    return building(parse_choices(choices), options)


def building(choices: Mapping[str, Choice], options: BuildOptions) -> BuildOptions:
    """The same of choices that are known."""
    bf16 = any(choice.precision == BF16 for choice in choices.values())
    floats = frozenset(name for name, choice in choices.items() if choice.precision == F32)
    return replace(options, bf16=bf16, stay_float32=floats if bf16 else ())


def require_layers(model: Network, choices: Mapping[str, Choice]) -> None:
    """Refuses choices for what is no layer, or two of them for one weight.

    Raises:
        InputError: names them.
    """
    layers = layers_of(model)
    known = [layer.name for layer in layers]
    if unknown := [name for name in choices if name not in known]:
        raise InputError(
            f"no layer {unknown[0]!r}",
            [f"{len(unknown)} of {len(choices)} names are not in the model", _some(known)],
            "name layers as twofour search or twofour inspect does",
        )
    patterns: dict[str, tuple[str, str]] = {}
    for layer in layers:
        pattern = choices.get(layer.name, Choice()).pattern
        first, other = patterns.setdefault(layer.weight, (layer.name, pattern))
        if other != pattern:
            raise InputError(
                f"layers {first!r} and {layer.name!r} have one weight and two patterns",
                [f"{first}: {other or 'dense'}", f"{layer.name}: {pattern or 'dense'}"],
                "give both the same",
            )


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > 8 else ""
    return f"layers are {', '.join(names[:8])}{more}"
