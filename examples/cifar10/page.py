"""The measured table as data and as a page."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar10.measure import INT8_BASELINES, fastest
from cifar10.resume import versions
from cifar10.settings import CALIBRATION, DEPTH, EPOCHS, LR, Settings
from twofour.bench.table import Row, markdown, plain
from twofour.core.records import to_plain
from twofour.core.target import detect_host, host_target
from twofour.core.version import __version__
from twofour.evaluate.accuracy import Verdict


@dataclass(frozen=True)
class Result:
    """What a run ends with.

    Attributes:
        images: how many test images there are.
        rows: of the table.
        training: pattern -> top-1 after pruning and after fine-tuning.
        verdicts: engine -> what the gate found; empty for a short run.
    """

    images: int
    rows: Sequence[Row]
    training: Mapping[str, Mapping[str, float]]
    verdicts: Mapping[str, Verdict]


def document(settings: Settings, result: Result) -> dict[str, Any]:
    """As `summary.json` has it."""
    host = detect_host()
    baseline = fastest(result.rows, INT8_BASELINES).name
    return {
        "title": f"ResNet-{settings.depth} on CIFAR-10, {result.images:,} test images, "
        "batch 1, one thread",
        "command": command(settings),
        "version": __version__,
        "cpu": host.model,
        "cores": host.cores,
        "target": str(host_target()),
        "tools": {"python": platform.python_version(), **versions()},
        "baseline": baseline,
        "rows": plain(result.rows, baseline),
        "training": result.training,
        "gate": {name: to_plain(verdict) for name, verdict in result.verdicts.items()},
    }


def command(settings: Settings) -> str:
    """Reproduces the run, wherever its files go."""
    schedule = settings.schedule
    options = {
        "--depth": settings.depth if settings.depth != DEPTH else None,
        "--pattern": settings.patterns[0] if len(settings.patterns) == 1 else None,
        "--epochs": schedule.epochs if schedule.epochs != EPOCHS and not settings.short else None,
        "--lr": schedule.lr if schedule.lr != LR else None,
        "--seed": schedule.seed or None,
        "--calibration": settings.calibration if settings.calibration != CALIBRATION else None,
    }
    flags = {"--bf16": schedule.bf16, "--short": settings.short}
    words = ["python examples/cifar10_resnet20.py", *(name for name, on in flags.items() if on)]
    words += [f"{name} {value}" for name, value in options.items() if value is not None]
    return " ".join(words)


def page(summary: Mapping[str, Any]) -> str:
    """The summary as markdown."""
    tools = ", ".join(f"{name} {version}" for name, version in summary["tools"].items())
    machine = f"{summary['cpu']}, {summary['cores']} cores, {summary['target']}"
    table = markdown(summary["rows"], summary["baseline"])
    lines = [
        f"# {summary['title'].partition(',')[0]}",
        "",
        "    " + summary["command"],
        "",
        f"{summary['title'].partition(', ')[2]}. All rows were timed in one race, taking turns.",
        "",
        f"Machine: {machine}  ",
        f"Versions: twofour {summary['version']}, {tools}",
        "",
        table,
        "Top-1 in PyTorch, float32:",
        "",
        *(_training(name, figures) for name, figures in summary["training"].items()),
        "",
    ]
    if summary["gate"]:
        lines += [
            "The gate: top-1 against PyTorch f32; speed against ONNX Runtime f32, and INT8 against "
            "the faster of ONNX Runtime's two INT8 rows:",
            "",
        ]
    for name, verdict in summary["gate"].items():
        lines += [f"- {name}: {'; '.join(verdict['reasons'])}"]
    return "\n".join(lines).rstrip() + "\n"


def _training(name: str, figures: Mapping[str, float]) -> str:
    pruned, tuned = figures["one_shot_top1"], figures["finetuned_top1"]
    return f"- {name}: {pruned:.2%} right after pruning, {tuned:.2%} after fine-tuning"


def write(path: Path, text: str) -> None:
    """Under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As `write`."""
    write(path, json.dumps(content, indent=2) + "\n")
