"""What there is to be run on a GPU: commands, how long they take, and what they need."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

_END_S = 10.0
"""Before its limit a job that bounds itself is to be done."""


@dataclass(frozen=True)
class Places:
    """Where jobs leave what they make.

    Attributes:
        results: tables and logs, which are taken home.
        kept: networks, engines, what was trained and compiled: for other jobs, and later calls.
    """

    results: Path
    kept: Path


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: of its log and of its folder of tables.
        words: (places, seconds it may take) -> the command, without the interpreter.
        least_s: it is not begun where less is left.
        most_s: it is ended after so long.
        after: jobs whose results it needs.
        gpu: whether it has a GPU to itself.
        others: whether it sees the other GPUs, too, behind its own.
    """

    name: str
    words: Callable[[Places, float], Sequence[object]]
    least_s: float
    most_s: float
    after: tuple[str, ...] = ()
    gpu: bool = True
    others: bool = False

    def command(self, places: Places, seconds: float) -> list[str]:
        """What is started for it."""
        return [sys.executable, *map(str, self.words(places, seconds))]


def _tests(*paths: str) -> Callable[[Places, float], list[object]]:
    found: list[object] = ["-m", "pytest", *paths, "-m", "gpu", "-q", "--tb=short"]
    found += ["-p", "no:cacheprovider", "--durations=8"]
    found += ["-n6"] if find_spec("xdist") else []
    found += ["--timeout=200"] if find_spec("pytest_timeout") else []
    return lambda places, seconds: found


def _kernels(places: Places, seconds: float) -> list[object]:
    return [
        *("-m", "benchmarks.cuda_kernels", "--output", places.results / "kernels"),
        *("--seconds", round(seconds - 3 * _END_S), "--algorithms", 60),
    ]


def _table(module: str, places: Places, seconds: float) -> list[object]:
    return ["-m", f"benchmarks.{module}", "--output", places.results / module]


def _train(places: Places, seconds: float) -> list[object]:
    table = places.results / "train" / "cifar10_gpu.md"
    made = ["--out", places.kept / "trained", "--table", table]
    return ["examples/cifar10_gpu.py", "--device", "cuda", "--amp", *made]


def _accuracy(name: str, places: Places, seconds: float) -> list[object]:
    return [
        *("-m", "benchmarks.cuda_accuracy", "--output", places.results / name),
        *("--seconds", round(seconds - 3 * _END_S)),
    ]


def _trained(places: Places, seconds: float) -> list[object]:
    """Of the one network that `train` has trained."""
    words = ["--only", "resnet56", "--trained", places.kept / "trained"]
    return [*_accuracy("accuracy_trained", places, seconds), *words]


def _files(network: str) -> Job:
    """Writes a network's files, for which no GPU is needed."""

    def words(places: Places, seconds: float) -> list[object]:
        return ["-m", "benchmarks.cuda.cases", places.kept / "networks", network]

    return Job(f"files_{network}", words, 10.0, 240.0, gpu=False)


def _network(network: str, batch: int, most_s: float, compile_s: float, kinds: str = "") -> Job:
    """A row of the table of networks; of our engines only some kinds, if any are named."""
    name = f"{network}_{batch}"
    chosen = ["--kinds", kinds] if kinds else []

    def words(places: Places, seconds: float) -> list[object]:
        return [
            *("-m", "benchmarks.cuda_networks", "--output", places.results / name),
            *("--files", places.kept / "networks", "--plans", places.results / "plans"),
            *("--compile-cache", places.kept / f"{name}.tar.gz"),
            *("--networks", network, "--batches", batch, "--seconds", round(seconds - _END_S)),
            *("--compile-seconds", round(compile_s), "--build-seconds", 90, *chosen),
        ]

    return Job(name, words, most_s / 2, most_s, (f"files_{network}",))


_NEWEST = tuple(f"tests/gpu/test_{name}.py" for name in ("early", "engines", "serving"))
NETWORKS = ("bert", "resnet50", "llama_mlp", "resnet34")

# In the order in which they are begun: what takes long and tells most comes first, what needs no
# files while they are made. The limits are what the jobs took on an H200, and some. ResNet-34 has
# a figure to reach for 2:4 over dense alone, so that nothing is compiled for it, which takes long.
JOBS = (
    *map(_files, NETWORKS),
    Job("tests_early", _tests(*_NEWEST), 30.0, 150.0),
    Job("kernels", _kernels, 100.0, 260.0),
    Job("rows", partial(_table, "cuda_rows"), 60.0, 150.0),
    Job("convolutions", partial(_table, "cuda_convolutions"), 120.0, 260.0),
    _network("resnet50", 32, 560.0, 420.0),
    _network("resnet34", 32, 200.0, 0.0, "int8"),
    _network("bert", 256, 300.0, 120.0, "int8"),
    _network("bert", 32, 320.0, 120.0),
    Job("accuracy", partial(_accuracy, "accuracy"), 80.0, 300.0),
    _network("llama_mlp", 2048, 240.0, 60.0, "int8,fp8"),
    Job("train", _train, 120.0, 240.0),
    Job("accuracy_trained", _trained, 100.0, 240.0, ("train",)),
    _network("bert", 1, 240.0, 120.0, "int8,fp8"),
    _network("resnet50", 1, 560.0, 400.0, "int8,fp8"),
    _network("llama_mlp", 128, 160.0, 60.0, "int8,fp8"),
    _network("llama_mlp", 1, 160.0, 60.0, "int8,fp8"),
    _network("resnet50", 256, 560.0, 400.0, "int8"),
    Job("tests", _tests("tests/gpu"), 60.0, 360.0, others=True),
    *(_network("llama_mlp", batch, 160.0, 60.0, "int8,fp8") for batch in (512, 16)),
    *(_network("resnet34", batch, 200.0, 0.0, "int8") for batch in (1, 256)),
)


def chosen(names: Sequence[str]) -> list[Job]:
    """These jobs in this order, each behind those it needs; all, if none is named.

    Raises:
        ValueError: there is no such job.
    """
    known = {job.name: job for job in JOBS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no job {', '.join(unknown)}; there are {', '.join(known)}")
    found: dict[str, Job] = {}
    for name in names or known:
        found |= {before: known[before] for before in known[name].after if before not in found}
        found[name] = known[name]
    return list(found.values())
