"""The figures of `cifar10_recovery.py` as data and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cifar10.recovery import (
    CALIBRATION,
    CALIBRATION_BATCH,
    CRITERIA,
    DENSE,
    STATISTICS_BATCHES,
)
from twofour.core.version import __version__

NAMES = {"magnitude": "magnitude", "wanda": "Wanda", "taylor": "Taylor", "sparsegpt": "SparseGPT"}
TITLE = "CIFAR-10 ResNets: what sparsity costs, and what brings the accuracy back"


def document(results: Sequence[Mapping[str, Any]], command: str) -> dict[str, Any]:
    """As `summary.json` has it.

    Args:
        results: of all jobs.
        command: that reproduces them.
    """
    tuned = [each for each in results if each["seed"] is not None]
    return {
        "title": TITLE,
        "kind": "recovery",
        "command": command,
        "version": __version__,
        "device": sorted({f"{each['device']}, torch {each['torch']}" for each in results}),
        "options": results[0]["options"],
        "dense": {
            f"ResNet-{each['depth']}": each["top1"]
            for each in results
            if each["pattern"] == DENSE and each["seed"] is None
        },
        "one_shot": [each for each in results if "top1_batchnorm" in each],
        "tuned": [_merged(group) for group in _by_network(tuned)],
    }


def _by_network(results: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Results of one network, all seeds together."""
    groups: dict[tuple[int, str, str], list[Mapping[str, Any]]] = {}
    for each in sorted(results, key=lambda each: int(each["depth"])):
        groups.setdefault((each["depth"], each["pattern"], each["criterion"]), []).append(each)
    return list(groups.values())


def _merged(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    top1 = [each["top1"] for each in sorted(group, key=lambda each: int(each["seed"]))]
    seconds = sum(each["seconds"] for each in group) / len(group)
    mean = sum(top1) / len(top1)
    first = group[0]
    return {
        "depth": first["depth"],
        "pattern": first["pattern"],
        "criterion": first["criterion"],
        "permuted": first["permuted"],
        "mean": mean,
        "top1": top1,
        "seconds": seconds,
    }


def page(summary: Mapping[str, Any]) -> str:
    """The summary as markdown."""
    lines = [
        f"# {summary['title']}",
        "",
        f"    {summary['command']}",
        "",
        f"Run on: {'; '.join(summary['device'])}; twofour {summary['version']}",
        "",
        *tuned_table(summary),
        *_one_shot_tables(summary),
    ]
    return "\n".join(lines).rstrip() + "\n"


def tuned_table(summary: Mapping[str, Any]) -> list[str]:
    """After fine-tuning, one line a network."""
    if not summary["tuned"]:
        return []
    options, dense = summary["options"], summary["dense"]
    lines = [
        f"Fine-tuned: the masks held through {options['epochs']} epochs of SGD from a rate of "
        f"{options['lr']}, the dense network as teacher; top-1 on the test images.",
        "",
        "| network | weights | pruned by | top-1, mean | against dense | each seed |",
        "| --- | --- | --- | --: | --: | --- |",
    ]
    for row in summary["tuned"]:
        name = f"ResNet-{row['depth']}"
        change = 100 * (row["mean"] - dense[name])
        words, way = row["pattern"], _way(row)
        if row["pattern"] == DENSE:
            words, way = "dense, trained on likewise", ""
        each = ", ".join(f"{100 * value:.2f}" for value in row["top1"])
        lines.append(f"| {name} | {words} | {way} | {row['mean']:.2%} | {change:+.2f} | {each} |")
    figures = ", ".join(f"{name} {top1:.2%}" for name, top1 in dense.items())
    return [*lines, "", f"Dense, as it was published, evaluated likewise: {figures}.", ""]


def _way(row: Mapping[str, Any]) -> str:
    return ("channels permuted, " if row["permuted"] else "") + NAMES[row["criterion"]]


def _one_shot_tables(summary: Mapping[str, Any]) -> list[str]:
    rows = summary["one_shot"]
    lines = []
    for depth in sorted({row["depth"] for row in rows}):
        lines += [
            f"ResNet-{depth} in one shot, without training: top-1 as pruned by criteria that see "
            f"{CALIBRATION} training images, and after BatchNorm statistics were estimated anew "
            f"from {STATISTICS_BATCHES * CALIBRATION_BATCH} augmented ones.",
            "",
            "| weights | channels | " + " | ".join(NAMES[c] for c in CRITERIA) + " |",
            "| --- | --- |" + " --: |" * len(CRITERIA),
        ]
        here = [row for row in rows if row["depth"] == depth]
        for pattern in dict.fromkeys(row["pattern"] for row in here):
            for permuted in (False, True):
                lines.append(_one_shot_line(here, pattern, permuted))
        lines.append("")
    return lines


def _one_shot_line(rows: Sequence[Mapping[str, Any]], pattern: str, permuted: bool) -> str:
    found = {
        row["criterion"]: f"{row['top1']:.2%}, {row['top1_batchnorm']:.2%}"
        for row in rows
        if row["pattern"] == pattern and row["permuted"] == permuted
    }
    cells = [found[criterion] for criterion in CRITERIA]
    return f"| {pattern} | {'permuted' if permuted else 'as they are'} | {' | '.join(cells)} |"
