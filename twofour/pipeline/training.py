"""The worker of a training stage: one process, or one of several under torchrun.

    python -m twofour.pipeline.training STAGE JOB.json

`jobs.py` says what it is given and what it leaves, `torchrun.py` starts it. Whatever the user's
code prints goes to the log; so does the whole traceback of an error, of which the pipeline shows
the user's own lines.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from twofour.core.errors import Error, GateError, InputError
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.reference import Reference
from twofour.pipeline.attachment import Attachment
from twofour.pipeline.jobs import ON_CPU, Job, JobResult, Output
from twofour.train.export_stage import Exported, export
from twofour.train.processes import find_device, joined, name_of
from twofour.train.settings import QatSettings, SparsifySettings, TrainSettings, settings_of
from twofour.train.stages import Done, Task, load, sparsify
from twofour.train.train_stages import finetune, qat

MOST_FLOAT, MOST_QUANTIZED = 1e-3, 0.3
"""Of the model's largest output, that a float file may differ by: sums are added up in another
order. Of a quantized one, of the root mean square: what lies between two steps may take either."""


def run(job: Job, report: Any) -> JobResult | None:
    """Does a job and writes its files.

    Args:
        job: what is to be done.
        report: told of each piece of work.

    Returns:
        What came of it, not written yet; None in all processes but the first.

    Raises:
        Error: of the stage.
    """
    device = find_device("cpu" if job.stage in ON_CPU else job.device)
    with joined(device) as rank:
        task = replace(_task(job, report), device=device)
        done = _done(job, task)
    if rank:
        return None
    outputs = {name: Output(file, kind) for name, (file, kind) in done.files.items()}
    text = f"{done.text}, on {name_of(device)}" if device.type == "cuda" else done.text
    return JobResult(outputs, text, done.notes, {job.stage: done.document})


def _done(job: Job, task: Task) -> Done:
    if job.stage == "load":
        return load(task)
    if job.stage == "sparsify":
        return sparsify(task, settings_of(SparsifySettings, job.settings))
    if job.stage == "finetune":
        return finetune(task, settings_of(TrainSettings, job.settings))
    if job.stage == "qat":
        return qat(task, settings_of(QatSettings, job.settings))
    if job.stage == "export":
        return _exported(task)
    raise InputError(f"no training stage {job.stage!r}")


def _task(job: Job, report: Any) -> Task:
    model, checkpoint = job.model, job.model.get("checkpoint")
    return Task(
        model["torch"],
        model["example"],
        None if checkpoint is None else Path(checkpoint),
        tuple(model["inputs"]),
        tuple(model["outputs"]),
        tuple(model["dynamic"]),
        job.data.get("train"),
        job.data.get("calibrate"),
        job.seed,
        {name: Path(path) for name, path in job.inputs.items()},
        Path(job.output),
        Path(job.scratch),
        report,
    )


def _exported(task: Task) -> Done:
    """All models as ONNX files, each compared with what its model computes."""
    files, document = {}, {}
    names = [name for name in task.inputs if name != "masks"]
    total = len(names)
    for index, name in enumerate(names):
        task.report(index, total, name)
        made = export(task, name)
        files[name] = (made.path.name, "onnx")
        document[name] = {
            "difference": compared(made),
            "patterns": made.patterns,
            "quantized": made.quantized,
        }
    task.report(total, total, "")
    return Done(files, f"{total} files: {', '.join(names)}", document={"models": document})


def compared(made: Exported) -> float:
    """How far a file's outputs are from its model's, as a share of these.

    Raises:
        GateError: further than rounding explains.
    """
    got = Reference(load_model(made.path)).run(made.inputs)
    most = MOST_QUANTIZED if made.quantized else MOST_FLOAT
    found = {}
    for name, wanted in made.outputs.items():
        apart = np.subtract(wanted, got[name], dtype=np.float64)
        size = np.square(wanted, dtype=np.float64).mean() ** 0.5
        share, least = np.square(apart).mean() ** 0.5, np.finfo(np.float32).tiny
        if not made.quantized:
            share, size = np.abs(apart).max(initial=0), np.abs(wanted).max(initial=0)
        found[name] = float(share / max(size, least))
    if wrong := [f"{n}: {share:.3g} apart" for n, share in found.items() if not share <= most]:
        raise GateError(
            f"{made.path.name} does not compute what the PyTorch model does",
            [f"expected outputs at most {most:g} apart, relative to the model's", *wrong],
            "see whether forward() branches on values or draws random numbers in eval mode",
        )
    return max(found.values())


def main(arguments: list[str]) -> None:
    """Does the job that the command line names, and ends the process.

    Args:
        arguments: STAGE JOB.json.
    """
    attachment = Attachment()
    stage, path = arguments
    job = Job.read(Path(path))
    if job.stage != stage:
        attachment.fail(InputError(f"{path} is a job of stage {job.stage}, not of {stage}"))
    attachment.stage = stage
    try:
        result = run(job, attachment.report)
        if result is not None:
            result.write(Path(job.output))
    except Error as e:
        attachment.fail(e)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # Python's own exit sometimes aborts on threads that gloo has left


if __name__ == "__main__":
    main(sys.argv[1:])
