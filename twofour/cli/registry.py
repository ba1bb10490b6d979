"""twofour registry: versions that are published once, promoted, rolled back and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twofour.cli.options import require_packages
from twofour.cli.output import Json, Output, Quiet, command
from twofour.cli.registry_report import (
    diff_parts,
    plain_manifest,
    promotion_document,
    promotion_lines,
    versions_parts,
)

if TYPE_CHECKING:
    from twofour.registry.promote import Promotion
    from twofour.serve.repository.signatures import TrustedKeys

_PACKAGES = ("cryptography", "fsspec", "pydantic", "yaml")

app = typer.Typer(
    help="Publish versions of models, promote them, and go back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Repository = Annotated[str, typer.Argument(help="A folder or URL, as of twofour serve.")]
Name = Annotated[str, typer.Argument(help="Of the model.")]
Version = Annotated[int, typer.Argument(min=1, help="Its number.")]
Message = Annotated[str, typer.Option("--message", "-m", help="Why; for the history.")]
By = Annotated[str, typer.Option(help="Who; by default user@machine.")]
Keys = Annotated[
    Path | None, typer.Option(help="PEM file of public keys, one of which must have signed.")
]
Mlflow = Annotated[
    str | None,
    typer.Option("--mlflow", metavar="URI", help="Tell this MLflow too: sqlite:///mlflow.db."),
]


def keygen(
    path: Annotated[Path, typer.Argument(help="PEM file to write; the public key is FILE.pub.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a key to sign versions with.

    Example: twofour registry keygen publish.pem
    """
    _require()
    from twofour.registry.keys import new_key

    out = Output(as_json, quiet)
    made = new_key(path)
    out.show(
        f"private key: {made.private}  (keep it where versions are published, and nowhere else)",
        f"public key {made.name}: {made.public}  (twofour serve --trusted-keys {made.public})",
    )
    files = {"private": str(made.private), "public": str(made.public)}
    out.data("registry.keygen/1", {"key": made.name, **files})


def publish(
    repository: Repository,
    name: Name,
    files: Annotated[list[str], typer.Argument(help="FILE, or NAME=FILE to call it NAME.")],
    key: Annotated[Path | None, typer.Option(help="PEM file of the key to sign with.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="NAME=NUMBER of the model, FILE:NAME=NUMBER of an engine; repeatable."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of a pipeline run: its lineage and figures.")
    ] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Serve it, and it alone.")] = False,
    message: Message = "",
    by: By = "",
    mlflow: Mlflow = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    r"""Publish files as the next version of a model.

    Servers see the version when it is whole. It is never changed after that: files that have been
    published already are not published again.

    Example: twofour registry publish models resnet20 avx512.engine avx2.engine model.onnx
    Example: twofour registry publish models resnet20 a.engine --key publish.pem --promote
    Example: twofour registry publish models resnet20 a.engine --metric top1=91.5
    """
    _require(mlflow)
    from twofour.registry.publish import PublishOptions
    from twofour.registry.publish import publish as publish_files

    out = Output(as_json, quiet)
    metrics, of_engines = _metrics(metric or ())
    lineage: dict[str, Any] = {}
    if run is not None:
        from twofour.registry.lineage import metrics_of_run, of_run, read_run

        document = read_run(run)
        lineage, metrics = of_run(document), metrics_of_run(document) | metrics
    with out.stage("publishing") as report:
        told: dict[str, Any] = {"message": message, "by": by, "report": report}
        options = PublishOptions(key, metrics, of_engines, lineage, **told)
        found = publish_files(repository, name, _files(files), options)
    promotion = _promote(repository, name, found.version, 100.0, message, by) if promote else None
    registered = _register(repository, name, found.version, mlflow, out)
    aliases = _follow(name, promotion, mlflow)
    there = "there already as" if found.existed else "published:"
    signed = f", signed by {found.signed_by}" if found.signed_by else ""
    out.show(f"{there} version {found.version} of {name}{signed}: {found.place}")
    out.show(*promotion_lines(promotion))
    _note_served(repository, name, found.version, promotion, out)
    out.data(
        "registry.publish/1",
        {
            "name": name,
            "version": found.version,
            "place": found.place,
            "existed": found.existed,
            "signed_by": found.signed_by or None,
            "manifest": plain_manifest(found.manifest),
            "promotion": promotion_document(promotion, aliases) if promotion else None,
            "mlflow": registered,
        },
    )


def versions(
    repository: Repository,
    name: Name,
    trusted_keys: Keys = None,
    history: Annotated[bool, typer.Option("--history", help="Who did what, and when.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the versions of a model, and which are served.

    Example: twofour registry versions models resnet20 --history
    """
    _require()
    from twofour.core.records import to_plain
    from twofour.registry.catalog import catalog

    out = Output(as_json, quiet)
    with out.stage("reading"):
        found = catalog(repository, name, _trusted(trusted_keys))
    out.show(*versions_parts(found, history=history))
    rows = [
        {
            "version": row.version,
            "state": row.state,
            "percent": row.percent,
            "size_bytes": row.size_bytes,
            "manifest": plain_manifest(row.manifest) if row.manifest else None,
        }
        for row in found.rows
    ]
    events = [to_plain(event) for event in found.events]
    out.data("registry.versions/1", {"place": found.place, "versions": rows, "history": events})


def promote(
    repository: Repository,
    name: Name,
    version: Version,
    share: Annotated[
        float, typer.Option(help="Percent of the requests; the others stay where they are.")
    ] = 100.0,
    message: Message = "",
    by: By = "",
    mlflow: Mlflow = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Serve a version: alone, or with a share of the requests.

    It is written to the model's config.yaml: servers with --control poll follow, without losing a
    request.

    Example: twofour registry promote models resnet20 4 --share 10
    Example: twofour registry promote models resnet20 4 -m "a week without complaints"
    """
    _require(mlflow)
    out = Output(as_json, quiet)
    found = _promote(repository, name, version, share, message, by)
    _show_promotion("registry.promote/1", found, _follow(name, found, mlflow), out)


def rollback(
    repository: Repository,
    name: Name,
    message: Message = "",
    by: By = "",
    mlflow: Mlflow = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Serve the version again that was served alone before.

    Example: twofour registry rollback models resnet20 -m "wrong labels on night images"
    """
    _require(mlflow)
    from twofour.registry.promote import PromoteOptions
    from twofour.registry.promote import rollback as roll_back

    out = Output(as_json, quiet)
    found = roll_back(repository, name, PromoteOptions(message=message, by=by))
    _show_promotion("registry.promote/1", found, _follow(name, found, mlflow), out)


def diff(
    repository: Repository,
    name: Name,
    old: Annotated[int, typer.Argument(min=1, help="A version.")],
    new: Annotated[int, typer.Argument(min=1, help="Another.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what differs between two versions.

    Example: twofour registry diff models resnet20 3 4
    """
    _require()
    from twofour.core.records import to_plain
    from twofour.registry.diff import diff as compare

    out = Output(as_json, quiet)
    found = compare(repository, name, old, new)
    out.show(*diff_parts(found))
    out.data("registry.diff/1", {**to_plain(found), "same": found.same})


def verify(
    repository: Repository,
    name: Name,
    version: Version,
    trusted_keys: Keys = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read a version's files and hold them against its manifest.

    Exit code 1 if it is not what was published, or no trusted key has signed it.

    Example: twofour registry verify models resnet20 4 --trusted-keys publish.pub
    """
    _require()
    from twofour.registry.places import open_place
    from twofour.registry.reading import verify as verify_files
    from twofour.registry.reading import version_of, versions_of

    out, trust = Output(as_json, quiet), _trusted(trusted_keys)
    place = open_place(repository)
    entry = version_of(versions_of(place, name), version)
    with out.stage("reading") as report:
        found = verify_files(place, entry, trust, report)
    manifest = plain_manifest(found.manifest) if found.manifest else None
    signed = found.signed_by or None
    document = {"name": name, "version": version, "whole": not found.problems}
    out.data(
        "registry.verify/1",
        {**document, "signed_by": signed, "problems": list(found.problems), "manifest": manifest},
    )
    if found.problems or found.manifest is None:
        out.fail(f"{entry.title} is not what was published", *(f"  {p}" for p in found.problems))
    by = f", signed by {signed}" if signed else ""
    out.show(f"{entry.title}: {len(found.manifest.files)} files are what was published{by}")


for function in (keygen, publish, versions, promote, rollback, diff, verify):
    app.command()(command(function))


def _require(mlflow: str | None = None) -> None:
    require_packages("the registry", _PACKAGES, "registry")
    if mlflow is not None:
        require_packages("--mlflow", ("mlflow",), "mlflow")


def _trusted(path: Path | None) -> TrustedKeys | None:
    if path is None:
        return None
    from twofour.serve.repository.signatures import read_trusted_keys

    return read_trusted_keys(path)


def _files(texts: Sequence[str]) -> dict[str, Path]:
    """FILE or NAME=FILE -> name -> file.

    Raises:
        InputError: a name twice.
    """
    from twofour.core.errors import InputError

    found: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        file = Path(path) if equals and not Path(text).exists() else Path(text)
        name = name if equals and file == Path(path) else file.name
        if name in found:
            reason = f"{name} stands for {found[name]} and for {file}"
            raise InputError("a name is given twice", [reason], "write NAME=FILE for one of them")
        found[name] = file
    return found


def _metrics(texts: Sequence[str]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """NAME=NUMBER and FILE:NAME=NUMBER -> those of the model, and those of each file.

    Raises:
        InputError: not of this form.
    """
    from math import isfinite

    from twofour.core.errors import InputError

    of_model: dict[str, float] = {}
    of_files: dict[str, dict[str, float]] = {}
    for text in texts:
        left, equals, number = text.rpartition("=")
        file, colon, name = left.rpartition(":")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not equals or not name or not isfinite(value):
            expected = f"expected NAME=NUMBER or FILE:NAME=NUMBER, got {text!r}"
            raise InputError("bad --metric", [expected], "write it like --metric top1=91.5")
        (of_files.setdefault(file, {}) if colon else of_model)[name] = value
    return of_model, of_files


def _promote(
    repository: str, name: str, version: int, share: float, message: str, by: str
) -> Promotion:
    from twofour.registry.promote import PromoteOptions
    from twofour.registry.promote import promote as promote_version

    return promote_version(repository, name, version, PromoteOptions(share, message, by))


def _show_promotion(
    schema: str, found: Promotion, aliases: Mapping[str, str] | None, out: Output
) -> None:
    out.show(*promotion_lines(found))
    out.data(schema, promotion_document(found, aliases))


def _note_served(
    repository: str, name: str, version: int, promotion: Promotion | None, out: Output
) -> None:
    """Says so where the configuration serves a new version without anybody promoting it."""
    from twofour.registry.catalog import percent_of

    if promotion is None and percent_of(repository, name, version):
        out.note(
            f"its config.yaml serves the newest version, and so serves version {version}: "
            f"twofour registry promote pins one"
        )


def _register(
    repository: str, name: str, version: int, uri: str | None, out: Output
) -> dict[str, Any] | None:
    """Tells MLflow of a version; what it then has."""
    if uri is None:
        return None
    from twofour.registry.mlflow import MlflowOptions, register

    with out.stage("telling MLflow"):
        made = register(repository, name, version, MlflowOptions(uri))
    out.show(f"MLflow: version {made.version} of {made.name}, run {made.run_id}")
    return {"name": made.name, "version": made.version, "run_id": made.run_id}


def _follow(name: str, promotion: Promotion | None, uri: str | None) -> Mapping[str, str] | None:
    """Lets MLflow's aliases follow; alias -> its version."""
    if uri is None or promotion is None:
        return None
    from twofour.registry.mlflow import MlflowOptions, follow

    return follow(name, promotion.event.serves, MlflowOptions(uri))
