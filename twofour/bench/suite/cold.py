"""Cold start: from the start of a process to its first result, and the memory it took at most.

Each program below is the shortest that does the job, in a Python process of its own. What is timed
begins before the process and ends when it says that the result is there. Files lie in the page
cache: all programs are run once before.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twofour.bench.timing import Feeds
from twofour.core.errors import UnsupportedError

RUNS = 5
PROGRAMS = {
    "twofour": """
from twofour.engine import Engine
from twofour.runtime.session import Session
with Session(Engine.load(path)) as session:
    session.run(feeds)
    done()
""",
    "onnxruntime": """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)
done()
""",
    "openvino": """
import openvino
core = openvino.Core()
network = core.read_model(path)
network.reshape({name: list(array.shape) for name, array in feeds.items()})
config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1}
core.compile_model(network, "CPU", config).create_infer_request().infer(feeds)
done()
""",
}
# VmHWM is of this program alone; ru_maxrss would also count what its parent held when it started.
_FRAME = """
import sys
import numpy
def done():
    print("done", flush=True)
path, inputs = sys.argv[1:]
with numpy.load(inputs) as file:
    feeds = dict(file)
{program}
try:
    with open("/proc/self/status") as file:
        print(*(line.split()[1] for line in file if line.startswith("VmHWM")))
except OSError:
    print()
"""


def cold_starts(
    engine: Path, model: Path, feeds: Feeds, names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Ours, and those of the peers that have a program; one thread each.

    Args:
        engine: that we start.
        model: the ONNX file that peers start.
        feeds: the input.
        names: of peers.

    Returns:
        Name -> `first_result_s` and `peak_bytes` (None where the system does not tell), medians of
        `RUNS` processes.

    Raises:
        UnsupportedError: a program failed.
    """
    wanted = {"twofour": engine, **{name: model for name in names if name in PROGRAMS}}
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, allow_pickle=False, **feeds)
        return {name: _median(name, path, inputs) for name, path in wanted.items()}


def _median(name: str, path: Path, inputs: Path) -> dict[str, Any]:
    runs = [_start(name, path, inputs) for _ in range(RUNS + 1)][1:]
    peaks = [peak for _, peak in runs if peak is not None]
    return {
        "first_result_s": float(np.median([seconds for seconds, _ in runs])),
        "peak_bytes": int(np.median(peaks)) if peaks else None,
        "runs": len(runs),
        "program": PROGRAMS[name].strip(),
    }


def _start(name: str, path: Path, inputs: Path) -> tuple[float, int | None]:
    """Seconds to the first result, and the most memory the process held."""
    text = _FRAME.format(program=PROGRAMS[name].strip())
    command = [sys.executable, "-c", text, str(path), str(inputs)]
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        if process.stdout is None or process.stderr is None:
            raise UnsupportedError(f"cannot read what {name} says")
        first = process.stdout.readline()
        seconds = time.perf_counter() - started
        rest, errors = process.stdout.read(), process.stderr.read()
    if first.strip() != "done" or process.returncode:
        last = errors.strip().splitlines()[-5:] or [json.dumps(first)]
        raise UnsupportedError(
            f"the cold start of {name} failed", [*last, f"exit code {process.returncode}"]
        )
    return seconds, 1024 * int(rest) if rest.strip() else None
