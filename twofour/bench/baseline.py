"""A stored benchmark, and whether a new one may be compared with it.

The file is the JSON document that `twofour bench --json` prints. Times of another CPU, on another
input or with other settings say nothing about a regression: such a comparison is refused. What only
makes it less certain is a doubt, told beside the verdict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twofour.bench.regression import Rounds
from twofour.core.errors import InputError

SCHEMA = "bench/1"
# What has to be equal -> how people call it.
_ALIKE = {
    "cpu": "CPU",
    "cores": "usable cores",
    "threads": "threads",
    "concurrency": "callers at once",
    "inputs": "inputs",
}


@dataclass(frozen=True)
class Baseline:
    """What a comparison needs of a benchmark.

    Attributes:
        conditions: what has to be equal, by the names of the document.
        model_sha256: of the ONNX file that the engine was built from; "" if unknown.
        gauge_sha256: of the gauge's code.
        rounds: of the engine.
    """

    conditions: Mapping[str, Any]
    model_sha256: str
    gauge_sha256: str
    rounds: Rounds

    @staticmethod
    def from_document(document: Mapping[str, Any]) -> Baseline:
        """Of what `--json` prints.

        Raises:
            KeyError: it lacks something.
            TypeError: something has another type.
            ValueError: a time is no positive number.
        """
        gauge = document["gauge"]
        ours = document["results"][0]["timing"]
        times = [ours["round_medians_us"], gauge["round_medians_us"]]
        if len(times[0]) != len(times[1]) or not times[0]:
            raise ValueError("expected as many rounds of the gauge as of the engine")
        if not all(isinstance(us, (int, float)) and us > 0 for each in times for us in each):
            raise ValueError("expected times above 0")
        sha256 = str(document["engine"]["source_sha256"])
        return Baseline(conditions_of(document), sha256, str(gauge["sha256"]), Rounds(*times))


def read_baseline(path: Path) -> Baseline:
    """What an earlier run stored.

    Raises:
        InputError: no such file, or it is none.
    """
    how = "store one with twofour bench E.engine --save FILE"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"no baseline at {path}", [e.strerror or str(e)], how) from e
    except ValueError as e:
        raise InputError(f"{path} is no baseline", [f"it is no JSON: {e}"], how) from e
    found = document.get("schema") if isinstance(document, dict) else None
    if found != f"twofour.{SCHEMA}":
        reason = f"expected a document of schema twofour.{SCHEMA}, got {found or 'none'}"
        raise InputError(f"{path} is no baseline", [reason], how)
    try:
        return Baseline.from_document(document)
    except (KeyError, TypeError, IndexError, ValueError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise InputError(f"{path} is a damaged baseline", [reason], how) from e


def conditions_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be equal for a comparison, by the names of the document."""
    machine = document["machine"]
    alike = {key: document[key] for key in ("threads", "concurrency", "inputs")}
    return {"cpu": machine["cpu"], "cores": machine["cores"], **alike}


def require_comparable(before: Baseline, now: Mapping[str, Any]) -> None:
    """Refuses to compare what is measured under other conditions.

    Args:
        before: the baseline.
        now: the conditions of this run.

    Raises:
        InputError: names all that differ.
    """
    require_alike(before.conditions, now)


def require_alike(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Likewise of conditions by the names of the document, as many as the baseline has."""
    differ = [
        f"{words}: the baseline has {before[key]}, this run {now[key]}"
        for key, words in _ALIKE.items()
        if key in before and before[key] != now[key]
    ]
    if differ:
        raise InputError(
            "this run cannot be compared with the baseline",
            differ,
            "measure as the baseline was measured, or store another one here with --save FILE",
        )


def doubts(before: Baseline, now: Baseline) -> list[str]:
    """What makes a comparison less certain, a sentence each."""
    found = []
    if before.model_sha256 != now.model_sha256:
        found.append("the engine was built from another ONNX file than that of the baseline")
    if before.gauge_sha256 != now.gauge_sha256:
        found.append(
            "the baseline was gauged by another loop: a clock that has changed since would look "
            "like a change of the engine"
        )
    return found


def comparable_rounds(before: Baseline, now: Baseline) -> tuple[Rounds, Rounds]:
    """The rounds of both, without the gauge where it is not the same."""
    if before.gauge_sha256 == now.gauge_sha256:
        return before.rounds, now.rounds
    return Rounds(before.rounds.times_us), Rounds(now.rounds.times_us)
