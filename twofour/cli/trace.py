"""twofour explain --trace: runs an engine, and writes when each layer was computed."""

from __future__ import annotations

import json
import statistics
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twofour.cli.options import read_arrays
from twofour.cli.output import Output

if TYPE_CHECKING:
    from twofour.engine import Engine, Profile


def write_trace(
    engine: Engine, profile: int, file: Path, what: tuple[list[str], int], out: Output
) -> None:
    """Runs a profile, and writes the trace of its runs.

    Args:
        engine: to run.
        profile: its number, from 1.
        file: where to.
        what: NAME=FILE.npy of each input, none for random ones; and how many runs.
        out: what is said about it goes there.
    """
    from twofour.compiler.chrome import trace
    from twofour.compiler.explain import layers_of
    from twofour.core.errors import InputError
    from twofour.runtime.session import Session

    layers_of(engine.plan, profile)  # refuses a profile that is none
    chosen = engine.plan.profiles[profile - 1]
    alone = replace(engine, plan=replace(engine.plan, profiles=(chosen,)))
    texts, count = what
    feeds = read_arrays(texts) or _random(chosen)
    with out.stage("running"), Session(alone) as session:
        try:
            session.timeline(feeds)  # what a first run finds cold is not of interest
        except InputError as e:
            if texts:
                raise
            fix = "give inputs that it takes: --input NAME=FILE.npy"
            raise InputError("the model takes no random inputs", [e.what, *e.reasons], fix) from e
        runs = [session.timeline(feeds) for _ in range(count)]
    document = trace(engine.plan, runs)
    _write(document, file)
    run_us = [run.run_us for run in runs]
    covered = sum(run.layers_us for run in runs) / max(sum(run_us), 1e-9)
    times = f"{count} runs" if count > 1 else "1 run"
    out.show(
        f"{file}: {len(document['traceEvents'])} events of {times}, median "
        f"{statistics.median(run_us):.1f} us, of which layers {covered:.1%}",
        "open it in ui.perfetto.dev or chrome://tracing",
    )
    events = {"file": str(file), "events": len(document["traceEvents"])}
    out.data("explain.trace/1", {**events, "run_us": run_us, "covered": covered})


def _random(profile: Profile) -> dict[str, Any]:
    """Inputs of the usual shapes."""
    from twofour.bench.declared import random_feeds

    return random_feeds([replace(t, shape=t.usual_shape, sizes=()) for t in profile.inputs])


def _write(document: dict[str, Any], file: Path) -> None:
    """Under a temporary name first."""
    from twofour.core.errors import InputError

    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(json.dumps(document), encoding="utf-8")
        temporary.replace(file)
    except OSError as e:
        fix = "name a file in a writable folder"
        raise InputError(f"cannot write {file}", [str(e)], fix) from e
    finally:
        temporary.unlink(missing_ok=True)
