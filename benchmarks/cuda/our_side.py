"""Our engines as contestants: one for each precision, of 2:4 kernels and of dense ones alone.

Where the weights are 2:4 a build takes the faster of both for each layer; `sparsity="disable"`
leaves the dense ones. All kinds of a network share one file of timings.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import twofour
from benchmarks.cuda.cases import F32, INT8, WORKS, Array, Feeds, write_files
from benchmarks.cuda.started import started
from benchmarks.cuda.turns import Entry
from twofour.core.records import to_plain


@dataclass(frozen=True)
class Kind:
    """How an engine is built.

    Attributes:
        file: of the network.
        options: of the build.
    """

    file: str
    options: dict[str, Any]


_DENSE = {"sparsity": "disable"}
ON_GPU = {
    "twofour int8 2:4": Kind(INT8, {"fp16": True}),
    "twofour int8 dense": Kind(INT8, {"fp16": True, **_DENSE}),  # of kernels made for the one above
    "twofour fp16 2:4": Kind(F32, {"fp16": True}),
    "twofour fp16 dense": Kind(F32, {"fp16": True, **_DENSE}),
    "twofour fp8 2:4": Kind(INT8, {"fp16": True, "fp8": True}),
    "twofour fp8 dense": Kind(INT8, {"fp16": True, "fp8": True, **_DENSE}),
}
ON_CPU = {
    "twofour int8 2:4": Kind(INT8, {}),
    "twofour f32 2:4": Kind(F32, {}),
    "twofour int8 dense": Kind(INT8, _DENSE),
    "twofour f32 dense": Kind(F32, _DENSE),
}


class OurSide:
    """Builds engines and runs them.

    Args:
        device: "cuda" or "cpu".
        folder: of ONNX files and timings.
        effort: of tuning.
        plans: folder for the plan of each engine, JSON with the times of all candidates; or None.
    """

    def __init__(self, device: str, folder: Path, effort: int, plans: Path | None = None) -> None:
        """Nothing yet."""
        self.device, self.folder, self.effort, self.plans = device, folder, effort, plans
        self.sessions: list[twofour.Session] = []

    def files(self, network: str) -> None:
        """Writes the ONNX files."""
        write_files(WORKS[network], self.folder / network)

    def open(self, network: str, batch: int, kind: str) -> list[Entry]:
        """The engine of a kind, built unless it lies beside the files, where it is kept."""
        self.files(network)
        feeds = WORKS[network].feeds(batch, 0)
        chosen = (ON_GPU if self.device == "cuda" else ON_CPU)[kind]
        shapes = {name: array.shape for name, array in feeds.items()}
        options: dict[str, Any] = {"target": "cuda"} if self.device == "cuda" else {"race": False}
        began = time.perf_counter()
        name = f"{kind} {batch}".replace(" ", "-").replace(":", "")
        path = self.folder / network / f"{name}.engine"
        if not path.is_file():
            engine = twofour.build(
                self.folder / network / chosen.file,
                shapes=shapes,
                tuning_effort=self.effort,
                timing_cache=self.folder / "timings.json",
                **options,
                **chosen.options,
            )
            engine.save(path)
        seconds = time.perf_counter() - began
        session = twofour.load(path)
        self.sessions.append(session)
        if self.plans is not None:
            self.plans.mkdir(parents=True, exist_ok=True)
            text = json.dumps(to_plain(session.engine.plan))
            (self.plans / f"{network}-{name}.json").write_text(text)
        setting = f"{_tactics(session)}; in {seconds:.0f} s{_early(session)}"
        return [self._entry(kind, setting, session, feeds)]

    def close(self) -> None:
        """Ends the sessions."""
        while self.sessions:
            self.sessions.pop().close()

    def _entry(self, kind: str, setting: str, session: twofour.Session, feeds: Feeds) -> Entry:
        names = [each.name for each in session.outputs]

        def outputs() -> list[Array]:
            found = session.run(feeds)
            return [found[name] for name in names]

        outputs()
        run = started(session, feeds)
        return Entry(kind, setting, run.launch, run.wait, outputs, run.memory_bytes, run.note)


def _early(session: twofour.Session) -> str:
    """What came of starting kernels early: "; 56 kernels started early take ..."."""
    found = [note for note in session.engine.plan.notes if "started early" in note]
    return "".join(f"; {note.partition(': ')[2]}" for note in found)


def _tactics(session: twofour.Session) -> str:
    """What runs the layers: "40 gemm_sparse, 13 walk"."""
    counted = Counter(layer.tactic for layer in session.engine.plan.layers)
    return ", ".join(f"{count} {tactic}" for tactic, count in counted.most_common(6))
