"""The cost model's choices against those that were timed, on a CPU that both can be had of.

    python -m benchmarks.cost_model --facts znver4 --cache runs/cache --write

Each network is built twice: tactics timed here, and chosen by the cost model from the facts of this
kind of CPU (`--facts`), as for a machine that is not here. Both engines run in turns. `loss` is how
much longer the chosen one takes; `same` the products whose tactic is the timed one; `est.` the sum
of the products' estimates over what the same kernels took when they were timed. The machine has to
be quiet.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from twofour.bench.suite.files import race_feeds, write_files
from twofour.bench.suite.rows import LENGTH, SuiteOptions, SuiteRow
from twofour.bench.timing import Schedule, race, ratio
from twofour.bench.versus import ours
from twofour.compiler.build import build
from twofour.core.progress import silent
from twofour.core.target import check_runs_here, detect_host, parse_target
from twofour.engine import Engine, Layer
from twofour.runtime.session import Session

NETWORKS = ("cifar_resnet20", "resnet18", "minilm", "mobilenetv2")
KINDS = ("f32", "int8", "24-int8", "pair-int8")
HEAD = "| network | file | timed us | model us | loss | same tactic | est. / timed |"


def products(engine: Engine) -> list[Layer]:
    """The layers that a kernel was chosen for."""
    return [layer for layer in engine.plan.layers if layer.candidates]


def compared(timed: Engine, chosen: Engine) -> tuple[int, float]:
    """How many tactics agree; estimates over times of the kernels that both know."""
    same, estimates, times = 0, 0.0, 0.0
    for a, b in zip(products(timed), products(chosen), strict=True):
        same += a.tactic == b.tactic
        known = {(c.tactic, c.config): c.time_us for c in a.candidates if c.time_us is not None}
        if b.time_us is not None and (b.tactic, b.config) in known:
            estimates, times = estimates + b.time_us, times + known[b.tactic, b.config]
    return same, estimates / times if times else 0.0


def rows(facts: str, cache: Path, duration_s: float) -> Iterator[str]:
    """One line for each network and file."""
    target = parse_target(f"cpu:{facts}")
    check_runs_here(target)
    for name in NETWORKS:
        row = SuiteRow(name, name, 1, LENGTH)
        files = write_files(row, SuiteOptions((), 1, duration_s, cache), silent)
        feeds = race_feeds(row, files)
        shapes = {key: value.shape for key, value in feeds.items()}
        for kind in KINDS:
            source = files.path(kind)
            timed = build(source, shapes=shapes, race=False, timing_cache=cache / "times.json")
            chosen = build(source, shapes=shapes, race=False, target=target)
            with Session(timed) as first, Session(chosen) as second:
                contestants = [ours(first, feeds, "timed"), ours(second, feeds, "model")]
                found = race(contestants, Schedule(duration_s))
            same, off = compared(timed, chosen)
            loss = 1 / ratio(found[1], found[0]).median - 1
            yield (
                f"| {name} | {kind} | {found[0].median_us:.1f} | {found[1].median_us:.1f} "
                f"| {loss:+.1%} | {same} of {len(products(timed))} | {off:.2f} |"
            )


def main() -> None:
    """Prints the table, and writes it to benchmarks/cost_model.md if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", default="znver4", help="a name of core/cpus.py")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--duration", type=float, default=3.0, help="timed seconds a row")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    lines = [HEAD, "| --- | --- | --: | --: | --: | --: | --: |"]
    print("\n".join(lines), flush=True)
    for line in rows(given.facts, given.cache, given.duration):
        print(line, flush=True)
        lines.append(line)
    if given.write:
        text = (
            "# The cost model against timing\n\n"
            f"    python -m benchmarks.cost_model --facts {given.facts} --write\n\n"
            f"Machine: {detect_host().model}, one thread. loss: how much longer the engine takes "
            "whose kernels the cost model chose. est. / timed: estimates of its products over the "
            "times of the same kernels.\n\n" + "\n".join(lines) + "\n"
        )
        (Path(__file__).parent / "cost_model.md").write_text(text)


if __name__ == "__main__":
    main()
