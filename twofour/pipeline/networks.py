"""The networks of a run: dense and sparse, by float32, PTQ and QAT; which of them are made.

    weights      precision      as
    dense        float32        baseline: what the user gave, on dense kernels
    dense        PTQ, QAT       variant: for the table
    2:4          float32        variant, or the candidate where nothing is quantized
    2:4          PTQ, QAT       candidate: the last thing that the recipe asks for

Where the recipe does not prune, what it makes of the dense network is the candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twofour.pipeline.recipe import Quantize, Recipe
from twofour.pipeline.stage import From

BASELINE, CANDIDATE, VARIANT = "baseline", "candidate", "variant"
DENSE, MIXED, TUNED = "dense", "mixed", "tuned"
FLOAT32, PTQ, QAT = "float32", "PTQ", "QAT"


@dataclass(frozen=True)
class Network:
    """One cell of the table.

    Attributes:
        weights: "dense", "2:4", ..., "mixed" by layer, or "tuned": dense, and trained further.
        precision: "float32", "PTQ" or "QAT".
        model: its ONNX file; None where it is not made.
        role: BASELINE, CANDIDATE or VARIANT.
        why_not: why it is not made.
    """

    weights: str
    precision: str
    model: From | None
    role: str = VARIANT
    why_not: str = ""

    @property
    def name(self) -> str:
        """As stages and tables call it."""
        return f"{self.weights} {self.precision}"


def networks_of(recipe: Recipe) -> tuple[Network, ...]:
    """All cells, the baseline first and the candidate last."""
    given = From("load") if recipe.model.onnx else From("export", "dense")
    baseline = Network(DENSE, FLOAT32, given, BASELINE)
    last = _candidate(recipe)
    cells = [each for each in _cells(recipe) if each.name not in (baseline.name, last.name)]
    if recipe.build.cells == "gate":
        asked = "build.cells: gate"
        cells = [Network(each.weights, each.precision, None, why_not=asked) for each in cells]
    return (baseline, *cells, last)


def in_table(networks: Sequence[Network]) -> list[Network]:
    """In the order of the table: dense first, float32 before PTQ before QAT."""
    order = (FLOAT32, PTQ, QAT)
    return sorted(networks, key=lambda n: (n.weights != DENSE, order.index(n.precision)))


def quantize_of(recipe: Recipe) -> Quantize | None:
    """How networks are quantized after training; None where they are not."""
    if recipe.quantize is not None or recipe.layers:
        return recipe.quantize or Quantize()
    return Quantize() if recipe.qat is not None and recipe.data.calibrate else None


def is_trained(recipe: Recipe) -> bool:
    """Whether the network changes before it is quantized."""
    return not recipe.layers and (recipe.sparsify is not None or recipe.finetune is not None)


def weights_of(recipe: Recipe) -> str:
    """What the weights of the result are, in a word."""
    if recipe.layers:
        return MIXED
    if recipe.sparsify is not None:
        return recipe.sparsify.pattern
    return TUNED if recipe.finetune is not None else DENSE


def _candidate(recipe: Recipe) -> Network:
    weights = weights_of(recipe)
    if recipe.layers:
        return Network(MIXED, PTQ, From("quantize mixed"), CANDIDATE)
    if recipe.qat is not None:
        return Network(weights, QAT, From("export", "qat"), CANDIDATE)
    if recipe.quantize is not None:
        return Network(weights, PTQ, From(f"quantize {weights}"), CANDIDATE)
    if weights == DENSE:
        weights = "as given"
    return Network(weights, FLOAT32, _floats(recipe), CANDIDATE)


def _floats(recipe: Recipe) -> From:
    """The float network that is to be quantized."""
    if recipe.model.torch:
        return From("export", "sparse" if is_trained(recipe) else "dense")
    return From("sparsify" if recipe.sparsify else "load")


def float_models(recipe: Recipe) -> dict[str, From]:
    """The float network of each kind of weights."""
    given = From("load") if recipe.model.onnx else From("export", "dense")
    found = {DENSE: given}
    if is_trained(recipe):
        found[weights_of(recipe)] = _floats(recipe)
    return found


def _cells(recipe: Recipe) -> list[Network]:
    """By weights, then by precision."""
    found = []
    floats = float_models(recipe)
    quantized = quantize_of(recipe) is not None
    for weights in (DENSE, weights_of(recipe) if recipe.layers or is_trained(recipe) else "2:4"):
        model = floats.get(weights)
        none = "its layers differ" if weights == MIXED else "the recipe does not prune"
        why = "" if model else none
        found.append(Network(weights, FLOAT32, model, why_not=why))
        int8 = From(f"quantize {weights}") if model and quantized else None
        why = "" if int8 else (why or "the recipe does not quantize")
        found.append(Network(weights, PTQ, int8, why_not=why))
        found.append(_trained(recipe, weights))
    return found


def _trained(recipe: Recipe, weights: str) -> Network:
    """The cell of quantization-aware training; that of the result is no variant."""
    if recipe.qat is not None and recipe.qat.dense and weights == DENSE:
        return Network(weights, QAT, From("export", "dense_qat"))
    if not recipe.model.torch:
        why = "an ONNX file is not trained"
    elif recipe.qat is None:
        why = "the recipe has no qat"
    else:
        why = "the recipe does not say qat.dense"
    return Network(weights, QAT, None, why_not=why)
