"""Writes `cuda_networks.json` and `.md`: our engines on a GPU beside PyTorch, eager and compiled.

    python -m benchmarks.cuda_networks --output DIR
    python -m benchmarks.cuda_networks --output DIR --networks bert --batches 32 --seconds 120
    python -m benchmarks.cuda_networks --output DIR --device cpu --networks small_mlp

Each network and batch is a row; what was measured before stays in the files, and is replaced when
it is measured again. `--add` joins tables of several GPUs or runs. `--seconds` bounds the whole:
rows that no time is left for are left out, and named at the end. `--compile-cache F.tar.gz` keeps
what torch.compile found for another run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.cuda import our_side, torch_side
from benchmarks.cuda.cases import DEFAULT, WORKS
from benchmarks.cuda.machine import TOOLS, device, say
from benchmarks.cuda.page import EAGER, Row, best, closeness, judged, page, read_outputs
from benchmarks.cuda.turns import Lost, Process
from benchmarks.document import about, write

NAME, TITLE = "cuda_networks", "Networks on a GPU, beside PyTorch"
_ANSWER_S, _FILES_S, _LEAST_S = 60.0, 240.0, 20.0
_MEASURE_S = 30.0
"""Kept for the turns, latencies, outputs and joules of what is open when the time runs short."""


class Table:
    """The measurement of all rows.

    Args:
        args: of the command line.
        folder: for files that are needed meanwhile.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        """Starts both processes."""
        self.args, self.folder = args, folder
        self.end = time.monotonic() + args.seconds - _MEASURE_S
        log = args.output / f"{NAME}.log"
        self.torch = Process(
            partial(torch_side.TorchSide, args.device, folder, args.autotune_from), "PyTorch", log
        )
        ours = partial(our_side.OurSide, args.device, folder, args.effort, args.plans)
        self.ours = Process(ours, "our engines", log)
        kinds = our_side.ON_GPU if args.device == "cuda" else our_side.ON_CPU
        self.kinds = [k for k in kinds if not args.kinds or any(w in k for w in args.kinds)]
        self.theirs = list(torch_side.ON_GPU if args.device == "cuda" else torch_side.ON_CPU)

    @property
    def left_s(self) -> float:
        """Of the time that was given, without what measuring takes."""
        return self.end - time.monotonic()

    def row(self, network: str, batch: int) -> Row:
        """Measures one network at one batch."""
        began = time.monotonic()
        files = self.ours.ask("files", network, timeout_s=_FILES_S)
        opened = self._opened(self.torch, self._first_slow(), (network, batch))
        if isinstance(files, Lost):
            opened += [{"name": kind, "reason": files.reason} for kind in self.kinds]
        else:
            opened += self._opened(self.ours, self.kinds, (network, batch))
        everyone = [(self._of(each), each) for each in opened]
        rounds = self._race(everyone, (network, batch))
        for each in opened:
            times = rounds.get(each["name"])
            if times:
                low, median, high = np.quantile(times, [0.25, 0.5, 0.75])
                each |= {"us": float(median), "spread_us": float(high - low)}
        self._latencies(everyone)
        self._closeness(everyone, WORKS[network].classes)
        self._energies(everyone)
        for process in (self.torch, self.ours):
            process.ask("close", timeout_s=_ANSWER_S)
        made: Row = {"network": network, "batch": batch, "contestants": opened}
        made["seconds"] = round(time.monotonic() - began, 1)
        return {**made, "figures": judged(made, rounds)}

    def close(self) -> None:
        """Ends both processes."""
        self.torch.end()
        self.ours.end()

    def _first_slow(self) -> list[str]:
        """PyTorch's kinds; what may have to be ended for its slowness comes first."""
        return [k for k in self.theirs if "compile" not in k or self.args.compile_seconds > 0]

    def _of(self, entry: Row) -> Process:
        return self.ours if entry["name"].startswith("twofour") else self.torch

    def _opened(self, process: Process, kinds: list[str], case: tuple[str, int]) -> list[Row]:
        found: list[Row] = []
        for kind in kinds:
            starts = process.starts
            if self.left_s < _LEAST_S:
                found.append({"name": kind, "reason": "no time was left"})
                continue
            began = time.monotonic()
            answer = self._open(process, kind, case)
            ready = "ready" if isinstance(answer, list) else answer.reason
            say(f"  {kind}: {ready}, {time.monotonic() - began:.1f} s")
            if process.starts != starts:
                self._reopen(process, found, case)
            lost = [{"name": kind, "reason": ready}]
            found += answer if isinstance(answer, list) else lost
        return found

    def _open(self, process: Process, kind: str, case: tuple[str, int]) -> list[Row] | Lost:
        limit = self.args.compile_seconds if "compile" in kind else self.args.build_seconds
        timeout_s = max(1.0, min(limit, self.left_s))
        answer: list[Row] | Lost = process.ask("open", *case, kind, timeout_s=timeout_s)
        return answer

    def _reopen(self, process: Process, opened: list[Row], case: tuple[str, int]) -> None:
        """What was open in a process that had to be started anew."""
        kinds = {each["name"].removesuffix(torch_side.GRAPH): each for each in opened}
        for kind, each in kinds.items():
            if "reason" not in each:
                answer = self._open(process, kind, case)
                if isinstance(answer, Lost):
                    each["reason"] = answer.reason

    def _race(
        self, everyone: list[tuple[Process, Row]], case: tuple[str, int]
    ) -> dict[str, list[float]]:
        """Microseconds of the turns of all that are open; one that fails is out, with a reason."""
        times: dict[str, list[float]] = {}
        for _ in range(self.args.rounds):
            for process, each in everyone:
                if "reason" in each:
                    continue
                starts = process.starts
                got = process.ask("turn", each["name"], self.args.slice_s, timeout_s=_ANSWER_S)
                if isinstance(got, Lost):
                    say(f"  {each['name']}: {got.reason}")
                    each["reason"] = got.reason
                    times.pop(each["name"], None)
                    if process.starts != starts:
                        self._reopen(process, [e for p, e in everyone if p is process], case)
                else:
                    times.setdefault(each["name"], []).append(got)
        return times

    def _latencies(self, everyone: list[tuple[Process, Row]]) -> None:
        for process, each in everyone:
            if "us" in each:
                got = process.ask("latency", each["name"], timeout_s=_ANSWER_S)
                each["latency_us"] = None if isinstance(got, Lost) else got

    def _closeness(self, everyone: list[tuple[Process, Row]], classes: bool) -> None:
        """Each one's outputs beside those of PyTorch in float32."""
        wanted = None
        for process, each in sorted(everyone, key=lambda pair: pair[1]["name"] != EAGER):
            if "us" not in each:
                continue
            path = self.folder / "outputs.npz"
            got = process.ask("outputs", each["name"], path, timeout_s=_ANSWER_S)
            if isinstance(got, Lost):
                each["note"] = got.reason
                continue
            arrays = read_outputs(path)
            wanted = arrays if each["name"] == EAGER else wanted
            if wanted is not None:
                each |= closeness(arrays, wanted, classes)

    def _energies(self, everyone: list[tuple[Process, Row]]) -> None:
        """Of PyTorch's float32, the best of torch.compile, and our best of both weights."""
        rows = [each for _, each in everyone]
        chosen = [best(rows, *words) for words in (("compile",), ("2:4",), ("twofour", "dense"))]
        names = {EAGER, *(each["name"] for each in chosen if each is not None)}
        for process, each in everyone:
            if each["name"] not in names or "us" not in each or not self.args.energy_seconds:
                continue
            seconds = self.args.energy_seconds
            got = process.ask("energy", each["name"], seconds, timeout_s=_ANSWER_S)
            each |= {"no_energy": got.reason} if isinstance(got, Lost) else got


def run(args: argparse.Namespace) -> int:
    """Measures, and writes after each row."""
    args.output.mkdir(parents=True, exist_ok=True)
    left = [
        (network, batch)
        for network in args.networks
        for batch in (args.batches or WORKS[network].batches)
    ]
    with tempfile.TemporaryDirectory() as made:
        folder = args.files or Path(made)
        unpacked = _unpack(args.compile_cache, folder / "inductor")
        say(f"what torch.compile keeps: {unpacked}")
        table = Table(args, folder)
        try:
            while left and table.left_s > _LEAST_S:
                network, batch = left.pop(0)
                say(f"{network}, batch {batch}, {table.left_s:.0f} s left")
                put(args, table.row(network, batch))
        finally:
            table.close()
            _pack(args.compile_cache, folder / "inductor")
    if left:
        say("no time was left for " + ", ".join(f"{n} batch {b}" for n, b in left))
    return 0


def put(args: argparse.Namespace, row: Row) -> None:
    """Puts a row into the files beside those that are there."""
    document = about(TITLE, NAME, args.words, device(args.device), TOOLS)
    row = {**row, "command": document["command"]}
    _joined(args.output, document, [row])
    say(page({**document, "rows": [row]}).partition("\n## ")[2])


def _joined(folder: Path, document: Row, rows: Sequence[Row]) -> None:
    """Writes rows beside those of the files that are there, in place of older ones."""
    path = folder / f"{NAME}.json"
    before = json.loads(path.read_text())["rows"] if path.is_file() else []
    held = {(each["network"], each["batch"]): each for each in (*before, *rows)}
    order = list(WORKS)
    keys = sorted(held, key=lambda key: (order.index(key[0]), key[1]))
    document = {**document, "rows": [held[key] for key in keys]}
    write(folder, NAME, document, page(document))


def add(folder: Path, paths: Sequence[Path]) -> int:
    """Joins tables that were measured elsewhere; a later row replaces an earlier one."""
    for path in paths:
        document = json.loads(path.read_text())
        _joined(folder, document, document["rows"])
    return 0


def _unpack(archive: Path | None, folder: Path) -> str:
    """Lets torch.compile keep its results in a folder, with those of another run."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    if archive is None or not archive.is_file():
        return "nothing yet"
    with tarfile.open(archive) as held:
        held.extractall(folder, filter="data")
    return f"{archive.stat().st_size / 1e6:.1f} MB"


def _pack(archive: Path | None, folder: Path) -> None:
    if archive is not None and folder.is_dir():
        with tarfile.open(archive, "w:gz") as made:
            made.add(folder, ".")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--output", type=Path, required=True, help="folder for the table")
    add("--add", type=Path, nargs="+", metavar="FILE", help="measure nothing, join these tables")
    add("--files", type=Path, help="folder for ONNX files, engines and timings; kept")
    add("--networks", type=_names, default=list(DEFAULT), help=",".join(WORKS))
    add("--batches", type=_numbers, help="by default each network's own")
    add("--kinds", type=_words, default=[], help="words in the names of our engines: int8,fp16")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--seconds", type=float, default=400.0, help="of the whole")
    add("--compile-seconds", type=float, default=120.0, help="of one torch.compile; 0 for none")
    add("--autotune-from", type=int, default=1, help="batch that torch.compile tunes itself for")
    add("--build-seconds", type=float, default=150.0, help="of one engine")
    add("--energy-seconds", type=float, default=1.0, help="of one contestant; 0 for none")
    add("--rounds", type=int, default=15, help="turns of each contestant")
    add("--slice-s", type=float, default=0.02, help="of one turn")
    add("--effort", type=int, default=2, help="of tuning")
    add("--plans", type=Path, help="folder for the engines' plans: the times of all candidates")
    add("--compile-cache", type=Path, help="archive that torch.compile's results are kept in")
    return made


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def _names(text: str) -> list[str]:
    found = _words(text)
    if unknown := set(found) - set(WORKS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    args.words = words
    return add(args.output, args.add) if args.add else run(args)


if __name__ == "__main__":
    sys.exit(main())
