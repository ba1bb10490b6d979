"""Real work on a Ray cluster of two nodes: commands with --ray, and engines for several targets.

What is found is what processes find. The tests share a cluster, and each leaves it as it was.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[default]'")

from ray.cluster_utils import Cluster

from tests.cli.test_json_schemas import twofour
from tests.cluster import builds
from tests.cluster.nodes import two_nodes
from tests.evaluate.networks import network, samples, save, weights
from tests.evaluate.test_compare import outputs
from twofour.cluster.tasks import on_ray
from twofour.core.scan import Item, arrivals, key_of
from twofour.core.target import ISAS, Target, detect_host, missing_features
from twofour.engine import Engine
from twofour.runtime.session import Session

pytestmark = pytest.mark.slow
SCAN = ("sensitivity", "model.onnx", "--data", "data.npz", "--metric", "loss", "--forecast", "none")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with two_nodes() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.onnx, and data.npz with the classes that it gives as labels."""
    here = tmp_path_factory.mktemp("commands")
    arrays = weights()
    arrays["c0"][:2] *= 3000
    arrays["c1"][:, :2] /= 3000
    path = save(network(arrays), here / "model.onnx")
    x = samples(24)
    np.savez(here / "data.npz", x=x, labels=outputs(path, x).argmax(1))
    return here


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def printed(*arguments: str) -> dict[str, object]:
    result = twofour(*arguments, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    for case in document.get("cases", ()):
        del case["seconds"]
    return document


def test_a_sensitivity_scan(cluster: Cluster, here: Path) -> None:
    found = printed(*SCAN, "--ray", "--ray-address", cluster.address, "--jobs", "2")
    assert found == printed(*SCAN)
    assert len(found["cases"]) == 4


def test_a_search_for_the_layers_that_stay_float(cluster: Cluster, here: Path) -> None:
    data = ("--data", "data.npz", "--method", "minmax", "--max-drop", "10")
    search = ("quantize", "model.onnx", "-o", "int8.onnx", *data)
    found = printed(*search, "--ray", "--cache", "cache.jsonl")
    kept = (here / "cache.jsonl").read_text().splitlines()
    assert len(kept) == found["mixed"]["evaluations"]
    one = printed(*search)
    assert found["mixed"]["layers"] == one["mixed"]["layers"]
    assert found["mixed"]["mixed"] == one["mixed"]["mixed"]
    assert any(each["is_float"] for each in found["mixed"]["layers"])


def test_engines_for_several_targets(cluster: Cluster, here: Path) -> None:
    """Each is built and timed on a machine that can run it, and comes back as the file's bytes."""
    host = detect_host()
    every = [Target(isa, host.arch, host.model) for isa in ISAS]
    able = [target for target in every if not missing_features(target)]
    items = [Item(f"for {t}", key_of(str(t)), t, target=t) for t in able]
    start = functools.partial(builds.start, here / "model.onnx")
    with on_ray() as spread:
        found = {item.argument: content for item, content in arrivals(items, start, spread)}
    assert set(found) == set(able)
    x = samples(2)
    for target, content in found.items():
        (here / "found.engine").write_bytes(content)
        engine = Engine.load(here / "found.engine")
        assert engine.plan.target == target
        with Session(engine) as session:
            wanted = outputs(here / "model.onnx", x)
            np.testing.assert_allclose(session.run({"x": x})["y"], wanted, rtol=1e-3, atol=1e-2)
