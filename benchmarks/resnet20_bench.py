"""Writes `resnet20_bench.md`: `twofour bench` on the engines of the CIFAR-10 example.

    python benchmarks/resnet20_bench.py                  # after examples/cifar10_resnet20.py
    python benchmarks/resnet20_bench.py --folder DIR --duration 1 --output bench.md

ONNX Runtime is at its best on another INT8 file than the engines are built from, so the INT8 engine
is measured beside both.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from twofour.core.target import detect_host
from twofour.core.version import __version__

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("runs/cifar10")
CLI = (sys.executable, "-c", "from twofour.cli import main; main()")
PEERS = "onnxruntime,openvino"


@dataclass(frozen=True)
class Duel:
    """One run of `twofour bench`.

    Attributes:
        title: of its section.
        engine: ours, within the folder.
        model: the peers' file, within the folder.
    """

    title: str
    engine: str
    model: str


DUELS = (
    Duel("2:4 INT8, all on the same file", "24/int8.engine", "24/int8.onnx"),
    Duel(
        "2:4 INT8, peers on a file as ONNX Runtime likes it best", "24/int8.engine", "24/uint8.onnx"
    ),
    Duel("2:4/pair INT8, peers on its file", "24-pair/int8.engine", "24-pair/int8.onnx"),
    Duel("dense INT8, all on the same file", "dense/int8.engine", "dense/int8.onnx"),
    Duel("2:4 float32, peers on the dense file", "24/f32.engine", "dense/f32.onnx"),
)


def measured(duel: Duel, folder: Path, duration_s: float) -> str:
    """One section: the command, and what it printed.

    Raises:
        subprocess.CalledProcessError: it failed; its message is on stderr.
    """
    options = ["--vs", PEERS, "--threads", "1", "--duration", f"{duration_s:g}"]

    def arguments(base: Path) -> list[str]:
        return ["bench", str(base / duel.engine), "--model", str(base / duel.model), *options]

    done = subprocess.run(
        [*CLI, *arguments(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    shown = shlex.join(["twofour", *arguments(FOLDER)])
    output = "\n".join(line.rstrip() for line in done.stdout.splitlines())
    return f"## {duel.title}\n\n    {shown}\n\n```\n{output}\n```\n"


def page(sections: list[str]) -> str:
    """The whole page."""
    host = detect_host()
    return (
        "# ResNet-20: `twofour bench`\n\n"
        "    python examples/cifar10_resnet20.py --bf16\n"
        "    python benchmarks/resnet20_bench.py\n\n"
        "Random input of batch 1, one thread. Each section is one command; within it the engines "
        "take turns, so all see the same machine.\n\n"
        f"Machine: {host.model}, {host.cores} cores. twofour {__version__}.\n\n"
        + "\n".join(sections)
    )


def main() -> int:
    """Returns the exit code of the run that failed, or 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="--out of the example")
    parser.add_argument("--duration", type=float, default=10.0, help="timed seconds a section")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "resnet20_bench.md", help="the page"
    )
    args = parser.parse_args()
    missing = [d for d in DUELS if not (args.folder / d.engine).is_file()]
    if missing:
        print(f"no {args.folder / missing[0].engine}: run the example first", file=sys.stderr)
        return 2
    args.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        sections = [measured(duel, args.folder, args.duration) for duel in DUELS]
    except subprocess.CalledProcessError as e:
        return int(e.returncode)
    args.output.write_text(page(sections))
    return 0


if __name__ == "__main__":
    sys.exit(main())
