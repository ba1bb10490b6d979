"""Each layer pruned alone: the figures are those of such networks, however they were found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.evaluate.networks import CHANNELS, SIZE, network, samples, save, weights
from tests.sample_models import plain_model
from twofour.core.errors import InputError
from twofour.core.sensitivity import tradeoff
from twofour.evaluate.metrics import METRICS
from twofour.evaluate.sensitivity import Scanner, SensitivityOptions, sensitivity
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.reference import Reference

SPOILED = "c1"  # pruning takes half of it; the others are 2:4 but for little
PRUNED = ("c0", "c1", "c2", "fc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.onnx, and data.npz with the classes that it gives as labels."""
    folder = tmp_path_factory.mktemp("sensitivity")
    arrays = weights()
    shape = arrays[f"{SPOILED}"].shape
    arrays[SPOILED] = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    path = save(network(arrays), folder / "model.onnx")
    x = samples(60)
    scores = Reference(load_model(path)).run({"x": x})["y"]
    np.savez(folder / "data.npz", x=x, labels=scores.argmax(1))
    return folder


def test_the_figures_are_those_of_such_networks(folder: Path) -> None:
    found = sensitivity(folder / "model.onnx", folder / "data.npz")
    assert (found.metric, found.unit, found.dense, found.samples) == ("top1", "%", 100.0, 60)
    assert [case.layer for case in found.cases] == list(PRUNED)
    assert found.at("2:4")[0].layer == SPOILED
    assert found.at("2:4")[0].drop > 10
    model = load_model(folder / "model.onnx")
    data = np.load(folder / "data.npz")
    for case in found.cases:
        alone = prune(model, "2:4", [n for n in PRUNED if n != case.layer])
        scores = Reference(alone[0]).run({"x": data["x"]})["y"]
        right = 100 * float((scores.argmax(1) == data["labels"]).mean())
        assert case.figure == pytest.approx(right)
        assert case.drop == pytest.approx(100 - right)
        (entry,) = [each for each in alone[1] if not each.reason]
        assert case.energy_kept == pytest.approx(entry.energy_kept)
        assert case.skip == case.layer
        assert case.drop_error is not None
    assert found.cases[1].parameters == CHANNELS * CHANNELS * 9


def test_the_model_is_not_changed(folder: Path) -> None:
    before = (folder / "model.onnx").read_bytes()
    sensitivity(folder / "model.onnx", folder / "data.npz", SensitivityOptions(samples=4))
    assert (folder / "model.onnx").read_bytes() == before


def test_processes_and_patterns_change_no_figure(folder: Path) -> None:
    options = SensitivityOptions(patterns=("2:4", "2:4/pair", "2:4"), samples=20, metric="loss")
    one = sensitivity(folder / "model.onnx", folder / "data.npz", options)
    assert one.patterns == ("2:4", "2:4/pair")
    assert not one.higher_is_better
    both = sensitivity(folder / "model.onnx", folder / "data.npz", replace(options, jobs=2))
    assert [case.layer for case in both.cases] == [*PRUNED, *PRUNED]
    for a, b in zip(one.cases, both.cases, strict=True):
        assert replace(a, seconds=0) == replace(b, seconds=0, figure=a.figure, drop=a.drop)
        assert (a.figure, a.drop) == pytest.approx((b.figure, b.drop), rel=1e-5)


def test_a_scan_goes_on_where_it_stood(folder: Path, tmp_path: Path) -> None:
    cache, notes = tmp_path / "cache.jsonl", []
    options = SensitivityOptions(samples=20, cache=cache, skip=("fc", "c2*"))
    first = sensitivity(folder / "model.onnx", folder / "data.npz", options)
    assert len(cache.read_text().splitlines()) == 2
    assert [(each.layer, each.reason) for each in first.left] == [
        ("c2", "excluded by name"),
        ("fc", "excluded by name"),
    ]
    scanner = Scanner(folder / "model.onnx", folder / "data.npz", replace(options, skip=()))
    second = scanner.alone(note=notes.append)
    assert second.cases[:2] == first.cases  # with their seconds: found, not computed
    assert len(cache.read_text().splitlines()) == 4
    assert notes[0].startswith("2 networks to judge, 2 more are known: about ")


def test_results_of_another_model_data_or_metric_are_not_taken(
    folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache.jsonl"
    options = SensitivityOptions(samples=8, cache=cache)
    other = save(network(weights(6)), tmp_path / "other.onnx")
    data = dict(np.load(folder / "data.npz"))
    calls = [
        (folder / "model.onnx", data, options),
        (other, data, options),
        (folder / "model.onnx", data, replace(options, samples=9)),
        (folder / "model.onnx", data | {"labels": 1 - data["labels"] % 2}, options),
        (folder / "model.onnx", data, replace(options, metric="top5")),
        (folder / "model.onnx", data, replace(options, patterns=["1:4"])),
    ]
    for count, call in enumerate(calls):
        sensitivity(*call)
        assert len(cache.read_text().splitlines()) == 4 * (count + 1)
    sensitivity(*calls[0])
    assert len(cache.read_text().splitlines()) == 4 * len(calls)


def test_damaged_lines_are_told(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    options = SensitivityOptions(samples=4, cache=cache)
    cache.write_text("what is this\n")
    with pytest.raises(InputError, match="is no cache of results"):
        sensitivity(folder / "model.onnx", folder / "data.npz", options)
    cache.write_text('{"key": cut off\n')
    found = sensitivity(folder / "model.onnx", folder / "data.npz", options)
    assert found.notes == (f"{cache}: 1 damaged line(s) passed over",)
    assert [json.loads(line)["name"] for line in cache.read_text().splitlines()[1:]] == [
        f"{name} 2:4" for name in PRUNED
    ]


def test_layers_pruned_together_are_measured(folder: Path) -> None:
    scanner = Scanner(folder / "model.onnx", folder / "data.npz", SensitivityOptions(samples=30))
    found = scanner.alone()
    way = tradeoff(found.cases, "2:4", "int8", dict.fromkeys(PRUNED, 1.0))
    (measured,) = scanner.together([way], [[1, 4]])
    assert [some.count for some in measured.together] == [1, 4]
    alone = {case.layer: case for case in found.cases}
    assert measured.together[0].figure == alone[way.steps[0].layer].figure
    pruned = prune(load_model(folder / "model.onnx"))[0]
    data = np.load(folder / "data.npz")
    scores = Reference(pruned).run({"x": data["x"][:30]})["y"]
    right = 100 * float((scores.argmax(1) == data["labels"][:30]).mean())
    assert measured.together[1].figure == pytest.approx(right)


def test_batches_of_a_generator_are_kept(folder: Path) -> None:
    data = np.load(folder / "data.npz")
    batches = ({"x": data["x"][k : k + 5], "labels": data["labels"][k : k + 5]} for k in (0, 5))
    assert sensitivity(folder / "model.onnx", batches).samples == 10


def test_a_weight_that_two_layers_read_is_tried_once(tmp_path: Path) -> None:
    model = network(weights())
    model.graph.node[2].input[1] = "c0.w"
    path = save(model, tmp_path / "shared.onnx")
    data = {"x": samples(4), "labels": np.zeros(4, np.int64)}
    found = sensitivity(path, data)
    assert [(case.layer, case.skip) for case in found.cases] == [
        ("c0", "c0.w"),
        ("c2", "c2"),
        ("fc", "fc"),
    ]
    assert found.notes == ("c0: 2 layers read this weight, pruned for all",)


def test_names_are_those_of_the_modules(tmp_path: Path) -> None:
    """As `forecast` has them; `skip` is what the file has."""
    model = network(weights())
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace(".w", ".weight")
    for index, node in enumerate(model.graph.node):
        node.name = "" if index else "node_Conv_3"
        if len(node.input) > 1:
            node.input[1] = node.input[1].replace(".w", ".weight")
    path = save(model, tmp_path / "named.onnx")
    found = sensitivity(path, {"x": samples(2), "labels": np.zeros(2, np.int64)})
    assert [case.layer for case in found.cases] == ["c0", "c1", "c2", "fc"]
    assert [case.skip for case in found.cases][:2] == ["node_Conv_3", "c1.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "top9"}, "no metric 'top9'"),
        ({"patterns": ["2:4", "4:2"]}, "unknown sparsity pattern '4:2'"),
        ({"output": "z"}, "no output 'z'"),
        ({"skip": ["nothing*"]}, "'nothing\\*' matches no layer"),
        ({"skip": ["*"]}, "no layer of .* can be pruned"),
        ({"patterns": ["3:7"]}, "no layer of .* can be pruned"),
        ({"cache": "no/such/folder/cache"}, "cannot write the cache"),
    ],
)
def test_what_cannot_be_scanned_is_refused_before_any_pass(
    folder: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Scanner(folder / "model.onnx", folder / "data.npz", SensitivityOptions(**options))


def test_metrics_that_have_no_figure_of_one_sample(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a change in the file of one's own function makes its results new."""
    module, cache = tmp_path / "of_pairs.py", tmp_path / "cache.jsonl"
    monkeypatch.syspath_prepend(tmp_path)
    module.write_text(
        "def score(outputs, labels):\n"
        "    assert len(labels) == 8\n"
        "    return float((outputs['y'][0::2] * outputs['y'][1::2]).sum())\n"
    )
    options = SensitivityOptions(metric="of_pairs:score", samples=8, cache=cache)
    found = sensitivity(folder / "model.onnx", folder / "data.npz", options)
    assert {case.drop_error for case in found.cases} == {None}
    sensitivity(folder / "model.onnx", folder / "data.npz", options)
    assert len(cache.read_text().splitlines()) == 4
    module.write_text(module.read_text() + "# another\n")
    sensitivity(folder / "model.onnx", folder / "data.npz", options)
    assert len(cache.read_text().splitlines()) == 8


@pytest.mark.parametrize("metric", list(METRICS))
def test_a_metric_without_labels_is_refused(folder: Path, metric: str) -> None:
    with pytest.raises(InputError, match="needs labels"):
        Scanner(folder / "model.onnx", {"x": samples(4)}, SensitivityOptions(metric=metric))


def test_a_model_of_narrow_layers_has_reasons(tmp_path: Path) -> None:
    path = plain_model(tmp_path / "narrow.onnx", [1, 3, 8, 8], [3, 3])
    options = SensitivityOptions(patterns=["8:16"], metric="mse")
    x, labels = np.zeros((2, 3, 8, 8), np.float32), np.zeros((2, 8 * 4 * 4), np.float32)
    with pytest.raises(InputError) as error:
        Scanner(path, {"x": x, "labels": labels}, options)
    assert "first, 8:16: 3 input channels are not a multiple of 16" in error.value.reasons


def test_sizes_of_a_run_are_those_of_the_data(folder: Path) -> None:
    scanner = Scanner(folder / "model.onnx", folder / "data.npz")
    assert scanner.shapes == {"x": (1, CHANNELS, SIZE, SIZE)}
    assert list(scanner.parameters) == list(PRUNED)
