"""Run on an emulated machine: engines on given inputs, their outputs or why they were refused.

    python guest.py FOLDER NAME...

For each NAME: FOLDER/NAME.engine on FOLDER/inputs.npz, with one thread and with two, twice each;
outputs to FOLDER/NAME.npz, or the error to FOLDER/NAME.txt.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import numpy as np

from twofour.core.errors import UnsupportedError
from twofour.core.target import host_target
from twofour.engine import Engine
from twofour.runtime.session import Session


def outputs(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of an engine; the same whatever runs it, or an error."""
    engine = Engine.load(path)
    names = {info.name for info in engine.plan.inputs}
    mine = {name: value for name, value in feeds.items() if name in names}
    found: dict[str, np.ndarray] = {}
    for threads in (1, 2):
        with Session(engine, threads) as session:
            for _ in range(2):
                got = session.run(mine)
                for name, value in got.items():
                    assert np.array_equal(found.setdefault(name, value.copy()), value), name
    return found


def main() -> None:
    folder, *names = sys.argv[1:]
    feeds = dict(np.load(Path(folder) / "inputs.npz"))
    print(platform.machine(), host_target())
    for name in names:
        path = Path(folder) / f"{name}.engine"
        try:
            np.savez(path.with_suffix(".npz"), **outputs(path, feeds))
        except UnsupportedError as error:
            path.with_suffix(".txt").write_text(str(error))


if __name__ == "__main__":
    main()
