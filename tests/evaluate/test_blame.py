"""Layers that were spoiled on purpose are found, also within few runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.evaluate.networks import network, pruned, quantized, samples, save, weights
from tests.evaluate.test_compare import outputs
from twofour.cli import app
from twofour.compiler.build import build
from twofour.core.errors import InputError
from twofour.evaluate import Blame, BlameOptions, CompareOptions, compare

COUNT = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense.onnx, and two engines that are 2:4 and INT8.

    coarse: the scale of c0.relu is 20 times too large. masked: c2 keeps its smallest weights.
    """
    here = tmp_path_factory.mktemp("blame")
    arrays = weights()
    dense = save(network(arrays), here / "dense.onnx")
    for name, coarse, masked in (("coarse", "c0.relu", ""), ("masked", "", "c2")):
        sparse = save(network(pruned(arrays, masked)), here / "sparse.onnx")
        source = quantized(sparse, here / f"{name}.onnx", coarse)
        build(source, tuning_effort=0).save(here / f"{name}.engine")
    x = samples(COUNT)
    np.savez(here / "data.npz", x=x, labels=outputs(dense, x).argmax(1))
    return here


def blamed(folder: Path, name: str, metric: str | None, runs: int = 48) -> Blame:
    wanted = BlameOptions(folder / f"{name}.onnx", runs=runs)
    options = CompareOptions(metric, blame=wanted)
    engine = folder / f"{name}.engine"
    found = compare(folder / "dense.onnx", engine, folder / "data.npz", options).blame
    assert found is not None
    assert found.agreement_db > 100  # what is judged is the engine that was given
    return found


@pytest.mark.parametrize("metric", ["top1", None])
def test_a_coarse_scale_is_ranked_first(folder: Path, metric: str | None) -> None:
    found = blamed(folder, "coarse", metric)
    first, *others = found.int8
    assert first.layers == ("c1",)  # it reads c0.relu
    assert {row.layers for row in others} == {("c0",), ("c2",), ("fc",)}
    assert first.sqnr_gain_db > max(row.sqnr_gain_db for row in others) + 3
    assert (first.gain is None) == (metric is None)
    assert found.runs == 1 + 5 + 5


def test_a_mask_that_destroys_is_ranked_first(folder: Path) -> None:
    found = blamed(folder, "masked", "top1")
    first, *others = found.sparse
    assert (first.layers, first.kind) == (("c2",), "2:4")
    assert {row.layers for row in others} == {("c0",), ("c1",), ("fc",)}
    assert first.gain is not None
    assert first.gain > 20 + max(row.gain or 0.0 for row in others)


@pytest.mark.parametrize(("name", "kind", "layer"), [("coarse", 0, "c1"), ("masked", 1, "c2")])
def test_few_runs_find_them_too(folder: Path, name: str, kind: int, layer: str) -> None:
    """The guess puts them first; what there is no run for is tried at once."""
    found = blamed(folder, name, "top1", runs=8)
    assert found.runs <= 8
    assert (found.int8, found.sparse)[kind][0].layers == (layer,)
    for rows in (found.int8, found.sparse):
        assert sorted(name for row in rows for name in row.layers) == ["c0", "c1", "c2", "fc"]
        assert max(len(row.layers) for row in rows) > 1


def test_an_engine_quantized_at_build(folder: Path, tmp_path: Path) -> None:
    """Its source is a float model: it is quantized again, from the same samples."""
    data = {"x": samples(16)}
    engine = build(folder / "dense.onnx", int8=True, data=data, tuning_effort=0)

    def run(calibration: object) -> Blame | None:
        wanted = BlameOptions(calibration=calibration, runs=8)  # type: ignore[arg-type]
        options = CompareOptions(samples=8, blame=wanted)
        return compare(folder / "dense.onnx", engine, folder / "data.npz", options).blame

    with pytest.raises(InputError, match="quantized while it was built") as caught:
        run(None)
    assert "--calibration" in caught.value.fix
    found = run(data)
    assert found is not None
    assert found.agreement_db > 100
    assert (len(found.int8), found.sparse) == (4, ())


def test_another_source_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="is not what the engine was built from") as caught:
        compare(
            folder / "dense.onnx",
            folder / "coarse.engine",
            folder / "data.npz",
            CompareOptions(blame=BlameOptions()),
        )
    assert "--source" in caught.value.fix


def test_without_dense_weights_that_is_said(folder: Path) -> None:
    """Against the Q/DQ file itself: its weights are neither float nor dense."""
    options = CompareOptions(samples=8, blame=BlameOptions(runs=8))
    found = compare(
        folder / "coarse.onnx", folder / "coarse.engine", folder / "data.npz", options
    ).blame
    assert found is not None
    assert found.sparse == ()
    assert any("no dense weights for 4 layers" in note for note in found.notes)
    assert any("weights stay rounded" in note for note in found.notes)


def test_nothing_to_switch_back(folder: Path) -> None:
    engine = build(folder / "dense.onnx", tuning_effort=0)
    options = CompareOptions(blame=BlameOptions())
    with pytest.raises(InputError, match="nothing can be switched back"):
        compare(folder / "dense.onnx", engine, folder / "data.npz", options)


def test_the_command(folder: Path) -> None:
    arguments = ["dense.onnx", "coarse.engine", "--data", "data.npz", "--source", "coarse.onnx"]
    paths = [str(folder / each) if "." in each else each for each in arguments]
    command = ["compare", *paths, "--metric", "top1", "--blame", "--runs", "8", "--samples", "24"]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "100"}, catch_exceptions=False)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert "c1 (Conv)" in result.stdout
    document = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert document["blame"]["int8"][0]["layers"] == ["c1"]
