"""Every command's --json document has the structure of its golden file; what is printed fits.

A new command, or a new kind of document: one line in CALLS, and a golden file written by
`pytest tests/cli/test_json_schemas.py --update-golden`. A document may lack alternatives that its
golden file has (null on a machine that measured nothing), but no key, and it may have nothing new.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner, Result

from tests.cli.structure import GOLDEN, compare, merged, structure
from tests.sample_engines import sample_engine
from tests.sample_machines import KNOWN, UNKNOWN, plant_machine
from tests.sample_models import conv_model, plain_model
from twofour.cli import app
from twofour.cli.output import PLAIN_WIDTH
from twofour.core.gpus import Gpu
from twofour.core.tensorrt import installed
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.promises import promise
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.weights import layer_weights

DATA, QUICK = ("--data", "data.npz"), ("--tuning-effort", "1")
GAINS = ("--forecast", "gains.json", "--cache", "scan.jsonl", "--pattern", "2:4")
PAGE = ("-o", "layers.html", "--plot", "layers.png")
NONE = ("--forecast", "none")
SHORT = ("--duration", "0.05")
REPORT = ("--report", "quality.html")
BUDGET = ("--max-drop", "0", "--cache", "mixed.jsonl", "--metric")
OWN = "metric_of_the_page:first"
SEARCH = (
    *(*QUICK, "--precision", "int8", "--pattern", "2:4", "--prune-method", "magnitude"),
    *("--evaluations", "6", "--cache", "search.jsonl"),
)
FILES = ("--samples", "5", "-o", "recipe.yaml", "--report", "search.html")
BLAMED = (*DATA, "--metric", "top1", "--blame", "--runs", "8", "--source", "int8.onnx")
GPU = ("--target", "tensorrt-rtx", "--shapes", "x:1x4x8x8")
HAS_RTX = any(each.library == "tensorrt_rtx" for each in installed())
BY_TENSORRT = (
    ("build/1", ("build", "model.onnx", "-o", "gpu.engine", *GPU)),
    ("inspect.engine/1", ("inspect", "gpu.engine")),
    ("explain/1", ("explain", "gpu.engine")),
)
# What commands print, in an order in which each finds its files: schema -> arguments.
CALLS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("doctor/1", ("doctor",)),
    ("prune/1", ("prune", "model.onnx", "-o", "less.onnx", "--method", "sparsegpt", *DATA)),
    ("prune/1", ("prune", "model.onnx", "-o", "sparse.onnx", "--skip", "linear")),
    (
        "quantize/1",
        ("quantize", "sparse.onnx", "-o", "part.onnx", *DATA, "--exclude", "linear", *REPORT),
    ),
    ("quantize/1", ("quantize", "sparse.onnx", "-o", "mixed.onnx", *DATA, *BUDGET, "loss")),
    ("quantize/1", ("quantize", "sparse.onnx", "-o", "mixed.onnx", *DATA, *BUDGET, OWN)),
    ("quantize/1", ("quantize", "sparse.onnx", "-o", "rows.onnx", "--dynamic")),
    ("quantize/1", ("quantize", "sparse.onnx", "-o", "int8.onnx", *DATA)),
    ("inspect.model/1", ("inspect", "model.onnx")),
    ("inspect.model/1", ("inspect", "int8.onnx")),
    ("inspect.model/1", ("inspect", "nearly.onnx", "--all")),
    ("inspect.model/1", ("inspect", "model.onnx", "--shapes", "x:1x9x8x8")),
    ("forecast/1", ("forecast", "image.onnx", *QUICK, "--precision", "f32")),
    ("forecast/1", ("forecast", "int8.onnx", *QUICK, "--pattern", "2:4")),
    ("forecast/1", ("forecast", "volume.onnx", *QUICK, "--precision", "f32")),
    ("forecast/1", ("forecast", "image.onnx", "--precision", "f32", "--pattern", "2:4/pair")),
    ("sensitivity/1", ("sensitivity", "model.onnx", *DATA, *GAINS, "--pattern", "8:16", *PAGE)),
    (
        "sensitivity/1",
        ("sensitivity", "model.onnx", *DATA, "--metric", "metric_of_the_page:low", *NONE),
    ),
    ("search/1", ("search", "model.onnx", *DATA, "--max-drop", "100", *SEARCH, *FILES)),
    (
        "search/1",
        ("search", "model.onnx", *DATA, "--max-latency", "1us", "--metric", OWN, *SEARCH),
    ),
    ("build/1", ("build", "int8.onnx", "-o", "int8.engine", "--int8", *DATA, *QUICK)),
    ("build/1", ("build", "model.onnx", "-o", "f32.engine", *QUICK, "--shapes", "x:1x4x8x8")),
    *(BY_TENSORRT if HAS_RTX else ()),
    ("inspect.engine/1", ("inspect", "int8.engine")),
    ("inspect.engine/1", ("inspect", "sample.engine")),
    ("explain/1", ("explain", "int8.engine")),
    ("explain/1", ("explain", "sample.engine")),
    ("explain/1", ("explain", "f32.engine", "--roofline")),
    ("explain/1", ("explain", "f32.engine", "--conversions")),
    ("explain.layer/1", ("explain", "int8.engine", "--layer", "conv")),
    ("explain.layer/1", ("explain", "sample.engine", "--layer", "layer1.0.conv1")),
    (
        "explain.sizes/1",
        ("explain", "int8.engine", "--beside", "f32.engine", "--beside", "model.onnx"),
    ),
    ("explain.trace/1", ("explain", "int8.engine", "--trace", "trace.json")),
    ("export-triton/1", ("export-triton", "f32.engine", "-o", "for-triton", "--force")),
    ("run/1", ("run", "int8.engine", "--input", "x=x.npy", "--output-dir", "out")),
    ("bench/1", ("bench", "f32.engine", "--vs", "onnxruntime", *SHORT, "--save", "b.json")),
    ("bench/1", ("bench", "f32.engine", *SHORT, "--baseline", "b.json", "--max-slowdown", "999%")),
    ("bench/1", ("bench", "int8.engine", *SHORT, "--concurrency", "2")),
    ("compare/1", ("compare", "model.onnx", "int8.engine", *DATA)),
    ("compare/1", ("compare", "model.onnx", "int8.engine", *DATA, "--layers")),
    ("compare/1", ("compare", "model.onnx", "int8.engine", *BLAMED, "--max-drop", "100")),
    ("pipeline.plan/1", ("pipeline", "small.yaml", "--run", "new", "--dry-run")),
    ("pipeline/1", ("pipeline", "small.yaml", "--run", "run")),
    ("pipeline.plan/1", ("pipeline", "small.yaml", "--run", "run", "--dry-run")),
    ("report/1", ("report", "run", "-o", "page.html")),
    ("error/1", ("explain", "none.engine")),
    ("error/1", ("build", "model.onnx", "-o", "no.engine", "--int8")),
)
# Objects whose keys are names: of tensors, packages, operators.
MAPS: dict[str, tuple[str, ...]] = {
    "doctor/1": ("packages", "cuda.parts", "missing_features", "speed.peak_gmacs"),
    "quantize/1": ("patterns",),
    "inspect.model/1": ("operators",),
    "explain/1": ("rates.peak_gmacs",),
    "forecast/1": ("inputs",),
    "run/1": ("outputs",),
    "search/1": (
        "layers",
        "points[].counts",
        "units[].times_us",
        "units[].errors",
        "units[].drops",
    ),
    "bench/1": ("inputs",),
    "pipeline/1": ("stages[].settings",),
}
# These are tested where they are run: they take long, or need a server.
ELSEWHERE = {
    "demo": "tests/demo",
    "bench.url": "tests/cli/test_bench_url.py",
    "registry.diff": "tests/cli/test_registry.py",
    "registry.keygen": "tests/cli/test_registry.py",
    "registry.promote": "tests/cli/test_registry.py",
    "registry.publish": "tests/cli/test_registry.py",
    "registry.verify": "tests/cli/test_registry.py",
    "registry.versions": "tests/cli/test_registry.py",
}
SILENT = {"serve"}  # has no document: its log is lines of JSON
RECIPE_OF_THE_PAGE = """\
name: small
model: {onnx: model.onnx}
data: {calibrate: data.npz, evaluate: data.npz}
sparsify: {method: magnitude, exclude: [linear]}
quantize: {recipe: fast}
build: {tuning_effort: 0}
benchmark: {duration: 0.05, vs: []}
gate: {max_drop: 100, min_speedup: 0.0001, max_memory: 10G, undecided: pass}
"""
NAMES = tuple(dict.fromkeys(schema for schema, _ in CALLS))


def twofour(*arguments: str, width: int | None = None) -> Result:
    """In this process, as it prints where there is no terminal."""
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": str(width) if width else None})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schemas")
    conv_model(folder / "model.onnx", scale=0.2)
    plain_model(folder / "image.onnx", [1, 3, 8, 8], [3, 3])
    plain_model(folder / "volume.onnx", [1, 4, 8, 8, 8], [3, 3, 3])
    sample_engine().save(folder / "sample.engine")
    save_model(nearly_sparse(load_model(folder / "model.onnx")), folder / "nearly.onnx")
    x = np.random.default_rng(0).standard_normal((8, 4, 8, 8)).astype(np.float32)
    np.save(folder / "x.npy", x[:1])
    np.savez(folder / "data.npz", x=x, labels=np.zeros(len(x), np.int64))
    (folder / "gains.json").write_text(json.dumps(made_up_forecast({"conv": 2.0, "linear": -1.0})))
    (folder / "small.yaml").write_text(RECIPE_OF_THE_PAGE)
    (folder / "scan.jsonl").write_text('{"key": "k"}\n')
    (folder / "metric_of_the_page.py").write_text(
        "def low(outputs, labels):\n    return float('nan')\n"
        "def first(outputs, labels):\n    return -float([*outputs.values()][0][:, 0].mean())\n"
    )
    return folder


def made_up_forecast(gains: dict[str, float]) -> dict[str, Any]:
    """Of layers whose sparse kernels save so many microseconds."""
    layers = [
        {
            "name": name,
            "nodes": [name],
            "times": [
                {
                    "precision": "int8",
                    "dense_us": 10.0,
                    "pruned": [{"pattern": "2:4", "sparse_us": 10.0 - us, "chosen_us": 10.0}],
                }
            ],
        }
        for name, us in gains.items()
    ]
    machine = {"cpu": "a CPU", "target": "cpu:vector", "threads": 1, "judged": None}
    return {"schema": "twofour.forecast/1", "layers": layers, **machine}


def nearly_sparse(model: ir.Model) -> ir.Model:
    """2:4 but for one group, which breaks a promise; another is of a weight that is gone."""
    pruned = prune(model)[0]
    _, weight = next(layer_weights(pruned))
    values = weight.stored.copy()
    values.reshape(len(values), 4, -1)[1, :, 0] = 1
    pruned.graph.initializers[weight.name].const_value = ir.tensor(values, name=weight.name)
    promise(pruned, {weight.name: "2:4", "gone": "4:8"})
    return pruned


@pytest.fixture(scope="module")
def documents(folder: Path) -> dict[str, list[Any]]:
    """What each call printed, by schema; doctor also on machines unlike this one."""
    found: dict[str, list[Any]] = {name: [] for name in NAMES}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for schema, arguments in CALLS:
            result = twofour(*arguments, "--json")
            assert (result.exit_code == 2) == (schema == "error/1"), result.output
            document = json.loads(result.stdout)
            assert document["schema"] == f"twofour.{schema}", arguments
            assert next(iter(document)) == "schema"
            found[schema].append(document)
        for machine, gpus in ((UNKNOWN, ()), (KNOWN, (Gpu("a GPU", 1 << 34, "1.2"), Gpu("two")))):
            plant_machine(patch, machine, gpus)
            found["doctor/1"].append(json.loads(twofour("doctor", "--measure", "--json").stdout))
    return found


@pytest.mark.parametrize("schema", NAMES)
def test_a_document_has_the_structure_of_its_golden_file(
    schema: str, documents: dict[str, list[Any]], request: pytest.FixtureRequest
) -> None:
    found = [structure(each, MAPS.get(schema, ())) for each in documents[schema]]
    compare(schema, found, update=request.config.getoption("--update-golden"))


def test_each_command_and_each_golden_file_is_compared() -> None:
    commands = {
        command.callback.__name__.replace("_", "-")  # type: ignore[union-attr]
        for command in app.registered_commands
    } | {group.name for group in app.registered_groups}
    elsewhere = {name.partition(".")[0] for name in ELSEWHERE}
    assert commands == {arguments[0] for _, arguments in CALLS} | elsewhere | SILENT
    assert {path.stem for path in GOLDEN.iterdir()} == {
        *(name.partition("/")[0] for name in NAMES),
        *ELSEWHERE,
    }


@pytest.mark.parametrize("width", [None, 80])
def test_what_is_printed_fits(
    width: int | None, folder: Path, documents: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`documents` has made the files that the calls read."""
    monkeypatch.chdir(folder)
    for schema, arguments in CALLS:
        result = twofour(*arguments, width=width)
        assert (result.exit_code == 2) == (schema == "error/1"), result.output
        longest = max((line for line in result.stdout.splitlines()), key=len, default="")
        assert len(longest) <= (width or PLAIN_WIDTH), f"{arguments}: {longest}"
        assert "\x1b" not in result.output


def test_structures() -> None:
    value = {"a": 1, "b": [{"c": "x"}, {"c": None, "d": 2.5}], "m": {"Conv": 3}, "e": []}
    assert structure(value, ("m",)) == {
        "a": "integer",
        "b": [{"c": "null|string", "d?": "number"}],
        "m": {"*": "integer"},
        "e": [],
    }
    assert structure([1, 2.5, None]) == ["null|number"]
    assert structure([{"a": 1}, None, [2]]) == [{"|": [{"a": "integer"}, ["integer"], "null"]}]


@pytest.mark.parametrize(
    "other",
    [
        {"a": 1, "b": [{"c": "x"}]},
        {"a": 1, "b": []},
    ],
)
def test_what_a_golden_file_covers(other: Any) -> None:
    golden = structure({"a": 1, "b": [{"c": "x"}, {"c": None}]})
    assert merged(golden, structure(other)) == golden


@pytest.mark.parametrize(
    "other",
    [
        {"a": 1},
        {"a": 1.5, "b": []},
        {"a": 1, "b": None},
        {"a": 1, "b": [], "c": 2},
        {"a": 1, "b": [{"d": "x"}]},
        {"a": 1, "b": [{"c": 3}]},
        {"a": 1, "b": ["x"]},
    ],
)
def test_what_a_golden_file_does_not_cover(other: Any) -> None:
    golden = structure({"a": 1, "b": [{"c": "x"}, {"c": None}]})
    assert merged(golden, structure(other)) != golden
