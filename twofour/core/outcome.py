"""What a pipeline run found, as plain data: written as `run.json`, read by report and registry.

    RUN/run.json    {"schema": "twofour.run/1", ...the fields of `Outcome`}

It holds no path outside the run's folder and nothing that has to be executed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SCHEMA = "run/1"
PASSED, FAILED, UNDECIDED = "passed", "failed", "undecided"


@dataclass(frozen=True)
class Check:
    """One limit of the gate.

    Attributes:
        name: "accuracy", "speed", "memory".
        verdict: "passed", "failed", or "undecided": the interval has the limit inside.
        value: that was found.
        low: with the gate's confidence it is not less; None where there is no noise.
        high: with the same, not more.
        limit: that was asked for.
        unit: of all four: "points", "x", "bytes".
        text: what was asked and found, in one line.
    """

    name: str
    verdict: str
    value: float
    low: float | None
    high: float | None
    limit: float
    unit: str
    text: str


@dataclass(frozen=True)
class Figure:
    """What the metric says of one network.

    Attributes:
        value: of the metric.
        low: end of its confidence interval; None where it is not known.
        high: the other.
    """

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Cell:
    """One network of the table: a pattern of weights in one precision.

    Attributes:
        weights: "dense", "2:4", ...
        precision: "float32", "PTQ", "QAT".
        figure: of its engine; None where it was not made.
        latency_us: median of one run.
        latency_low_us: end of its interval.
        latency_high_us: the other.
        engine_bytes: of the engine's weights, code and subgraphs.
        weight_bytes: of its packed weights alone.
        memory_bytes: peak resident memory of a process that runs it.
        joules: of one run; None where the machine has no counter.
        note: why it was not made; "" where it was.
    """

    weights: str
    precision: str
    figure: Figure | None = None
    latency_us: float | None = None
    latency_low_us: float | None = None
    latency_high_us: float | None = None
    engine_bytes: int | None = None
    weight_bytes: int | None = None
    memory_bytes: int | None = None
    joules: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Point:
    """A network in the plot of accuracy against latency.

    Attributes:
        name: of it.
        kind: "baseline", "candidate", "variant" (another cell), "peer", or "front" (of a search).
        figure: of the metric.
        latency_us: median of one run.
    """

    name: str
    kind: str
    figure: Figure
    latency_us: float


@dataclass(frozen=True)
class LayerRow:
    """A layer of the engine.

    Attributes:
        name: in the source model.
        op: fused operator.
        shape: in words.
        precision: it computes in.
        pattern: of its weight; "" without one.
        choice: the tactic taken.
        reason: why, in words.
        time_us: as built; None where it was not timed.
        share: of all layers' time, 0 to 1.
        dense_us: the best dense kernel in the same precision; None where none was timed.
        sparse_us: the best sparse one.
        float_us: the best float32 kernel.
        roofline: ideal time over time, 0 to 1; None where it is not known.
    """

    name: str
    op: str
    shape: str
    precision: str
    pattern: str
    choice: str
    reason: str
    time_us: float | None
    share: float | None
    dense_us: float | None = None
    sparse_us: float | None = None
    float_us: float | None = None
    roofline: float | None = None


@dataclass(frozen=True)
class Edge:
    """Layer `source` writes what layer `target` reads; -1 is the model's input or output.

    Attributes:
        source: index into `Outcome.layers`.
        target: likewise.
        tensor: its name.
    """

    source: int
    target: int
    tensor: str


@dataclass(frozen=True)
class Artifact:
    """A file of the run.

    Attributes:
        path: within the run's folder; of a file outside, its name alone.
        kind: "onnx", "engine", "masks", "calibration", "checkpoint", "data", "recipe", ...
        sha256: of its content.
        size_bytes: of it.
        stage: that wrote it; "" for what the user gave.
        made_from: paths of the artifacts that it was made from.
    """

    path: str
    kind: str
    sha256: str
    size_bytes: int
    stage: str
    made_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageRecord:
    """A stage of the run.

    Attributes:
        name: of it.
        status: "done", "reused", "left out", "failed", or "not reached".
        key: hash of its settings and inputs.
        seconds: that it took when it ran.
        text: what came of it, in one line; of a failed one, why.
        settings: of the recipe, as they counted.
    """

    name: str
    status: str
    key: str
    seconds: float
    text: str
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Surroundings:
    """Where the run ran.

    Attributes:
        cpu: in words.
        cores: usable ones.
        memory_bytes: of the machine.
        system: kernel and distribution, in words.
        target: of engines, in words.
        threads: of engines.
        seed: of everything that draws.
        command: that started it.
        packages: name -> version.
    """

    cpu: str
    cores: int
    memory_bytes: int
    system: str
    target: str
    threads: int
    seed: int
    command: str
    packages: dict[str, str]


@dataclass(frozen=True)
class Task:
    """What is judged.

    Attributes:
        metric: its name.
        unit: "%" or "".
        higher_is_better: whether more of it is better.
        samples: judged.
    """

    metric: str
    unit: str
    higher_is_better: bool
    samples: int


@dataclass(frozen=True)
class Outcome:
    """A run.

    Attributes:
        name: of the recipe.
        created: when it ended, ISO 8601, UTC.
        verdict: of the gate: "passed", "failed", "undecided", or "" where there is none.
        checks: of the gate.
        task: what was judged; None where nothing was.
        cells: dense and sparse by float32, PTQ and QAT.
        points: of the plot.
        layers: of the engine, in the order in which they run.
        edges: between them.
        stages: in order.
        artifacts: all files, and what each was made from.
        surroundings: the machine, versions, the seed.
        notes: what the user should know.
        documents: name -> document of another command, as its --json prints: "sensitivity",
            "quantize", "search", "forecast"; only those that the run has.
    """

    name: str
    created: str
    verdict: str
    checks: tuple[Check, ...]
    task: Task | None
    cells: tuple[Cell, ...]
    points: tuple[Point, ...]
    layers: tuple[LayerRow, ...]
    edges: tuple[Edge, ...]
    stages: tuple[StageRecord, ...]
    artifacts: tuple[Artifact, ...]
    surroundings: Surroundings
    notes: tuple[str, ...] = ()
    documents: dict[str, Any] = field(default_factory=dict)
