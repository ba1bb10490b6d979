"""Everything that needs a GPU, in one go: tests, tables, training, accuracy, on all GPUs here.

    python -m benchmarks.cuda_all --output runs/gpu                    # all, within ten minutes
    python -m benchmarks.cuda_all --output runs/gpu --jobs bert_32,tests --seconds 300
    python -m benchmarks.cuda_all --list                               # the jobs

Each GPU takes the next job for which enough time is left; what needs no GPU is done beside. A job
has a log and a folder of tables in the output, which `results.tar.gz` there holds, too, packed anew
after each job, so that what was measured survives whatever ends the rest. `--keep` names a folder
for what a later call can use again: files of networks, engines, what was compiled and trained.
Tables of several jobs or calls are joined by `--add` of the benchmark that wrote them.

The environment's `TWOFOUR_DATA` names the folder of real data; without CIFAR-10 in it nothing is
trained or judged.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cuda.bounded import KILL_S, bounded
from benchmarks.cuda.jobs import JOBS, Job, Places, chosen
from twofour.core.gpus import read_capabilities

PACKED = "results.tar.gz"
_SHOWN, _CPUS = 12, 2
_THREADS = "8"
"""Of a job without a GPU: with one for each core they would be in each other's way."""
VISIBLE = "CUDA_VISIBLE_DEVICES"


class Run:
    """Jobs on the GPUs of a machine, until all are done or the time is over.

    Args:
        jobs: in the order in which they are begun.
        gpus: what `CUDA_VISIBLE_DEVICES` calls each.
        places: for what is made.
        seconds: of the whole.
    """

    def __init__(self, jobs: Sequence[Job], gpus: Sequence[str], places: Places, seconds: float):
        """Begins nothing yet."""
        self.left, self.gpus, self.places = list(jobs), list(gpus), places
        self.end = time.monotonic() + seconds
        self.codes: dict[str, int] = {}
        self.changed = threading.Condition()
        self.running: set[str] = set()

    def all(self) -> dict[str, int]:
        """Runs them; returns the exit codes of those that were begun."""
        workers = [(gpu,) for gpu in self.gpus] + [()] * _CPUS
        threads = [threading.Thread(target=self._work, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for job in self.left:
            lost = [name for name in job.after if self.codes.get(name, 1)]
            self._tell(
                f"{job.name}: not begun, {f'it needs {lost[0]}' if lost else 'no time left'}"
            )
        return self.codes

    def _work(self, gpus: tuple[str, ...]) -> None:
        while (job := self._next(with_gpu=bool(gpus))) is not None:
            code = 1
            try:
                code = self._run(job, gpus)
            finally:
                with self.changed:
                    self.running.remove(job.name)
                    self.codes[job.name] = code
                    self._pack()
                    self.changed.notify_all()

    def _next(self, *, with_gpu: bool) -> Job | None:
        """Waits where a job's needs are still to come; None: there is nothing left to be done."""
        with self.changed:
            while True:
                may = [job for job in self.left if job.gpu == with_gpu and self._may_run(job)]
                for job in may:
                    if all(name in self.codes for name in job.after):
                        self.left.remove(job)
                        self.running.add(job.name)
                        return job
                if not may:
                    return None
                self.changed.wait(timeout=1.0)

    def _may_run(self, job: Job) -> bool:
        """There is time for it, and what it needs was made, or is still to come."""
        if job.least_s > self.end - time.monotonic():
            return False
        left = {each.name: each for each in self.left}
        return all(
            self.codes.get(name) == 0
            or name in self.running
            or (name in left and self._may_run(left[name]))
            for name in job.after
        )

    def _run(self, job: Job, gpus: tuple[str, ...]) -> int:
        began = time.monotonic()
        limit = min(job.most_s, self.end - began - KILL_S)
        others = [gpu for gpu in self.gpus if gpu not in gpus] if job.others else []
        environment = {VISIBLE: ",".join([*gpus, *others])}
        environment |= {} if gpus else {"OMP_NUM_THREADS": _THREADS}
        command = job.command(self.places, limit)
        path = self.places.results / f"{job.name}.log"
        code = bounded(command, path, limit, environment)
        told = path.read_text(errors="replace").splitlines()[-_SHOWN:]
        on = f" on GPU {gpus[0]}" if gpus else ""
        title = f"{job.name}{on}: exit code {code}, {time.monotonic() - began:.0f} of {limit:.0f} s"
        self._tell("\n".join([title, *(f"    {line[:200]}" for line in told)]))
        return code

    def _tell(self, text: str) -> None:
        print(f"== {text}", flush=True)
        with (self.places.results / "jobs.txt").open("a") as log:
            log.write(text.partition("\n")[0] + "\n")

    def _pack(self) -> None:
        """Results, without what is written meanwhile being broken by it."""
        made = self.places.results / PACKED
        part = made.with_suffix(".part")
        with tarfile.open(part, "w:gz") as packed:
            for path in sorted(self.places.results.iterdir()):
                if path not in (made, part):
                    packed.add(path, path.name)
        part.replace(made)


def visible() -> list[str]:
    """The GPUs of this machine that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    told = os.environ.get(VISIBLE)
    if told is not None:
        return [name.strip() for name in told.split(",") if name.strip()]
    return [str(index) for index in range(len(read_capabilities()))]


def _show() -> None:
    for job in JOBS:
        needs = f"  after {', '.join(job.after)}" if job.after else ""
        print(f"{job.name:16}{job.most_s:5.0f} s at most{'' if job.gpu else ', no GPU'}{needs}")


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line; returns 1 if a job failed or was not done."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder for results")
    made.add_argument("--keep", type=Path, help="folder for what a later call can use again")
    made.add_argument("--jobs", default="", help="names, in the order in which they are begun")
    made.add_argument("--seconds", type=float, default=580.0, help="of the whole")
    made.add_argument("--list", action="store_true", help="show the jobs")
    args = made.parse_args(arguments)
    if args.list:
        _show()
        return 0
    try:
        jobs = chosen([name.strip() for name in args.jobs.split(",") if name.strip()])
    except ValueError as e:
        made.error(str(e))
    gpus = visible()
    if not gpus:
        made.error("there is no NVIDIA GPU here that this process may use")
    with tempfile.TemporaryDirectory() as folder:
        places = Places(args.output.absolute(), (args.keep or Path(folder)).absolute())
        for each in (places.results, places.kept):
            each.mkdir(parents=True, exist_ok=True)
        codes = Run(jobs, gpus, places, args.seconds).all()
    return int(any(codes.get(job.name, 1) for job in jobs))


if __name__ == "__main__":
    sys.exit(main())
