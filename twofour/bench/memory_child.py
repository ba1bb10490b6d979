"""The process that `memory.py` starts: loads an engine, runs it, and prints what it held at most.

It imports what everyone has to import who runs an engine, and nothing else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from twofour.engine import Engine
from twofour.runtime.session import Session

STATUS = Path("/proc/self/status")


def main(text: str) -> None:
    """Does as the request says, JSON in and out."""
    request = json.loads(text)
    before = high_water_bytes()
    feeds = {name: np.load(path, allow_pickle=False) for name, path in request["inputs"].items()}
    with Session(Engine.load(request["engine"]), request["threads"]) as session:
        for _ in range(request["runs"]):
            session.run(feeds)
    print(json.dumps({"before_bytes": before, "peak_bytes": high_water_bytes()}))


def high_water_bytes(status: Path = STATUS) -> int:
    """The most resident memory that this process ever held.

    Not `getrusage`: its figure starts with that of the parent, if it held more before it forked.
    """
    for line in status.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    sys.exit(f"{status} does not tell VmHWM, the most memory that a process held")


if __name__ == "__main__":
    main(sys.argv[1])
