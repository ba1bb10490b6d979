"""Timelines as a trace for chrome://tracing and ui.perfetto.dev: one event a layer and thread.

    {"traceEvents": [{"ph": "X", "name": layer, "ts": us, "dur": us, "tid": thread, "args": ...}]}

What the session takes around the layers has events too: with them the events of thread 0 are the
whole run.

Source: Google, "Trace Event Format": complete events, and metadata events that name threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from twofour.compiler.explain import kind_of
from twofour.engine import Layer, Plan
from twofour.runtime.timeline import Span, Timeline

_RUNS = 1000
"""The track of whole runs and steps; threads have their numbers."""


def trace(plan: Plan, runs: Sequence[Timeline]) -> dict[str, Any]:
    """The document, as plain data.

    Args:
        plan: of the engine.
        runs: what was measured, in order.
    """
    begin = min((span.begin_ns for run in runs for span in run.steps), default=0)
    threads = sorted({span.thread for run in runs for span in run.layers})
    events = [_name("process_name", 0, plan.source_name or "engine"), _name(_THREAD, _RUNS, "runs")]
    events += [_name(_THREAD, thread, f"thread {thread}") for thread in threads]
    for number, run in enumerate(runs):
        events += _of_run(plan, run, number, begin)
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": _facts(plan)}


_THREAD = "thread_name"


def _of_run(plan: Plan, run: Timeline, number: int, begin: int) -> Iterator[dict[str, Any]]:
    if run.steps:
        whole = Span(0, (), 0, run.steps[0].begin_ns, run.steps[-1].end_ns, 0)
        yield _event(f"run {number}", "run", _RUNS, whole, begin)
    for span in _between(run):
        yield {**_event("session", "session", 0, span, begin), "args": {"run": number}}
    for span in filter(lambda span: span.layers, run.layers):
        layers = [plan.layers[index] for index in span.layers]
        event = _event(layers[0].name, kind_of(layers[0]), span.thread, span, begin)
        if len(layers) > 1:
            event["name"] = f"{layers[0].name} and {len(layers) - 1} more"
        yield {**event, "args": {"run": number, "step": span.step, **_arguments(layers, span)}}


def _between(run: Timeline) -> Iterator[Span]:
    """What the session takes around the layers of a step: binding, starting, returning."""
    for step in run.steps:
        own = [span for span in run.layers if span.step == step.step and span.thread == 0]
        if own:
            yield replace(step, end_ns=own[0].begin_ns)
            yield replace(step, begin_ns=own[-1].met_ns)


def _arguments(layers: Sequence[Layer], span: Span) -> dict[str, Any]:
    """What is known of a layer, or of a step on ONNX Runtime."""
    first = layers[0]
    return {
        "op": ", ".join(dict.fromkeys(layer.op for layer in layers)),
        "tactic": " ".join(part for part in (first.tactic, first.config) if part),
        "precision": first.precision,
        "source": [name for layer in layers for name in layer.source],
        "moved_bytes": sum(layer.work.moved_bytes for layer in layers),
        "weight_bytes": sum(layer.weight_bytes for layer in layers),
        "built_us": first.time_us,
        "waits_us": (span.met_ns - span.end_ns) / 1e3,
    }


def _event(name: str, kind: str, thread: int, span: Span, begin: int) -> dict[str, Any]:
    times = {"ts": (span.begin_ns - begin) / 1e3, "dur": (span.end_ns - span.begin_ns) / 1e3}
    return {"ph": "X", "name": name, "cat": kind, "pid": 1, "tid": thread, **times}


def _name(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": 1, "tid": thread, "args": {"name": name}}


def _facts(plan: Plan) -> dict[str, Any]:
    return {"target": str(plan.target), "version": plan.version, "source": plan.source_sha256}
