"""Damaged models end in a result or in one clear error: no crash, no trace, no hang.

Here about a minute, with the same seeds each time; longer on demand, from where the last seed was:

    python -m pytest tests/fuzz --fuzz-seconds 3600 --fuzz-seed 100000

Each case runs in a process of its own with limits on memory and time (worker.py). A file that is
not taken as it should be is kept in the folder that the failure names, and fails again by itself:

    echo FILE | python -m tests.fuzz.worker
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.judge import ROOT, Judge, judging
from tests.fuzz.models import generated
from tests.fuzz.mutate import mutate

SEEDS, SECONDS = 450, 60.0  # of the short run, whichever ends first
_LARGEST_BYTES = 700_000  # real files beyond are slow to build
_ALLOWED = ("passed", "refused")


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    """How a case ends."""
    with judging() as ask:
        yield ask


@pytest.fixture(scope="module")
def sources(data_folder_or_none: Path | None) -> dict[str, bytes]:
    """The generated models, and real ones where they are."""
    found = {name: model.SerializeToString() for name, model in generated().items()}
    if data_folder_or_none is not None:
        for path in sorted((data_folder_or_none / "onnx").glob("*.onnx")):
            if path.stat().st_size <= _LARGEST_BYTES and "BROKEN" not in path.name:
                found[path.stem] = path.read_bytes()
    return found


def test_undamaged_models_pass(sources, judge, tmp_path):
    for name, data in sources.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(data)
        ended = judge(path)
        needs_shapes = "nothing to compute at these shapes" in ended["text"]
        assert ended["end"] == "passed" or needs_shapes, (name, ended)


def test_damaged_models_end_well(sources, judge, tmp_path, request):
    seconds = request.config.getoption("--fuzz-seconds")
    first = request.config.getoption("--fuzz-seed")
    until = time.monotonic() + (seconds or SECONDS)
    names, ends, found, seed = sorted(sources), {}, [], first
    while time.monotonic() < until and (seconds or seed < first + SEEDS):
        path = tmp_path / "case.onnx"
        name = names[seed % len(names)]
        path.write_bytes(mutate(sources[name], seed))
        ended = judge(path)
        ends[ended["end"]] = ends.get(ended["end"], 0) + 1
        if ended["end"] not in _ALLOWED:
            kept = path.rename(tmp_path / f"{name}_{seed}.onnx")
            found.append(f"{kept}: {ended['end']} in {ended['stage']}: {ended['text'][-500:]}")
        seed += 1
    print(f"seeds {first} to {seed - 1}: {ends}")
    assert not found, "\n".join(found)
    assert ends["passed"] > 0, "no damage was survivable: nothing beyond loading was tried"
    assert ends["refused"] > 0


@pytest.mark.parametrize(
    ("code", "end", "text"),
    [
        ("os.kill(os.getpid(), 11)", "crash", "SIGSEGV"),
        ("raise ValueError('a bug')", "bug", "a bug"),
        ("bytearray(1 << 40)", "bug", "MemoryError"),
        ("raise Error('')", "bug", "Error"),
        ("raise Error('what')", "refused", "what"),
        ("time.sleep(60)", "hang", ""),
    ],
)
def test_the_worker_sees_what_goes_wrong(code, end, text):
    """The fuzz test can fail: each way of failing, planted."""
    script = f"""
import os, time
from pathlib import Path
from tests.fuzz import worker
from twofour.core.errors import Error
worker.WALL_S = 1.0
def case(path, stage, say):
    {code}
worker._case = case
print(worker.judged(Path("none")))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"'end': '{end}'" in done.stdout
    assert text in done.stdout
