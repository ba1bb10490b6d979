"""The worker of hostile models, and how it is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Judge = Callable[[Path], dict[str, Any]]


@contextmanager
def judging() -> Iterator[Judge]:
    """Gives a function that says how a case ends; one process starts them all (worker.py)."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz.worker"],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None

    def ask(path: Path) -> dict[str, Any]:
        worker.stdin.write(f"{path}\n")
        worker.stdin.flush()
        found: dict[str, Any] = json.loads(worker.stdout.readline())
        return found

    yield ask
    worker.stdin.close()
    worker.wait()
