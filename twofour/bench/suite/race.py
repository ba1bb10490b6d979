"""One row: our engines and every setting of every peer, in one race on one input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict

from twofour.bench import peers
from twofour.bench.peers.onnxruntime import reference
from twofour.bench.suite.cold import cold_starts
from twofour.bench.suite.engines import Built, build_engine, described
from twofour.bench.suite.entries import OURS, PEERS, RATIOS, SCALING, Entry, Plain
from twofour.bench.suite.files import Files, float_kind, race_feeds, write_files
from twofour.bench.suite.lost import lost_time
from twofour.bench.suite.rows import SuiteOptions, SuiteRow
from twofour.bench.suite.text import REFERENCE_SPEARMAN, read_pairs, similarity, text_model
from twofour.bench.timing import Array, Contestant, Feeds, Schedule, Timing, race, ratio
from twofour.bench.versus import Difference, differences, ours
from twofour.compiler.peak import measure_peaks
from twofour.core.errors import Error, InputError
from twofour.core.progress import Report
from twofour.core.target import host_target, why_no_bf16
from twofour.engine import Engine
from twofour.runtime.session import Session

MIN_ROUNDS = 8
_SHOWN = next(entry for entry in OURS if entry.key == "2_4_int8")


def measure_row(row: SuiteRow, options: SuiteOptions, report: Report) -> Plain:
    """Everything that one row says: plain data.

    What one contestant cannot do stands in `refused` (key -> reason) and does not stop the others.

    Args:
        row: what is measured.
        options: how.
        report: told what is going on.

    Raises:
        InputError: the network's files cannot be made.
        UnsupportedError: likewise.
    """
    files = write_files(row, options, report)
    refused: dict[str, str] = {}
    built = _built(row, files, options, report, refused)
    feeds = race_feeds(row, files)
    with ExitStack() as stack:
        sessions = {
            entry: stack.enter_context(Session(Engine.load(each.path)))
            for entry, each in built.items()
        }
        contestants = {e: ours(s, feeds, f"twofour {e.key}") for e, s in sessions.items()}
        contestants |= _peers(files, feeds, options, refused)
        timings = _timed(contestants, options, report)
        sessions = {entry: each for entry, each in sessions.items() if not entry.alone}
        found = {
            "name": row.name,
            "network": row.network,
            "batch": row.batch,
            "threads": options.threads,
            "real_weights": files.real,
            "calibrated_on": files.calibrated_on,
            "contestants": {e.key: _figures(e, contestants[e], timings[e]) for e in contestants},
            **_ratios(timings),
            **_scaling(timings),
            "refused": refused,
            "engines": _engines(built, sessions, timings, options),
            "lost": _lost(sessions, timings),
        }
        _add_agreement(found["engines"], files, sessions, feeds, options)
        if row.similarity:
            found["similarity"] = _similarity(row, sessions, options, report)
    if row.cold_start and options.threads == 1 and _SHOWN in built:
        engine = built[_SHOWN].path
        report(0, None, "cold starts")
        model = files.path("24-uint8")
        found["cold_start"] = cold_starts(engine, model, feeds, options.peers)
    return found


def _built(
    row: SuiteRow,
    files: Files,
    options: SuiteOptions,
    report: Report,
    refused: dict[str, str],
) -> dict[Entry, Built]:
    built = {}
    for entry in our_entries(options.threads):
        try:
            built[entry] = build_engine(row, entry, files, options, report)
        except Error as e:
            refused[entry.key] = str(e)
    return built


def our_entries(threads: int = 1) -> list[Entry]:
    """Our contestants on this machine: those in bfloat16 where it has that."""
    alone = [one for _, one in SCALING.values()] if threads > 1 else []
    bf16 = not why_no_bf16(host_target())
    return [e for e in OURS if e.precision != "bf16" or bf16] + alone


def _peers(
    files: Files, feeds: Feeds, options: SuiteOptions, refused: dict[str, str]
) -> dict[Entry, Contestant]:
    """Those asked for, set up; what one refuses is noted."""
    found = {}
    for entry in PEERS:
        path = files.path(entry.kind)
        if entry.peer not in options.peers or (entry.kind == "dynamic" and not files.text):
            continue
        try:
            runner = peers.prepare(entry.peer, path, feeds, options.threads, entry.floats)
        except InputError as e:
            refused[entry.key] = str(e)
            continue
        if entry.peer == "openvino" and entry.precision not in ("int8", _floats(runner)):
            refused[entry.key] = f"computes in another precision here: {runner.setting}"
            continue
        found[entry] = runner
    return found


def _floats(runner: Contestant) -> str:
    """The precision that OpenVINO says it computes floats in."""
    return runner.setting.partition("floats as ")[2].partition(",")[0]


def _timed(
    contestants: Mapping[Entry, Contestant], options: SuiteOptions, report: Report
) -> dict[Entry, Timing]:
    schedule = Schedule(options.duration_s, min_rounds=MIN_ROUNDS)
    timings = race(
        list(contestants.values()), schedule, lambda done, all_: report(done, all_, "rounds")
    )
    return dict(zip(contestants, timings, strict=True))


def _figures(entry: Entry, contestant: Contestant, timing: Timing) -> Plain:
    return {
        "runs_on": contestant.name if entry.peer else "twofour",
        "version": contestant.version,
        "setting": contestant.setting,
        "model": f"{entry.kind}.onnx",
        "precision": entry.precision,
        **{key: value for key, value in asdict(timing).items() if key != "round_medians_us"},
    }


def _ratios(timings: Mapping[Entry, Timing]) -> Plain:
    """The fastest peer of each class, and how many times as fast each of ours is (quartiles)."""
    best: dict[str, Entry] = {}
    for entry, timing in timings.items():
        held = best.get(entry.precision)
        if entry.peer and (held is None or timing.median_us < timings[held].median_us):
            best[entry.precision] = entry
    named = {entry.key: timing for entry, timing in timings.items()}
    found: Plain = {"best_peer": {kind: entry.key for kind, entry in best.items()}}
    for name, (key, kind) in RATIOS.items():
        if key in named and kind in best:
            each = ratio(named[key], timings[best[kind]])
            found[name] = each.median
            found[f"{name}_quartiles"] = [each.low, each.high]
        else:
            found[name] = None
    return found


def _scaling(timings: Mapping[Entry, Timing]) -> Plain:
    """How many times as fast ours are with all threads as with one; nothing where all have one."""
    found: Plain = {}
    for name, (several, one) in SCALING.items():
        if several in timings and one in timings:
            each = ratio(timings[several], timings[one])
            found |= {name: each.median, f"{name}_quartiles": [each.low, each.high]}
    return found


def _lost(sessions: Mapping[Entry, Session], timings: Mapping[Entry, Timing]) -> Plain:
    """Where the 2:4 INT8 engine loses time, by its key; empty if there is none."""
    return {
        entry.key: lost_time(session.engine, timings[entry].median_us)
        for entry, session in sessions.items()
        if entry is _SHOWN
    }


def _engines(
    built: Mapping[Entry, Built],
    sessions: Mapping[Entry, Session],
    timings: Mapping[Entry, Timing],
    options: SuiteOptions,
) -> dict[str, Plain]:
    peaks = measure_peaks(options.threads)
    return {
        entry.key: described(built[entry], session.engine, timings[entry].median_us, peaks)
        for entry, session in sessions.items()
    }


def _add_agreement(
    engines: dict[str, Plain],
    files: Files,
    sessions: Mapping[Entry, Session],
    feeds: Feeds,
    options: SuiteOptions,
) -> None:
    """How far outputs lie from those of the engine's file, and both from those of its float file.

    Files are run by ONNX Runtime without optimisation.
    """
    meant: dict[str, dict[str, Array]] = {}
    for entry, session in sessions.items():
        for kind in (entry.kind, float_kind(entry.kind)):
            if kind not in meant:
                meant[kind] = reference(files.path(kind), feeds, options.threads)
        own, floats = meant[entry.kind], meant[float_kind(entry.kind)]
        # Rows that are chosen by comparing have no cosine.
        found = {k: v for k, v in session.run(feeds).items() if v.dtype.kind == "f"}
        each = differences(found, own)
        engines[entry.key] |= {
            "cosine": _worst(each),
            "max_error": max(one.max_abs for one in each),
            "reference_max": max(one.reference_max_abs for one in each),
            "cosine_to_float": _worst(differences(found, floats)),
            "file_cosine_to_float": _worst(differences(own, floats)),
        }


def _worst(found: Sequence[Difference]) -> float:
    """The smallest cosine of all outputs."""
    return min(each.cosine for each in found)


def _similarity(
    row: SuiteRow, sessions: Mapping[Entry, Session], options: SuiteOptions, report: Report
) -> Plain:
    """The scores of each engine; why there are none where data or weights are missing."""
    model = text_model()
    if model is None or options.data is None:
        missing = "real weights" if model is None else "sentence pairs"
        return {"spearman": {}, "not_measured": f"no {missing} at hand"}
    pairs = read_pairs(options.data, options.pairs)
    scores = {}
    for done, (entry, session) in enumerate(sessions.items()):
        report(done, len(sessions), f"similarity, {entry.key}")

        def hidden(feeds: Feeds, session: Session = session) -> Array:
            (found,) = session.run(feeds).values()
            return found

        scores[entry.key] = similarity(hidden, pairs, model.tokenizer, row.length)
    return {
        "spearman": scores,
        "pairs": len(pairs.scores),
        "reference_f32": REFERENCE_SPEARMAN,
    }


def missing_figures(found: Plain, asked: Sequence[str]) -> list[str]:
    """What a row lacks that it should have: an engine of ours, or a peer of a class.

    Args:
        found: from `measure_row`.
        asked: names of the peers that were asked for.
    """
    lacking = [entry.key for entry in OURS if entry.key in found["refused"]]
    if asked:
        lacking += [f"a peer at {k}" for k in ("f32", "int8") if k not in found["best_peer"]]
    return lacking
