"""The suite's figures as a table for a terminal, and as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from twofour.bench.suite.entries import OURS, RATIOS, Plain
from twofour.core.errors import InputError

_HEADERS = {
    "ratio_dense_int8_over_best_peer": "dense INT8",
    "ratio_2_4_int8_over_best_peer": "2:4 INT8",
    "ratio_pair_int8_over_best_peer": "2:4/pair INT8",
    "ratio_dense_f32_over_best_peer": "dense f32",
    "ratio_2_4_f32_over_best_peer": "2:4 f32",
    "ratio_dense_bf16_over_best_peer": "dense bf16",
    "ratio_2_4_bf16_over_best_peer": "2:4 bf16",
    "ratio_pair_bf16_over_best_peer": "2:4/pair bf16",
}
_WIDE = 110
_ENDS = ("_one_thread", "")
_SCALING = {
    "scaling_dense_int8": "dense INT8",
    "scaling_2_4_int8": "2:4 INT8",
    "scaling_pair_int8": "2:4/pair INT8",
}


def rich_tables(document: Plain, width: int) -> list[Table]:
    """The ratios for a terminal, and what several threads gain; a narrow one shows fewer columns.

    Args:
        document: of the suite.
        width: of the terminal.
    """
    headers, rows = _ratio_table(document)
    shown = [i for i in range(len(headers)) if width >= _WIDE or i not in (1, len(headers) - 1)]
    words = "times as fast as the fastest peer of the same precision; pair: 2:4/pair"
    if len(shown) == len(headers):
        words += "; fallback: operators of the 2:4 INT8 engine that run on ONNX Runtime"
    tables = [_rich([headers[i] for i in shown], [[row[i] for i in shown] for row in rows], words)]
    headers, rows = _thread_table(document)
    if rows:
        tables.append(_rich(headers, rows, "ms of 2:4 INT8; times as fast as with one thread"))
    return tables


def _rich(headers: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Table:
    table = Table(caption=caption, caption_justify="left")
    for index, header in enumerate(headers):
        text = header.replace("2:4/pair", "pair").replace(" ", "\n")
        table.add_column(text, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def page(document: Plain) -> str:
    """All figures as markdown; rows that failed and ratios below 1 are said aloud."""
    tools = ", ".join(f"{name} {found}" for name, found in document["tools"].items())
    parts = [
        f"# {document['title']}",
        f"    {document['command']}",
        f"Machine: {document['cpu']}, {document['cores']} cores, {document['target']}. "
        f"Threads: {document['threads']}.  \nVersions: twofour {document['version']}, {tools}",
        "All contestants of a row took turns in one process on one input. Weights are random and "
        "seeded unless said otherwise; speed does not depend on their values.",
        "## Ours over the fastest peer",
        "How many times as fast as the fastest peer of the same precision, median of the rounds. "
        "Fallback: operators of the 2:4 INT8 engine that run on ONNX Runtime.",
        _markdown(*_ratio_table(document)),
        _losses(document),
        *_threads(document),
        *_lost(document),
        "## Times",
        "Median of single calls in milliseconds; ±: distance between the quartiles of the rounds' "
        "medians.",
        *(_times(row) for row in _good(document)),
        "## Engines",
        _engine_words(),
        *(_engines(row) for row in _good(document)),
        *_cold_starts(document),
        *_similarity(document),
        *_problems(document),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def file_stem(suite: str, threads: int) -> str:
    """What the files of a page are called: cpu, or cpu_threads2."""
    return suite if threads == 1 else f"{suite}_threads{threads}"


def write(document: Plain, folder: Path) -> list[Path]:
    """Writes the page and its JSON, `file_stem` and `.md` or `.json`, under temporary names first.

    Raises:
        InputError: the folder cannot be written.
    """
    stem = file_stem(document["suite"], document["threads"])
    texts = {
        f"{stem}.json": json.dumps(document, indent=2) + "\n",
        f"{stem}.md": page(document),
    }
    written = []
    for name, text in texts.items():
        path = folder / name
        temporary = folder / f"{name}.part"
        try:
            temporary.write_text(text)
            temporary.replace(path)
        except OSError as e:
            raise InputError(f"cannot write {path}", [str(e)], "name a writable folder") from e
        written.append(path)
    return written


def markdown_ratios(document: Plain) -> str:
    """The first table alone, for another page."""
    return _markdown(*_ratio_table(document)) + "\n"


def _good(document: Plain) -> list[Plain]:
    return [row for row in document["rows"] if "error" not in row]


def _ratio_table(document: Plain) -> tuple[list[str], list[list[str]]]:
    """Of the ratios that some row has."""
    held = [n for n in _HEADERS if any(row.get(n) is not None for row in document["rows"])]
    headers = ["row", "fastest INT8 peer", *(_HEADERS[name] for name in held), "fallback"]
    rows = []
    for row in document["rows"]:
        if "error" in row:
            rows.append([row["name"], "failed", *[""] * (len(held) + 1)])
            continue
        best = row["best_peer"].get("int8")
        peer = f"{best} {_ms(row['contestants'][best]['median_us'])} ms" if best else ""
        ratios = [_show(row.get(name), "{:.2f}x") for name in held]
        fallback = row["engines"].get("2_4_int8", {}).get("fallback_operators")
        rows.append([row["name"], peer, *ratios, _show(fallback, "{}")])
    return headers, rows


def _losses(document: Plain) -> str:
    lost = [
        f"- {row['name']}: {_HEADERS[name]} {row[name]:.2f}x"
        for row in _good(document)
        for name in RATIOS
        if row.get(name) is not None and row[name] < 1
    ]
    return "\n".join(["Slower than the fastest peer:\n", *lost]) if lost else ""


def _thread_table(document: Plain) -> tuple[list[str], list[list[str]]]:
    """What several threads gain; no rows where all had one."""
    rows = []
    for row in _good(document):
        if "scaling_2_4_int8" not in row:
            continue
        times = [_ms(row["contestants"][f"2_4_int8{end}"]["median_us"]) for end in _ENDS]
        rows.append([row["name"], *times, *(_show(row.get(n), "{:.2f}x") for n in _SCALING)])
    headers = ["row", "one thread", f"{document['threads']} threads", *_SCALING.values()]
    return headers, rows


def _threads(document: Plain) -> list[str]:
    """What several threads gain, where they were measured."""
    threads = document["threads"]
    headers, rows = _thread_table(document)
    if not rows:
        return []
    words = (
        f"The same networks built for one thread, in the same race: {threads} threads over one "
        "thread, median of the rounds. Times of 2:4 INT8 in milliseconds."
    )
    return [f"## {threads} threads over one", words, _markdown(headers, rows)]


def _lost(document: Plain) -> list[str]:
    """Where the 2:4 INT8 engines lose time."""
    rows = []
    for row in _good(document):
        for key, each in row.get("lost", {}).items():
            ideal_us = each["products_us"] + each["bytes_us"]
            rows.append(
                [
                    f"**{row['name']}**, {key}: {ideal_us / each['layers_us']:.0%} of the roofline",
                    _ms(each["layers_us"]),
                    _ms(ideal_us),
                    _ms(each["layers_us"] - ideal_us),
                    f"a run takes {_ms(each['run_us'])}",
                ]
            )
            rows += map(_lost_kind, each["kinds"])
    if not rows:
        return []
    words = (
        "Times of layers in milliseconds as measured at build; ideal: the multiply-adds at the "
        "measured peak of their kind of kernel, or the bytes that a layer without any moves, "
        "copied within the second-level cache; the kinds of layers that lose the most, and what "
        "is known of it, each by itself. `twofour explain ENGINE --sort gap` shows all."
    )
    table = _markdown(["layers", "time", "ideal", "gap", "why"], rows)
    return ["## Where the time goes", words, table]


def _lost_kind(kind: Plain) -> list[str]:
    count = len(kind["layers"])
    more = f" and {count - 1} more" if count > 1 else ""
    ideal_us = (kind["ideal_us"] or 0.0) * count
    return [
        f"`{kind['layers'][0]}`{more}",
        _ms((kind["time_us"] or 0.0) * count),
        _ms(ideal_us),
        f"{_ms(kind['gap_us'] * count)} ({kind['share']:.0%})",
        "; ".join(kind["why"]),
    ]


def _times(row: Plain) -> str:
    weights = "trained weights" if row["real_weights"] else "random weights"
    rows = [
        [
            f"{key} ({each['runs_on']} {each['version']})",
            each["model"],
            _ms(each["median_us"]),
            _ms(each["spread_us"]),
            str(each["calls"]),
        ]
        for key, each in row["contestants"].items()
    ]
    title = f"### {row['name']}: {weights}, calibrated on {row['calibrated_on']}"
    return f"{title}\n\n" + _markdown(["contestant", "file", "median", "±", "calls"], rows)


def _engine_words() -> str:
    return (
        "Operators in the file, after fusion, and steps: kernels, and operators that fall back to "
        "ONNX Runtime (in so many calls); waves: how often threads meet, as kernels of one wave do "
        "not wait for each other; bytes of activations and of packed weights; seconds to "
        "build (*: with the timing cache of an earlier build); share of the roofline: what the "
        "multiply-adds would take at the measured peak of their kind of kernel, over the time of a "
        "whole run; cosine and largest difference of the outputs against ONNX Runtime, "
        "unoptimised, on the same file (largest value); cosine of the engine's outputs against the "
        "float file that was quantized, and that of ONNX Runtime, unoptimised, on the same file: "
        "what the file's own rounding costs."
    )


def _engines(row: Plain) -> str:
    headers = ["engine", "operators", "fused", "steps", "waves", "fall back", "arena", "weights"]
    headers += ["build", "roofline", "cosine", "max error", "to float", "the file's"]
    rows = []
    for entry in OURS:
        each = row["engines"].get(entry.key)
        if each is None:
            continue
        rows.append(
            [
                entry.key,
                str(each["operators"]),
                str(each["fused"]),
                str(each["steps"]),
                _show(each.get("waves") or None, "{}"),
                f"{each['fallback_operators']} ({each['fallback_steps']})",
                f"{each['arena_bytes'] / 1e6:.2f} MB",
                f"{each['weight_bytes'] / 1e6:.1f} MB",
                f"{each['build_s']:.0f} s{'*' if each['timings_kept'] else ''}",
                f"{each['roofline_share']:.0%}",
                f"{each['cosine']:.6f}",
                f"{each['max_error']:.2g} ({each['reference_max']:.3g})",
                _show(each.get("cosine_to_float"), "{:.6f}"),
                _show(each.get("file_cosine_to_float"), "{:.6f}"),
            ]
        )
    return f"### {row['name']}\n\n" + _markdown(headers, rows)


def _cold_starts(document: Plain) -> list[str]:
    parts = []
    for row in _good(document):
        if "cold_start" not in row:
            continue
        rows = [
            [
                name,
                f"{each['first_result_s']:.3f} s",
                "" if each["peak_bytes"] is None else f"{each['peak_bytes'] / 1e6:.0f} MB",
            ]
            for name, each in row["cold_start"].items()
        ]
        table = _markdown(["runs on", "first result", "peak memory"], rows)
        parts.append(
            f"## Cold start, {row['name']}, INT8\n\nFrom the start of a process to its first "
            f"result, files in the page cache; medians.\n\n{table}"
        )
    return parts


def _similarity(document: Plain) -> list[str]:
    parts = []
    for row in _good(document):
        if "similarity" not in row:
            continue
        found = row["similarity"]
        if "not_measured" in found:
            parts.append(
                f"## Text similarity, {row['name']}\n\nNot measured: {found['not_measured']}."
            )
            continue
        rows = [[key, f"{score:.2f}"] for key, score in found["spearman"].items()]
        parts.append(
            f"## Text similarity, {row['name']}\n\nSTS benchmark, development set, {found['pairs']}"
            f" pairs, Spearman's correlation in percent; float32 reference "
            f"{found['reference_f32']:.2f}. Pruned by magnitude without any fine-tuning, so the "
            f"2:4 figures say what one shot costs, not what 2:4 costs.\n\n"
            + _markdown(["engine", "Spearman"], rows)
        )
    return parts


def _problems(document: Plain) -> list[str]:
    lines = [
        f"- {row['name']}: failed: {_one_line(row['error'])}"
        for row in document["rows"]
        if "error" in row
    ]
    lines += [
        f"- {row['name']}, {key}: {_one_line(reason)}"
        for row in _good(document)
        for key, reason in row["refused"].items()
    ]
    return ["## Not measured", "\n".join(lines)] if lines else []


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _ms(us: float) -> str:
    return f"{us / 1e3:.3g}" if us >= 1e3 else f"{us / 1e3:.3f}"


def _show(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)


def _markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    bars = ["--:" if index and header != "why" else "---" for index, header in enumerate(headers)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [headers, bars, *rows])
