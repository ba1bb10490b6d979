"""Gains of layers, of what a forecast says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from twofour.core.errors import InputError
from twofour.predict.gains import SCHEMA, gains_of, measured_gains, read_gains


def times(precision: str, dense: float | None, **sparse: float | None) -> dict[str, Any]:
    names = {"free": "2:4", "pair": "2:4/pair"}
    pruned = [{"pattern": names[k], "sparse_us": v, "chosen_us": v} for k, v in sparse.items()]
    return {"precision": precision, "dense_us": dense, "pruned": pruned}


def layer(name: str, nodes: list[str], *each: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "nodes": nodes, "times": list(each)}


DOCUMENT = {
    "schema": SCHEMA,
    "cpu": "a CPU",
    "target": "cpu:vector",
    "threads": 2,
    "judged": {"precision": "int8", "pattern": "2:4/pair"},
    "layers": [
        layer("a", ["a"], times("int8", 10.0, free=6.0, pair=5.0), times("f32", 40.0, free=30.0)),
        layer("qkv", ["q", "k"], times("int8", 9.0, free=3.0, pair=3.0)),
        layer("slower", ["slower"], times("int8", 5.0, free=6.0, pair=None)),
        layer("unknown", ["unknown"], times("int8", None, free=6.0)),
    ],
}
SIZES = {"a": 10, "q": 10, "k": 20, "slower": 10, "unknown": 10, "elsewhere": 10}


def test_a_gain_is_what_the_sparse_kernel_saves() -> None:
    found = gains_of(DOCUMENT, "x.json")
    assert found.machine == "2 threads on a CPU (cpu:vector)"
    assert (found.judged, found.precisions) == ("int8", ("int8", "f32"))
    assert found.of(SIZES, "2:4", "int8") == {"a": 4.0, "q": 2.0, "k": 4.0, "slower": 0.0}
    assert found.of(SIZES, "2:4/pair", "int8") == {"a": 5.0, "q": 2.0, "k": 4.0}


def test_pairs_without_kernels_run_those_of_the_plain_pattern() -> None:
    assert gains_of(DOCUMENT, "x").of(SIZES, "2:4/pair", "f32") == {"a": 10.0}
    assert gains_of(DOCUMENT, "x").of(SIZES, "4:8", "int8") == {}


def test_a_product_with_a_weight_of_unknown_size_is_shared_out_evenly() -> None:
    assert gains_of(DOCUMENT, "x").of({"q": 10}, "2:4", "int8") == {"q": 3.0}


def test_the_forecast_of_another_model_is_refused() -> None:
    found = gains_of(DOCUMENT, "x.json")
    found.require_layers({"a": 1, "b": 1})
    with pytest.raises(InputError, match=r"x\.json is of another model"):
        found.require_layers({"b": 1})


def test_a_precision_that_is_not_there_is_refused() -> None:
    found = gains_of(DOCUMENT, "x.json")
    found.require_precision(None)
    with pytest.raises(InputError, match="no times in bf16"):
        found.require_precision("bf16")
    with pytest.raises(InputError, match="no times in any precision"):
        gains_of(DOCUMENT | {"layers": []}, "x.json").require_precision(None)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text(json.dumps(DOCUMENT))
    assert read_gains(path).source == str(path)
    damaged = {key: value for key, value in DOCUMENT.items() if key != "layers"}
    for content, message in (
        ("{", "is no JSON"),
        ("[]", "is no forecast"),
        (json.dumps({"schema": "twofour.compare/1"}), "is no forecast"),
        (json.dumps(damaged), "is damaged"),
        (json.dumps(DOCUMENT | {"layers": [{"times": [{}]}]}), "is damaged"),
        (json.dumps(DOCUMENT | {"threads": "many"}), "is damaged"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_gains(path)
    with pytest.raises(InputError, match="cannot read forecast"):
        read_gains(tmp_path / "none.json")


def test_patterns_without_kernels_cannot_be_measured() -> None:
    with pytest.raises(InputError, match="nothing can be forecast for 4:8"):
        measured_gains("m.onnx", {}, None, ["4:8"], lambda name: pytest.fail("no work"))


@pytest.mark.parametrize(
    "change",
    [
        {"threads": float("inf")},
        {"layers": [layer("a", [["a"]], times("int8", 2.0, free=1.0))]},  # type: ignore[list-item]
        {"layers": [layer("a", [1], times("int8", 2.0, free=1.0))]},  # type: ignore[list-item]
        {"layers": [layer(5, [], times("int8", 2.0, free=1.0))]},  # type: ignore[arg-type]
        {"layers": [layer("a", ["a"], times(8, 2.0, free=1.0))]},  # type: ignore[arg-type]
        {"layers": [layer("a", ["a"], times("int8", 10**400, free=1.0))]},
    ],
)
def test_a_forecast_with_other_things_than_names_and_numbers_is_damaged(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "f.json"
    path.write_text(json.dumps(DOCUMENT | change))
    with pytest.raises(InputError, match="is damaged"):
        read_gains(path)


def test_a_forecast_nested_without_end_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="is no JSON"):
        read_gains(path)


@pytest.mark.parametrize("judged", ["bf16", ["int8"], 3])
def test_a_fastest_precision_without_times_does_not_count(judged: object) -> None:
    assert gains_of(DOCUMENT | {"judged": {"precision": judged}}, "x").judged == ""


def test_a_time_that_no_layer_takes_is_none() -> None:
    endless = {"layers": [layer("a", ["a"], times("int8", 1e308, free=1.0))]}
    assert gains_of(DOCUMENT | endless, "x").of(SIZES, "2:4", "int8") == {}
