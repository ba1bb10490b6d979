"""A published version as a version of a model in MLflow's registry; the only home of mlflow.

    twofour                            MLflow
    version 3 of resnet20              a run with metrics and artifacts, and a version of the
                                       registered model resnet20 with tags `twofour.*`
    promote: 90 % version 3, 10 % 4    aliases: `production` is version 3, `canary` version 4

MLflow numbers versions by itself: the tag `twofour.version` says which one of ours it is. The
repository stays what servers read; MLflow is told.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from twofour.core.errors import InputError
from twofour.registry.places import Place, open_place
from twofour.registry.reading import checked_parts, read_published, version_of, versions_of
from twofour.serve.repository.layout import MANIFEST, SIGNATURE, VersionEntry
from twofour.serve.repository.manifest import SIGNATURE_BYTES, Manifest, write_manifest

PRODUCTION, CANARY = "production", "canary"
_FOLDER = "model"
_VERSION, _PLACE = "twofour.version", "twofour.repository"
_MOST_TAG = 5000


@dataclass(frozen=True)
class MlflowOptions:
    """Which MLflow is told.

    Attributes:
        uri: of tracking server and registry: "sqlite:///mlflow.db", "http://localhost:5000".
        experiment: in which the run is made.
        storage: options of fsspec's file system for the repository.
    """

    uri: str
    experiment: str = "twofour"
    storage: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Registered:
    """A version in MLflow.

    Attributes:
        name: of the registered model.
        version: MLflow's number of it.
        run_id: of the run that has its artifacts.
        existed: it was there before.
    """

    name: str
    version: str
    run_id: str
    existed: bool


def register(repository: str, name: str, version: int, options: MlflowOptions) -> Registered:
    """Tells MLflow of a published version, once: its files, metrics and hashes.

    Args:
        repository: a folder or a URL.
        name: of the model.
        version: published, of it.
        options: which MLflow.

    Raises:
        InputError: there is no such published version, or MLflow cannot be reached or refuses.
    """
    place = open_place(repository, options.storage)
    entry = version_of(versions_of(place, name), version)
    manifest = read_published(place, entry)
    if manifest is None:
        raise InputError(f"{entry.title} is not what was published", [], "publish it anew")
    with _asking(options) as client:
        found = _known(client, name).get(version)
        if found is not None:
            return Registered(name, str(found.version), str(found.run_id), True)
        run_id, source = _log_run(client, place, entry, manifest, options)
        if not _has_model(client, name):
            client.create_registered_model(name)
        made = client.create_model_version(
            name, source, run_id=run_id, tags=_tags(place, manifest), description=manifest.message
        )
        return Registered(name, str(made.version), run_id, False)


def follow(name: str, serves: Mapping[str, float], options: MlflowOptions) -> dict[str, str]:
    """Lets the aliases say what is served: the largest share is production, the next one canary.

    Args:
        name: of the model.
        serves: version -> percent, see `promote`.
        options: which MLflow.

    Returns:
        Alias -> MLflow's version.

    Raises:
        InputError: MLflow does not know one of the versions, or cannot be reached.
    """
    ranked = sorted(serves, key=lambda n: (-serves[n], int(n)))
    wanted = dict(zip((PRODUCTION, CANARY), ranked, strict=False))
    with _asking(options) as client:
        known = _known(client, name)
        missing = [n for n in wanted.values() if int(n) not in known]
        if missing:
            reason = f"it does not know version {', '.join(missing)} of model {name!r}"
            fix = "publish it with --mlflow, which tells MLflow of a version that is there too"
            raise InputError("MLflow's aliases cannot follow", [reason], fix)
        for alias, n in wanted.items():
            client.set_registered_model_alias(name, alias, known[int(n)].version)
        for alias in {PRODUCTION, CANARY} - wanted.keys():
            client.delete_registered_model_alias(name, alias)
        return {alias: str(known[int(n)].version) for alias, n in wanted.items()}


@contextmanager
def _asking(options: MlflowOptions) -> Iterator[MlflowClient]:
    """A client, whose errors become one message.

    Raises:
        InputError: MLflow cannot be reached or refuses.
    """
    try:
        yield MlflowClient(tracking_uri=options.uri, registry_uri=options.uri)
    except MlflowException as e:
        fix = "check --mlflow, the network and the credentials"
        raise InputError(f"MLflow at {options.uri} refuses", [str(e)], fix) from e


def _has_model(client: MlflowClient, name: str) -> bool:
    quoted = name.replace("'", "")
    return any(each.name == name for each in client.search_registered_models(f"name='{quoted}'"))


def _known(client: MlflowClient, name: str) -> dict[int, Any]:
    """Our version -> MLflow's, of those that it knows."""
    found: dict[int, Any] = {}
    token: str | None = None
    while True:
        page = client.search_model_versions(f"name='{name}'", page_token=token)
        for each in page:
            if str(each.tags.get(_VERSION, "")).isdecimal():
                found[int(each.tags[_VERSION])] = each
        token = page.token
        if not token:
            return found


def _log_run(
    client: MlflowClient,
    place: Place,
    entry: VersionEntry,
    manifest: Manifest,
    options: MlflowOptions,
) -> tuple[str, str]:
    """A run with the version's files and figures: its id, and where its artifacts lie."""
    experiment = client.get_experiment_by_name(options.experiment)
    made_in = (
        experiment.experiment_id if experiment else client.create_experiment(options.experiment)
    )
    run = client.create_run(made_in, run_name=f"{manifest.name}-{manifest.version}")
    run_id = run.info.run_id
    try:
        for metric, value in _metrics(manifest).items():
            client.log_metric(run_id, metric, value)
        for key, text in _tags(place, manifest).items():
            client.set_tag(run_id, key, text)
        with tempfile.TemporaryDirectory() as folder:
            _fetch(place, entry, manifest, Path(folder))
            client.log_artifacts(run_id, folder, _FOLDER)
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id)
    return run_id, f"{run.info.artifact_uri}/{_FOLDER}"


def _fetch(place: Place, entry: VersionEntry, manifest: Manifest, folder: Path) -> None:
    """Copies a version's files, each held against its hash, and the manifest."""
    where = f"{entry.model}/{entry.number}"
    for record in manifest.files:
        with (folder / record.name).open("xb") as file:
            for part in checked_parts(place, entry, record):
                file.write(part)
    (folder / MANIFEST).write_bytes(write_manifest(manifest))
    if (signature := place.small(f"{where}/{SIGNATURE}", SIGNATURE_BYTES)) is not None:
        (folder / SIGNATURE).write_bytes(signature)


def _metrics(manifest: Manifest) -> dict[str, float]:
    """Of the model by their names, of an engine behind its file's name."""
    found = dict(manifest.metrics)
    for engine in manifest.engines:
        found |= {f"{engine.file}/{name}": value for name, value in engine.metrics.items()}
    return {_key(name): value for name, value in found.items()}


def _tags(place: Place, manifest: Manifest) -> dict[str, str]:
    """What ties MLflow's version to ours."""
    tags = {
        _VERSION: str(manifest.version),
        _PLACE: f"{place.shown}/{manifest.name}/{manifest.version}",
        "twofour.created": manifest.created,
        "twofour.targets": ", ".join(sorted({engine.title for engine in manifest.engines})),
    }
    tags |= {f"twofour.sha256.{file.name}": file.sha256 for file in manifest.files}
    return {_key(key): text[:_MOST_TAG] for key, text in tags.items()}


def _key(text: str) -> str:
    """As MLflow takes the names of tags and metrics: letters, digits, and _ - . space : /."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in text)[:250]
