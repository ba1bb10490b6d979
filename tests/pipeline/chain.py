"""A run of small stages, for tests and for processes that tests kill.

    python -m tests.pipeline.chain FOLDER SOURCE LOG [SECONDS]

Each stage adds a line to what the one before wrote; each that has worked is named in LOG.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from twofour.pipeline.folder import RunFolder
from twofour.pipeline.runner import Ran, Runner
from twofour.pipeline.stage import From, Input, Made, Output, Source, Stage, Task

KINDS = ("load", "sparsify", "quantize", "build", "evaluate", "benchmark")


def chain(
    source: Path, told: Callable[[str], None], seconds: float = 0.0, setting: str = ""
) -> list[Stage]:
    """Stages of which each reads what the one before wrote; `setting` is the third one's."""
    stages: list[Stage] = []
    for number, kind in enumerate(KINDS):
        inputs: dict[str, Input] = {
            "model": From(stages[-1].name) if stages else Source(str(source), "onnx")
        }
        settings = {"number": number, "setting": setting if number == 2 else ""}
        work = partial(_work, kind, settings["setting"], told, seconds)
        stages.append(Stage(f"{kind} it", kind, settings, inputs, work))
    return stages


def _work(
    kind: str, setting: object, told: Callable[[str], None], seconds: float, task: Task
) -> Made:
    given = Path(task.inputs["model"]).read_text()
    started = task.scratch / "started"
    known = started.exists()
    started.write_text("")
    for part in range(5):
        (task.folder / f"part{part}").write_text("half" * 1000)
        time.sleep(seconds / 5)
    (task.folder / "model.txt").write_text(f"{given}{kind} {setting}\n")
    told(f"{kind}{' again' * known}")
    return Made({"model": Output("model.txt", "text")}, f"{kind} is done", {"lines": len(given)})


def statuses(ran: list[Ran]) -> dict[str, str]:
    """By the kind of stage."""
    return {each.stage.kind: each.status for each in ran}


def main(folder: str, source: str, log: str, seconds: str = "0") -> None:
    """Runs the chain as a process."""

    def told(word: str) -> None:
        with Path(log).open("a") as file:
            file.write(f"{word}\n")

    run = RunFolder(Path(folder))
    with run.held("a test"):
        Runner(run, Path(source).parent).run(chain(Path(source), told, float(seconds)))


if __name__ == "__main__":
    main(*sys.argv[1:])
