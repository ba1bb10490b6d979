"""Stages that train: each a process of its own, for torch stays out of the pipeline's.

    python -m twofour.pipeline.training STAGE JOB.json
    python -m torch.distributed.run --standalone --nproc-per-node N -m twofour.pipeline.training
        STAGE JOB.json                                           where `processes` is above 1

STAGE is one of "load", "sparsify", "finetune", "qat", "export". The working directory is the
recipe's folder, which comes first in PYTHONPATH, so `module:function` beside the recipe is found.

JOB.json holds the fields of `Job`:

    {"schema": "twofour.job/1",
     "stage": "finetune",
     "seed": 0,
     "threads": 1,
     "device": "auto",           cpu, cuda, or auto: cuda where PyTorch has it
     "model": {"torch": "module:function", "example": "module:function", "checkpoint": PATH | null,
               "inputs": ["x"], "outputs": ["y"], "dynamic": ["batch"]},
     "data": {"train": "module:function" | null, "calibrate": DATA | null, "evaluate": DATA | null},
     "settings": {...},          the recipe's section of that stage, all defaults filled in
     "inputs": {NAME: PATH},     of earlier stages, see below; absolute
     "output": FOLDER,           exists and is empty; thrown away unless the stage succeeds
     "scratch": FOLDER}          exists; outlives a killed stage: for a checkpoint to go on from

What each stage reads and writes (safetensors; a model's file holds its masks as the buffers
`NAME.weight_mask`, and in its header their patterns and hashes, see `train/states.py`):

    stage      inputs                                        writes into `output`
    load       -                                             model.safetensors
    sparsify   start: a model                                model.safetensors, masks.safetensors
    finetune   start: a model; teacher: a model              model.safetensors (masks of start held)
    qat        start: a model; teacher: a model              the same, with quantizers' scales
    export     dense, sparse, qat, dense_qat: those there    NAME.onnx for each input

`masks`, where it is given, is what the masks of `start`, `sparse` and `qat` are compared with.
`load` calls model.torch, and loads model.checkpoint into it where there is one. `teacher` is given
where `settings.distil` is true: the dense model as it was loaded. `masks.safetensors` has one bool
tensor for each pruned weight, by its name. A stage may write more files; only those in its result
are kept track of. The settings are those of `recipe.py` (`Sparsify`, `Finetune`, `Qat`); of load
and export there are none. PyTorch's threads are those of OMP_NUM_THREADS, else all cores.

As the last of all the worker writes `output`/result.json, the fields of `JobResult`:

    {"outputs": {"model": {"file": "model.safetensors", "kind": "checkpoint"},
                 "masks": {"file": "masks.safetensors", "kind": "masks"}},
     "text": "30 epochs, loss 0.21",                                 one line for the table
     "notes": ["..."],                                               what the user should know
     "documents": {}}                                                plain data for the report

On stdout the worker (of several the one of rank 0) tells its progress, one line each; whatever else
is printed there, and all of stderr, goes to the log of the stage:

    @twofour {"done": 120, "total": 600, "what": "epoch 2 of 10, loss 0.31"}
    @twofour {"error": {"type": "InputError", "what": "...", "reasons": ["..."], "fix": "..."}}

After an error it ends with that error's exit code. Its stdin is a pipe that nobody writes to: once
it ends, the pipeline is gone, and the worker ends itself at once. On SIGTERM it ends too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from twofour.core.errors import EngineError, Error, GateError, InputError, UnsupportedError
from twofour.core.writing import write_whole

SCHEMA = "twofour.job/1"
STAGES = ("load", "sparsify", "finetune", "qat", "export")
ON_CPU = ("load", "export")
"""Stages that neither train nor prune."""
RESULT = "result.json"
MARK = "@twofour "
"""What a line on a worker's stdout begins with that the pipeline reads."""
ERRORS = {kind.__name__: kind for kind in (InputError, UnsupportedError, EngineError, GateError)}


@dataclass(frozen=True)
class Job:
    """What a worker is to do; see the module's docstring.

    Attributes:
        stage: one of `STAGES`.
        seed: of all that draws.
        threads: of engines.
        device: of pruning and training: cpu, cuda or auto.
        model: the recipe's model, paths absolute.
        data: its sources of samples, paths absolute.
        settings: the recipe's section of the stage.
        inputs: name -> file of an earlier stage.
        output: folder to write into.
        scratch: folder for a checkpoint to go on from.
    """

    stage: str
    seed: int
    threads: int
    device: str
    model: dict[str, Any]
    data: dict[str, str | None]
    settings: dict[str, Any]
    inputs: dict[str, str]
    output: str
    scratch: str

    def write(self, path: Path) -> None:
        """Writes JOB.json."""
        write_whole(path, json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1).encode())

    @staticmethod
    def read(path: Path) -> Job:
        """The inverse of `write`.

        Raises:
            InputError: it is no such file.
        """
        plain = _read(path)
        if plain.pop("schema", None) != SCHEMA or set(plain) != set(Job.__dataclass_fields__):
            raise InputError(f"{path} is no job of this version", [f"expected {SCHEMA}"])
        return Job(**plain)


@dataclass(frozen=True)
class Output:
    """A file that a worker wrote.

    Attributes:
        file: its name within the output folder.
        kind: "checkpoint", "masks", "onnx", ...
    """

    file: str
    kind: str


@dataclass(frozen=True)
class JobResult:
    """What a worker did.

    Attributes:
        outputs: name -> file.
        text: what came of it, in one line.
        notes: what the user should know.
        documents: plain data for the report page, by name.
    """

    outputs: dict[str, Output]
    text: str
    notes: tuple[str, ...] = ()
    documents: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes result.json into the output folder: the last thing that a worker does."""
        write_whole(folder / RESULT, json.dumps(asdict(self), indent=1).encode())

    @staticmethod
    def read(folder: Path) -> JobResult:
        """The inverse of `write`.

        Raises:
            InputError: there is none, or it is malformed.
        """
        plain = _read(folder / RESULT)
        try:
            outputs = {str(name): Output(**each) for name, each in plain["outputs"].items()}
            notes = tuple(str(note) for note in plain.get("notes", ()))
            return JobResult(outputs, str(plain["text"]), notes, dict(plain.get("documents", {})))
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise InputError(f"{folder / RESULT} is malformed", [str(e)]) from e


def progress_line(done: int, total: int | None, what: str) -> str:
    """What a worker prints on stdout after a piece of work."""
    return MARK + json.dumps({"done": done, "total": total, "what": what})


def error_line(error: Error) -> str:
    """What a worker prints on stdout before it ends with `error.exit_code`."""
    parts = {"what": error.what, "reasons": list(error.reasons), "fix": error.fix}
    return MARK + json.dumps({"error": {"type": type(error).__name__, **parts}})


def error_of(plain: Mapping[str, Any]) -> Error:
    """The inverse of `error_line`, of what stands under "error"."""
    kind = ERRORS.get(str(plain.get("type")), Error)
    return kind(str(plain["what"]), [str(each) for each in plain["reasons"]], str(plain["fix"]))


def _read(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"cannot read {path}", [str(e)]) from e
    if not isinstance(plain, dict):
        raise InputError(f"{path} is no JSON object", [f"got {type(plain).__name__}"])
    return plain
