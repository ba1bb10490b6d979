"""Commands that may take so long and no longer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KILL_S = 5.0
"""Between being told to end and being ended."""
TOO_LONG = 124
"""Exit code of what was ended."""


def bounded(command: Sequence[str], log: Path, seconds: float, more: Mapping[str, str]) -> int:
    """The exit code of a command, which is ended after so long with all that it started: TOO_LONG.

    Args:
        command: is run in the checkout.
        log: gets what it prints.
        seconds: then it is told to end, and ended.
        more: variables of its environment beside those of this process.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **more}
    with log.open("w") as file:
        file.write(f"{' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_S)
            return TOO_LONG
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
