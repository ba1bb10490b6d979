"""Starts the worker of a training stage, tells how far it is, and ends it with whoever waits.

One process is started as it is, several through torchrun. All of them read a pipe that ends with
this process, however it ends (`attachment.py`), so that none is left behind by Ctrl-C or kill.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from twofour.core.errors import Error, UnsupportedError
from twofour.core.machine import usable_cores
from twofour.core.progress import Report, silent
from twofour.pipeline.jobs import MARK, Job, JobResult, error_of

JOB, LOG = "job.json", "log.txt"
_WORKER = "twofour.pipeline.training"
_PATIENCE_S = 5.0
_ONE_HOST = {"GLOO_SOCKET_IFNAME": "lo"}
"""Processes of one machine need no network, whatever its name resolves to."""


def run_job(job: Job, folder: Path, report: Report = silent) -> JobResult:
    """Does a training job in processes of its own.

    `job.scratch` gets the job's file and its log, which later runs of the same job are added to.
    The processes share the cores, unless OMP_NUM_THREADS says how many threads each is to have.

    Args:
        job: what is to be done; `settings.processes` of them do it.
        folder: of the recipe: the working directory, where `module:function` is looked for first.
        report: told how far it is.

    Returns:
        What came of it; the files are in `job.output`.

    Raises:
        Error: what the worker told, with the place of its log.
        UnsupportedError: the worker ended without a word, or PyTorch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        what = f"stage {job.stage} needs PyTorch, which is not installed"
        raise UnsupportedError(what, fix="pip install 'twofour[train]', or begin with an ONNX file")
    scratch = Path(job.scratch)
    job.write(scratch / JOB)
    log = scratch / LOG
    processes = int(job.settings.get("processes", 1))
    threads = max(1, usable_cores() // processes)
    command = _command(job, processes)
    with log.open("ab") as file, _worker(command, folder, threads, file) as worker:
        told = _follow(worker, file, report)
        code = worker.wait()
    if told is not None:
        fix = f"{told.fix}\n  log: {log}" if told.fix else f"see {log}"
        raise type(told)(told.what, told.reasons, fix)
    if code:
        raise _silent_end(job.stage, code, log)
    return JobResult.read(Path(job.output))


def _command(job: Job, processes: int) -> list[str]:
    worker = ["-m", _WORKER, job.stage, str(Path(job.scratch) / JOB)]
    if processes == 1:
        return [sys.executable, *worker]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    return [sys.executable, *torchrun, f"--nproc-per-node={processes}", *worker]


@contextmanager
def _worker(
    command: list[str], folder: Path, threads: int, log: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """The process, in a session of its own; gone when this ends."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    changed = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={"OMP_NUM_THREADS": str(threads), **_ONE_HOST, **os.environ, **changed},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Lets all of its processes end: they see the end of their stdin; torchrun gets a signal."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
    process.stdout.close()


def _follow(worker: subprocess.Popen[bytes], log: IO[bytes], report: Report) -> Error | None:
    """Reads what the worker tells until it ends; the first error counts, others follow from it."""
    told: Error | None = None
    assert worker.stdout is not None
    for line in worker.stdout:
        plain = _plain(line)
        if plain is None:
            log.write(line)
            log.flush()
        elif "error" in plain:
            told = told or error_of(plain["error"])
        else:
            report(plain["done"], plain["total"], plain["what"])
    return told


def _plain(line: bytes) -> dict[str, Any] | None:
    """What a line of ours says; None for any other."""
    if not line.startswith(MARK.encode()):
        return None
    try:
        found = json.loads(line[len(MARK) :])
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _silent_end(stage: str, code: int, log: Path) -> UnsupportedError:
    ending = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    fix = f"if memory ran out, use smaller batches; see {log}"
    return UnsupportedError(f"the process of stage {stage} {ending}", ["without a word"], fix)
