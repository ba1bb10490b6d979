"""What pruning each layer gains, of a forecast: microseconds that its sparse kernel saves.

A forecast is taken as its `--json` document, from a file or just measured. One layer of it may
compute several nodes of the model (the joint product of q, k and v): its gain is shared out by
their weights, and there only if all of them are pruned.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twofour.compiler.forms import INT8, PATTERNS
from twofour.core.errors import InputError
from twofour.core.progress import Stage
from twofour.predict.forecast import forecast

SCHEMA = "twofour.forecast/1"
Parameters = Mapping[str, int]
_LONGEST_US = 1e12  # eleven days; no layer takes longer
_FIX = "write it with: twofour forecast MODEL.onnx --json > FILE"


@dataclass(frozen=True)
class Gains:
    """A forecast, as far as gains need it.

    Attributes:
        source: the file, or "measured".
        machine: that it was measured on, in words.
        judged: the precision that the forecast found fastest; "" if it has no times in it.
    """

    source: str
    machine: str
    judged: str
    _times: Mapping[tuple[str, str], tuple[tuple[tuple[str, ...], float], ...]]

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those that it has."""
        return tuple(dict.fromkeys(precision for precision, _ in self._times))

    def of(self, parameters: Parameters, pattern: str, precision: str) -> dict[str, float]:
        """Microseconds that each layer saves; 0 where no sparse kernel is faster.

        Args:
            parameters: of each layer, by name.
            pattern: of the weights; a pair pattern without kernels of its own runs those of the
                plain one.
            precision: "f32", "bf16" or "int8".

        Returns:
            By name; layers that the forecast has no times of are missing.
        """
        plain = pattern.partition("/")[0]
        rows = self._times.get((precision, pattern)) or self._times.get((precision, plain), ())
        found: dict[str, float] = {}
        for nodes, gain_us in rows:
            known = all(parameters.get(node) for node in nodes)
            sizes = {node: parameters[node] if known else 1 for node in nodes}
            for node in (each for each in sizes if each in parameters):
                share = gain_us * sizes[node] / sum(sizes.values())
                found[node] = found.get(node, 0.0) + share
        return found

    def require_precision(self, precision: str | None) -> None:
        """Refuses a precision that the forecast does not have; None is any.

        Raises:
            InputError: it does not, or it has no times at all.
        """
        if precision not in self.precisions and (precision or not self.precisions):
            raise InputError(
                f"forecast {self.source} has no times in {precision or 'any precision'}",
                [f"it has {', '.join(self.precisions) or 'none'}"],
                "forecast it again with this --precision, or choose another one",
            )

    def require_layers(self, parameters: Parameters) -> None:
        """Refuses the forecast of another model.

        Raises:
            InputError: it has no layer of these names.
        """
        known = {node for rows in self._times.values() for nodes, _ in rows for node in nodes}
        if known.isdisjoint(parameters):
            raise InputError(
                f"forecast {self.source} is of another model",
                [
                    f"expected layers such as {', '.join(list(parameters)[:3])}",
                    f"got {', '.join(sorted(known)[:3]) or 'none with a time'}",
                ],
                "give the forecast of this model, or --forecast none",
            )


def read_gains(path: str | os.PathLike[str]) -> Gains:
    """Reads what `twofour forecast --json` printed.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"cannot read forecast {path}", [str(e)], _FIX) from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"forecast {path} is no JSON", [str(e)], _FIX) from e
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise InputError(f"{path} is no forecast", [f"expected {SCHEMA}, got {found}"], _FIX)
    try:
        return gains_of(document, str(path))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise InputError(f"forecast {path} is damaged", [reason], _FIX) from e


def measured_gains(
    model: str | os.PathLike[str],
    shapes: Mapping[str, tuple[int, ...]],
    precision: str | None,
    patterns: Sequence[str],
    stage: Stage,
) -> Gains:
    """Measures a forecast of the patterns that kernels know, in one precision.

    Args:
        model: an ONNX file.
        shapes: of a run.
        precision: "f32", "bf16" or "int8", which is the default.
        patterns: those wanted.
        stage: shows the progress.

    Raises:
        InputError: no kernel knows a pattern, or the model is not usable.
        UnsupportedError: the model cannot be compiled.
    """
    wanted = [p for p in PATTERNS if p in patterns]
    if not wanted:
        raise InputError(
            f"nothing can be forecast for {', '.join(patterns)}",
            [f"expected some of {', '.join(PATTERNS)}"],
            "scan without gains: --forecast none",
        )
    chosen = precision or INT8
    found = forecast(model, stage=stage, shapes=shapes, precisions=[chosen], patterns=wanted)
    gains = gains_of(found.to_json(), "measured")
    gains.require_precision(None)
    return gains


def gains_of(document: Mapping[str, Any], source: str) -> Gains:
    """Of the document of a forecast."""
    times: dict[tuple[str, str], list[tuple[tuple[str, ...], float]]] = {}
    for nodes, precision, pattern, gain_us in _rows(document["layers"]):
        times.setdefault((precision, pattern), []).append((nodes, gain_us))
    threads, judged = int(document["threads"]), document["judged"] or {}
    machine = f"{threads} thread{'s' * (threads > 1)} on {document['cpu']} ({document['target']})"
    rows = {key: tuple(found) for key, found in times.items()}
    fastest = judged.get("precision")
    known = (precision for precision, _ in rows if precision == fastest)
    return Gains(source, machine, next(known, ""), rows)


def _rows(layers: list[dict[str, Any]]) -> Iterator[tuple[tuple[str, ...], str, str, float]]:
    for layer in layers:
        for times in layer["times"]:
            for pruned in times["pruned"]:
                dense_us, sparse_us = times["dense_us"], pruned["sparse_us"]
                if dense_us is not None and sparse_us is not None:
                    gain_us = max(float(dense_us) - float(sparse_us), 0.0)
                    nodes = tuple(map(_name, layer["nodes"])) or (_name(layer["name"]),)
                    kind = _name(times["precision"]), _name(pruned["pattern"])
                    if gain_us <= _LONGEST_US:
                        yield nodes, *kind, gain_us


def _name(found: object) -> str:
    if not isinstance(found, str):
        raise TypeError(f"expected a name, got {found!r:.40}")
    return found
