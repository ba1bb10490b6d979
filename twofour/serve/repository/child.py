"""The program of a process that builds: the command line at low priority, until its parent ends.

It is run as a file, with `python -P`, so that nothing in its working folder can be imported. Its
standard input is a pipe whose other end the parent holds and never writes to: however the parent
ends, that pipe does, and this process and all that it started are killed.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
from pathlib import Path

_NICE = 10


def _end_with_parent() -> None:
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    os.nice(_NICE)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.path.append(os.fspath(Path(__file__).resolve().parents[3]))  # where a checkout has twofour
    runpy.run_module("twofour", run_name="__main__", alter_sys=True)
