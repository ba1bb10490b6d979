"""All that needs a GPU in one go: jobs in turn on the GPUs there are, bounded, and taken home."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import (
    cuda_accuracy,
    cuda_all,
    cuda_convolutions,
    cuda_kernels,
    cuda_networks,
    cuda_rows,
)
from benchmarks.cuda.jobs import JOBS, NETWORKS, Job, Places, chosen
from tests.examples.test_recovery import script

WRITES = "import os, sys; open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
GROWS = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", sys.argv[1]])
print("begun", flush=True)
time.sleep(60)
"""


@pytest.fixture
def places(tmp_path: Path) -> Places:
    found = Places(tmp_path / "results", tmp_path / "kept")
    found.results.mkdir()
    found.kept.mkdir()
    return found


def job(name: str, code: str = WRITES, **more: object) -> Job:
    limits = {"least_s": 1.0, "most_s": 30.0} | more
    return Job(
        name, lambda places, seconds: ["-c", code, places.results / f"{name}.made"], **limits
    )


def run(jobs: list[Job], places: Places, seconds: float = 40.0, gpus: tuple[str, ...] = ("0",)):
    return cuda_all.Run(jobs, gpus, places, seconds).all()


def made(places: Places, name: str) -> str:
    return (places.results / f"{name}.made").read_text()


def test_each_gpu_has_a_job_of_its_own(places: Places) -> None:
    waits = "import os, sys, time; time.sleep(0.5); " + WRITES.partition("; ")[2]
    jobs = [job("a", waits), job("b", waits, others=True), job("c", waits, gpu=False)]
    assert run(jobs, places, gpus=("4", "7")) == {"a": 0, "b": 0, "c": 0}
    seen = {made(places, "a"), made(places, "b")}
    assert seen in ({"4", "7,4"}, {"7", "4,7"})
    assert made(places, "c") == ""


def test_a_job_waits_for_what_it_needs_and_others_do_not(places: Places) -> None:
    slow = "import sys, time; time.sleep(1); open(sys.argv[1], 'w').write(str(time.time()))"
    when = "import sys, time; open(sys.argv[1], 'w').write(str(time.time()))"
    jobs = [
        job("files", slow, gpu=False),
        job("needs", when, after=("files",)),
        job("other", when),
    ]
    assert set(run(jobs, places).values()) == {0}
    assert made(places, "other") < made(places, "files") < made(places, "needs")


def test_a_job_whose_needs_failed_is_not_begun(places: Places, capsys) -> None:
    jobs = [job("files", "raise SystemExit(3)", gpu=False), job("needs", after=("files",))]
    assert run(jobs, places) == {"files": 3}
    assert "needs: not begun, it needs files" in capsys.readouterr().out
    assert not (places.results / "needs.made").exists()


def test_a_job_that_takes_too_long_ends_with_all_that_it_started(places: Places) -> None:
    began = time.monotonic()
    assert run([job("endless", GROWS, most_s=2.0), job("next")], places) == {
        "endless": 124,
        "next": 0,
    }
    assert time.monotonic() - began < 30
    assert "begun" in (places.results / "endless.log").read_text()
    for each in Path("/proc").glob("[0-9]*"):
        try:
            told = (each / "cmdline").read_text(errors="replace")
            assert str(places.results) not in told, "it runs on"
        except OSError:
            continue


def test_no_job_is_begun_that_there_is_no_time_for(places: Places, capsys) -> None:
    assert run([job("long", least_s=100.0), job("short")], places) == {"short": 0}
    assert "long: not begun, no time left" in capsys.readouterr().out


def test_results_are_packed_after_each_job(places: Places) -> None:
    run([job("first"), job("second", "raise SystemExit(1)")], places)
    with tarfile.open(places.results / cuda_all.PACKED) as packed:
        names = packed.getnames()
        told = packed.extractfile("jobs.txt").read().decode()
    assert sorted(names) == ["first.log", "first.made", "jobs.txt", "second.log"]
    assert "first on GPU 0: exit code 0" in told
    assert "second on GPU 0: exit code 1" in told


def test_jobs_come_behind_what_they_need() -> None:
    assert [each.name for each in chosen(["accuracy_trained", "bert_1", "tests"])] == [
        *("train", "accuracy_trained", "files_bert", "bert_1", "tests")
    ]
    assert chosen([]) == list(JOBS)
    with pytest.raises(ValueError, match="no job bart; there are files_bert"):
        chosen(["bart"])


def test_the_command_lines_are_those_of_the_benchmarks(places: Places) -> None:
    """Each job's words are read by the command it starts."""
    parsers = {
        "benchmarks.cuda_networks": cuda_networks.parser,
        "benchmarks.cuda_accuracy": cuda_accuracy.parser,
        "benchmarks.cuda_kernels": cuda_kernels.parser,
        "benchmarks.cuda_rows": cuda_rows.parser,
        "benchmarks.cuda_convolutions": cuda_convolutions.parser,
        "examples/cifar10_gpu.py": script("cifar10_gpu").parser,
    }
    read = set()
    for each in JOBS:
        words = each.command(places, 100.0)[1:]
        name = words[1] if words[0] == "-m" else words[0]
        if name in parsers:
            parsers[name]().parse_args(words[2:] if words[0] == "-m" else words[1:])
            read.add(name)
    assert read == set(parsers)
    assert {each.name.removeprefix("files_") for each in JOBS if not each.gpu} == set(NETWORKS)


def test_gpus_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,GPU-0")
    assert cuda_all.visible() == ["GPU-1", "GPU-0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cuda_all.visible() == []
    with pytest.raises(SystemExit):
        cuda_all.main(["--jobs", "tests"])
