"""Searches on a small network: the bound holds, the answer is built, a search goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.evaluate.networks import LAYERS, network, samples, save, weights
from tests.evaluate.test_compare import outputs
from twofour.compiler.build import BuildOptions, compile_model
from twofour.core.errors import InputError
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.quantize import quantize
from twofour.search import final, points
from twofour.search.apply import ApplyOptions, apply, with_choices
from twofour.search.options import SearchOptions
from twofour.search.recipe import fields_of, write_recipe
from twofour.search.results import Found, document
from twofour.search.search import search

COUNT = 64
QUICK = SearchOptions(
    max_drop=5.0,
    precisions=("int8",),
    patterns=("2:4",),
    tuning_effort=1,
    evaluations=7,
    apply=ApplyOptions("magnitude", 32),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("search")
    dense = save(network(weights()), here / "model.onnx")
    x = samples(COUNT)
    np.savez(here / "data.npz", x=x, labels=outputs(dense, x).argmax(1))
    return here


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    """With a cache, which later tests read."""
    options = replace(QUICK, cache=folder / "cache.jsonl")
    return search(folder / "model.onnx", str(folder / "data.npz"), options)


def again(folder: Path, options: SearchOptions) -> Found:
    return search(folder / "model.onnx", str(folder / "data.npz"), options)


def test_the_answer_was_built_and_holds(found: Found) -> None:
    best = found.best
    assert best is not None
    assert best in found.points
    assert best.drop is not None
    assert best.drop <= 5
    holding = [p.latency_us for p in found.points if p.drop is not None and p.drop <= 5]
    assert best.latency_us == min(holding)
    assert set(found.layers(best)) == set(LAYERS)
    assert len(found.points) <= 7
    assert len({point.choices for point in found.points}) == len(found.points)


def test_all_layers_alike_are_among_the_points(found: Found) -> None:
    names = {point.name.partition(", ")[2]: point for point in found.points}
    assert {"everything float32", "everything INT8", "everything 2:4 INT8"} <= set(names)
    floats = names["everything float32"]
    assert (floats.speed, floats.drop) == ((1.0, 1.0, 1.0), 0.0)
    assert floats.error == pytest.approx(0, abs=1e-9)
    assert found.counts(names["everything INT8"]) == {"dense int8": 4}
    assert found.counts(names["everything 2:4 INT8"]) == {"2:4 int8": 4}
    assert found.everything_int8 is names["everything INT8"]


def test_harms_are_small_where_pruning_takes_nothing(found: Found) -> None:
    """The weights are all but 2:4 (see `networks.weights`)."""
    errors = {(harm.unit, harm.part): harm.error for harm in found.harms}
    assert set(errors) == {(layer, part) for layer in LAYERS for part in ("2:4", "int8")}
    assert all(0 <= error < 0.1 for error in errors.values())


def test_a_search_goes_on_where_it_ended(
    found: Found, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the third engine, within a line of the cache; the answer is the same."""
    cache = tmp_path / "cache.jsonl"
    lines = (folder / "cache.jsonl").read_bytes().splitlines(keepends=True)
    first = next(i for i, each in enumerate(lines) if b"the float32 engine" in each)
    cache.write_bytes(b"".join(lines[: first + 3]) + lines[first + 3][:30])
    times = (folder / "cache.jsonl.times").read_bytes()
    Path(f"{cache}.times").write_bytes(times)
    raced = []
    race = points.race
    monkeypatch.setattr(points, "race", lambda *args: raced.append(args) or race(*args))
    other = again(folder, replace(QUICK, cache=cache))
    first_ones = [
        [(p.name, p.choices, p.error) for p in each.points[:3]] for each in (other, found)
    ]
    assert first_ones[0] == first_ones[1]
    assert len(raced) == len(other.points) - 3  # what was known was not measured again
    assert any("1 damaged line(s)" in note for note in other.notes)
    raced.clear()
    once_more = again(folder, replace(QUICK, cache=cache))
    assert raced == []
    assert once_more.points == other.points
    assert once_more.answer == other.answer
    assert once_more.predicted == other.predicted


def test_a_finished_search_is_all_in_the_cache(found: Found, folder: Path) -> None:
    before = (folder / "cache.jsonl").read_bytes()
    other = again(folder, replace(QUICK, cache=folder / "cache.jsonl"))
    assert (folder / "cache.jsonl").read_bytes() == before
    first, second = document(found), document(other)
    notes = [[n for n in each.pop("notes") if "unsteady" in n] for each in (first, second)]
    assert not notes[1], "nothing was measured"
    assert first == second


def test_another_network_takes_none_of_it(folder: Path, found: Found, tmp_path: Path) -> None:
    save(network(weights(9)), tmp_path / "other.onnx")
    cache = tmp_path / "cache.jsonl"
    cache.write_bytes((folder / "cache.jsonl").read_bytes())
    before = len(cache.read_bytes().splitlines())
    search(tmp_path / "other.onnx", str(folder / "data.npz"), replace(QUICK, cache=cache))
    assert len(cache.read_bytes().splitlines()) >= before + len(found.points)


def test_the_best_metric_within_a_latency(folder: Path, found: Found, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    cache.write_bytes((folder / "cache.jsonl").read_bytes())
    Path(f"{cache}.times").write_bytes((folder / "cache.jsonl.times").read_bytes())
    limit = max(point.latency_us for point in found.points) * 0.9
    options = replace(QUICK, max_drop=None, max_latency_us=limit, cache=cache)
    other = again(folder, options)
    assert other.best is not None
    assert other.best.latency_us <= limit
    within = [p.drop for p in other.points if p.latency_us <= limit and p.drop is not None]
    assert other.best.drop == min(within)


def test_a_bound_that_nothing_holds(folder: Path, tmp_path: Path, found: Found) -> None:
    cache = tmp_path / "cache.jsonl"
    cache.write_bytes((folder / "cache.jsonl").read_bytes())
    options = replace(QUICK, max_drop=None, max_latency_us=0.01, cache=cache)
    other = again(folder, options)
    assert other.best is None
    assert "no engine that was built holds the bound" in other.notes
    with pytest.raises(InputError, match="without an answer"):
        fields_of(other, options, folder / "model.onnx", "data.npz")


def test_the_recipe_names_each_layer(found: Found, folder: Path, tmp_path: Path) -> None:
    options = replace(QUICK, samples=50)
    place = folder / "recipes"
    place.mkdir(exist_ok=True)
    fields = fields_of(found, options, folder / "model.onnx", str(folder / "data.npz"), place)
    write_recipe(fields, found, place / "recipe.yaml")
    text = (place / "recipe.yaml").read_text()
    assert text.startswith("# Found by twofour search in ")
    read = yaml.safe_load(text)
    assert read == fields
    assert read["model"] == {"onnx": "../model.onnx"}
    assert read["data"] == {"calibrate": "../data.npz", "evaluate": "../data.npz"}
    assert read["gate"] == {"max_drop": 5.0}
    assert found.best is not None
    assert read["layers"] == found.layers(found.best)


def test_the_choices_make_the_network_that_was_judged(found: Found, folder: Path) -> None:
    """`apply` by itself, as a pipeline calls it, gives the engine's metric again."""
    assert found.best is not None
    choices = found.layers(found.best)
    model = apply(load_model(folder / "model.onnx"), choices, folder / "data.npz", QUICK.apply)
    shapes = {"x": (1, *samples(1).shape[1:])}
    options = with_choices(choices, BuildOptions(race=False, tuning_effort=0, shapes=shapes))
    plan = compile_model(model, options).plan
    precisions = {name: each.precision for each in plan.layers for name in each.source}
    for layer, choice in choices.items():
        assert precisions[layer] == {"int8": "int8", "f32": "float32"}[choice.split()[1]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"max_drop": None}, "one bound"),
        ({"max_latency_us": 5.0}, "one bound"),
        ({"max_drop": -1.0}, "bad bound"),
        ({"max_drop": float("nan")}, "bad bound"),
        ({"max_drop": None, "max_latency_us": 0.0}, "bad bound"),
        ({"evaluations": 2}, "bad bounds"),
        ({"jobs": 0}, "bad bounds"),
        ({"tuning_effort": 0}, "tuning effort"),
        ({"precisions": ("f16",)}, "precision 'f16'"),
        ({"patterns": ("8:16",)}, "pattern '8:16'"),
        ({"patterns": ("x",)}, "pattern"),
    ],
)
def test_bad_options(bad: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(QUICK, **bad)  # type: ignore[arg-type]


def test_a_quantized_model_is_refused(folder: Path, tmp_path: Path) -> None:
    model = quantize(load_model(folder / "model.onnx"), {"x": samples(8)})
    save_model(model, tmp_path / "int8.onnx")
    with pytest.raises(InputError, match="quantized already"):
        search(tmp_path / "int8.onnx", str(folder / "data.npz"), QUICK)


def test_data_that_does_not_fit_is_found_at_once(folder: Path) -> None:
    with pytest.raises(InputError, match="needs labels"):
        search(folder / "model.onnx", {"x": samples(2)}, QUICK)
    calibrate = replace(QUICK, calibrate="none.npz")
    with pytest.raises(InputError, match="no data at"):
        search(folder / "model.onnx", str(folder / "data.npz"), calibrate)


def no_number(outputs: dict[str, np.ndarray], labels: np.ndarray) -> float:
    return float("nan")


def test_a_metric_without_a_number(folder: Path) -> None:
    options = replace(QUICK, metric=f"{__name__}:no_number")
    with pytest.raises(InputError, match="no number of the float model"):
        again(folder, options)


def test_a_file_that_is_no_cache_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine\n")
    with pytest.raises(InputError, match="no cache"):
        again(folder, replace(QUICK, cache=file))
    assert file.read_text() == "mine\n"


def test_the_answer_on_samples_that_the_search_did_not_use(folder: Path, tmp_path: Path) -> None:
    options = replace(QUICK, samples=40, evaluations=6, cache=tmp_path / "cache.jsonl")
    found = again(folder, options)
    assert found.samples == 40
    assert found.unseen is not None
    assert found.unseen.samples == COUNT - 40
    assert found.unseen.dense == 100
    assert found.unseen.figure is not None
    assert found.unseen.drop == pytest.approx(100 - found.unseen.figure)
    assert again(folder, options).unseen == found.unseen


def test_engines_as_fast_as_each_other_run_side_by_side(
    folder: Path, found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here all that hold the bound; each keeps its metric, and has the latency of the last race."""
    cache = tmp_path / "cache.jsonl"
    cache.write_bytes((folder / "cache.jsonl").read_bytes())
    Path(f"{cache}.times").write_bytes((folder / "cache.jsonl.times").read_bytes())
    monkeypatch.setattr(final, "_CLOSE", 1e6)
    raced = []
    race = final.race
    monkeypatch.setattr(final, "race", lambda *args: raced.append(args[0]) or race(*args))
    options = replace(QUICK, max_drop=100.0, cache=cache)
    other = again(folder, options)
    assert [len(contestants) for contestants in raced] == [final._MOST + 1]
    assert again(folder, options).points == other.points
    assert len(raced) == 1
    before = {point.choices: point for point in found.points}
    known = [point for point in other.points if point.choices in before]
    assert any(point.latency_us != before[point.choices].latency_us for point in known)
    assert all(point.figure == before[point.choices].figure for point in known)


def test_the_document_is_plain(found: Found) -> None:
    content = document(found)
    assert json.loads(json.dumps(content)) == content
    assert [unit["name"] for unit in content["units"]] == list(LAYERS)
    assert content["points"][content["answer"]]["name"] == found.points[found.answer or 0].name
