"""MLflow is told of versions and of what is served: a local one, on SQLite, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.registry.shelves import Shelf
from tests.serve.repository.sites import site
from twofour.core.errors import InputError
from twofour.registry.promote import PromoteOptions, promote
from twofour.serve.repository.manifest import parse_manifest

mlflow = pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
registry = pytest.importorskip("twofour.registry.mlflow")


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts by default
    return Shelf(site("local", tmp_path, str), tmp_path)


def options(tmp_path: Path) -> registry.MlflowOptions:
    return registry.MlflowOptions(f"sqlite:///{tmp_path}/mlflow.db")


def test_versions_become_mlflows_and_aliases_follow(shelf: Shelf, tmp_path: Path) -> None:
    told = options(tmp_path)
    figures = {"here.engine": {"latency_us": 120.0}}
    shelf.publish(0, metrics={"top1 %": 91.5}, engine_metrics=figures, key=shelf.key)
    shelf.publish(1)
    location = shelf.site.location
    second = registry.register(location, "net", 2, told)
    first = registry.register(location, "net", 1, told)
    assert (first.version, first.existed, second.version) == ("2", False, "1")
    assert registry.register(location, "net", 1, told) == registry.Registered(
        "net", "2", first.run_id, True
    )

    client = mlflow.MlflowClient(told.uri, told.uri)
    found = client.get_model_version("net", first.version)
    run = client.get_run(first.run_id)
    made = parse_manifest(shelf.contents()["1/manifest.json"])
    assert found.tags["twofour.version"] == "1"
    assert found.tags["twofour.sha256.here.engine"] == made.hashes["here.engine"]
    assert run.data.metrics == {"top1 _": 91.5, "here.engine/latency_us": 120.0}
    assert run.info.status == "FINISHED"
    folder = Path(client.download_artifacts(first.run_id, "model", str(tmp_path)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name.removeprefix("1/"): content
        for name, content in shelf.contents().items()
        if name.startswith("1/")
    }

    for share, expected in (
        (None, {"production": "2"}),
        (10.0, {"production": "2", "canary": "1"}),
    ):
        change = promote(location, "net", 2 if share else 1, PromoteOptions(share or 100.0))
        assert registry.follow("net", change.event.serves, told) == expected
        aliases = client.get_registered_model("net").aliases
        assert {name: str(version) for name, version in aliases.items()} == expected
    change = promote(location, "net", 2)
    assert registry.follow("net", change.event.serves, told) == {"production": "1"}
    assert set(client.get_registered_model("net").aliases) == {"production"}


def test_what_mlflow_does_not_know_is_said(shelf: Shelf, tmp_path: Path) -> None:
    shelf.publish(0)
    with pytest.raises(InputError, match="does not know version 1"):
        registry.follow("net", {"1": 100.0}, options(tmp_path))
    with pytest.raises(InputError, match="no version 2"):
        registry.register(shelf.site.location, "net", 2, options(tmp_path))
    with pytest.raises(InputError, match="MLflow at nonsense"):
        registry.register(shelf.site.location, "net", 1, registry.MlflowOptions("nonsense://x"))


def test_an_altered_version_is_not_registered(shelf: Shelf, tmp_path: Path) -> None:
    path = Path(shelf.publish(0).place) / "here.engine"
    content = bytearray(path.read_bytes())
    content[9] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    told = options(tmp_path)
    with pytest.raises(InputError, match="not what was published"):
        registry.register(shelf.site.location, "net", 1, told)
    client = mlflow.MlflowClient(told.uri, told.uri)
    assert not client.search_registered_models()
    (experiment,) = client.search_experiments(filter_string="name = 'twofour'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
