"""Writes the measured tables into README.md, between its `figures` markers.

    python benchmarks/update_readme.py

Each `benchmarks/*.json` is the `summary.json` of one run, or the document of a suite: rows,
machine, and the command that reproduces it. Nothing is typed by hand, so nothing in the README is
claimed that was not measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from twofour.bench.suite.page import markdown_ratios as ratios
from twofour.bench.table import markdown

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures -->\n", "<!-- /figures -->\n"


def section(path: Path) -> str:
    """One summary as a page shows it."""
    summary = json.loads(path.read_text())
    where = (
        f"{summary['cpu']} ({summary['target']})"
        if "cpu" in summary
        else "; ".join(summary["device"])
    )
    head = (
        f"**{summary['title']}**, on {where}, "
        f"twofour {summary['version']}. Reproduce: `{summary['command']}`\n\n"
    )
    if "device" in summary:
        return head + excerpt(path.with_suffix(".md"))
    if "suite" in summary:
        link = f"[{path.stem}.md](benchmarks/{path.stem}.md)"
        words = f"Times as fast as the fastest peer of the same precision; all figures: {link}"
        return f"{head}{ratios(summary)}\n{words}\n"
    if "baseline" not in summary:
        return head + foreign(summary)
    return head + markdown(summary["rows"], summary["baseline"])


def excerpt(page: Path) -> str:
    """The first table of a page with the words before it, and a link to the others."""
    words, begin, rest = page.read_text().partition("\n| ")
    table = (begin + rest).strip().partition("\n\n")[0]
    paragraphs = [text for text in words.strip().split("\n\n")[3:] if not text.startswith("#")]
    link = f"All figures: [{page.name}](benchmarks/{page.name})"
    return "\n\n".join([*paragraphs, table, link]) + "\n"


def foreign(summary: dict[str, Any]) -> str:
    """Files that others wrote: what falls back, and how both precisions do."""
    lines = [
        "| file | on ONNX Runtime | steps | f32 | INT8 | cosine, f32 | cosine, INT8 |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    for row in summary["rows"]:
        cosine, built, speed = row["cosine"], row["engines"]["f32"], row["ratio"]
        cells = [
            row["name"],
            ", ".join(built["on_onnxruntime"]) or "nothing",
            str(built["steps"]),
            f"{speed['f32']:.2f}x",
            f"{speed['int8']:.2f}x" if "int8" in speed else row["not_quantized"],
            f"{cosine['f32']:.6f}",
            f"{cosine['int8']:.4f} ({cosine['onnxruntime int8']:.4f})" if "int8" in cosine else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    words = (
        "f32, INT8: times as fast as ONNX Runtime, in INT8 on whichever of two files it runs "
        "faster; cosine with the float file on ONNX Runtime, in brackets that of ONNX Runtime on "
        "the INT8 file; all figures: [foreign.md](benchmarks/foreign.md)"
    )
    return "\n".join([*lines, "", words, ""])


def figures(folder: Path) -> str:
    """All summaries in a folder; empty if there is none."""
    return "\n".join(section(path) for path in sorted(folder.glob("*.json")))


def updated(readme: str, text: str) -> str:
    """The page with its figures replaced.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md lacks {BEGIN.strip()} or {END.strip()}")
    return before + begin + text + end + after


def main() -> int:
    """Returns 0."""
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text(), figures(ROOT / "benchmarks")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
