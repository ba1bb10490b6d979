"""Writes a model folder for Triton: config.pbtxt, and for each version its engine and model.py.

DIR/NAME/config.pbtxt
DIR/NAME/labels_0.txt            where config.yaml has labels
DIR/NAME/VERSION/model.engine
DIR/NAME/VERSION/model.py        twofour/serve/triton/model.py as it is
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from twofour.core.errors import InputError, UnsupportedError
from twofour.engine import Engine
from twofour.serve.repository.config import ModelConfig, read_config
from twofour.serve.repository.layout import (
    CONFIG,
    Limits,
    VersionEntry,
    shown,
    sort_versions,
    why_not_model,
)
from twofour.serve.repository.local import list_folder
from twofour.serve.repository.pick import pick
from twofour.serve.triton.config import as_text, label_file, notes, python_config

ENGINE_FILE = "model.engine"
_MODEL_FILE = Path(__file__).with_name("model.py")


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        name: of the model.
        config: of the model.
        engines: version -> its engine file.
    """

    name: str
    config: ModelConfig
    engines: Mapping[int, Path]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: of the model's folder.
        versions: in it, ascending.
        notes: what is not quite the same behind Triton.
    """

    path: Path
    versions: tuple[int, ...]
    notes: tuple[str, ...]


def read_source(
    path: Path, name: str | None = None, version: int | None = None, config: Path | None = None
) -> Source:
    """Finds out what to export.

    Args:
        path: an .engine file, or a model's folder: config.yaml and VERSION/*.engine.
        name: of the model; by default the file's or the folder's.
        version: of an engine file, by default 1; of a folder the only one to take.
        config: a config.yaml; by default the folder's, else all defaults.

    Raises:
        InputError: a name that is none, a folder without a fitting engine, a wrong config.yaml.
    """
    folder = path.is_dir()
    if config is None and folder and (path / CONFIG).is_file():
        config = path / CONFIG
    settings = _read_config(config) if config is not None else ModelConfig()
    name = name or (path.resolve().name if folder else path.stem)
    if reason := why_not_model(name):
        raise InputError(f"{shown(name)!r} is no name of a model", [reason], "give one with --name")
    if not folder:
        return Source(name, settings, {version or 1: path})
    found, problems = sort_versions(name, list_folder(path), Limits())
    chosen = settings.versions.choose(list(found)) if version is None else [version]
    missing = [number for number in chosen if number not in found]
    if missing or not chosen:
        wanted = f"expected {', '.join(map(str, missing)) or 'folders named 1, 2, ...'}"
        has = f"found {', '.join(map(str, found)) or 'no version'}"
        raise InputError(f"{path} has no such version", [wanted, has, *problems])
    return Source(name, settings, {n: _engine_of(found[n], path / str(n)) for n in chosen})


def export(source: Source, repository: Path, force: bool = False) -> Exported:
    """Writes a model's folder into a repository of Triton, whole or not at all.

    Args:
        source: what to write.
        repository: the folder that `tritonserver --model-repository` gets; made if need be.
        force: replace a folder of that name.

    Raises:
        InputError: there is such a folder, or it cannot be written.
        UnsupportedError: Triton cannot serve this as configured; with all reasons.
        EngineError: an engine is damaged.
    """
    target = repository / source.name
    if target.exists() and not force:
        expected = "expected no folder of this name"
        raise InputError(f"{target} is there already", [expected], "give --force to replace it")
    plans = {version: Engine.load(path).plan for version, path in source.engines.items()}
    configs = {v: python_config(source.name, plan, source.config) for v, plan in plans.items()}
    newest = max(plans)
    if other := [v for v, config in configs.items() if config != configs[newest]]:
        raise UnsupportedError(
            f"versions of {source.name!r} differ in their inputs, outputs or batches",
            [f"version {version} differs from version {newest}" for version in other],
            "one config.pbtxt holds for all: export them under two names, with --version",
        )
    text = as_text(configs[newest])
    new = repository / f".{source.name}.{uuid.uuid4().hex}"
    try:
        repository.mkdir(parents=True, exist_ok=True)
        _write(source, [info.name for info in plans[newest].outputs], text, new)
        _put(new, target)
    except OSError as e:
        raise InputError(f"cannot write {target}", [str(e)], "choose a writable folder") from e
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return Exported(target, tuple(sorted(plans)), tuple(notes(plans[newest], source.config)))


def _read_config(path: Path) -> ModelConfig:
    try:
        return read_config(path.read_bytes(), path)
    except OSError as e:
        raise InputError(f"cannot read {path}", [str(e)], "name a config.yaml") from e


def _engine_of(version: VersionEntry, folder: Path) -> Path:
    """The engine of a version that the server would take on this machine.

    Raises:
        InputError: none runs here; says why.
    """
    picked = pick(folder, version.engines)
    if picked.engine is None:
        reasons = picked.refused or ("it has no engine", *version.problems)
        fix = "build one here: twofour build; or name an .engine file instead, and --config"
        raise InputError(f"no engine of {version.title} runs on this machine", reasons, fix)
    return folder / picked.name


def _write(source: Source, outputs: list[str], text: str, folder: Path) -> None:
    """All files of the model below `folder`."""
    folder.mkdir()
    (folder / "config.pbtxt").write_text(text)
    for index, name in enumerate(outputs):
        if labels := source.config.labels.get(name):
            lines = "".join(f"{label}\n" for label in labels)
            (folder / label_file(index)).write_text(lines, encoding="utf-8")
    for version, engine in source.engines.items():
        (folder / str(version)).mkdir()
        shutil.copyfile(engine, folder / str(version) / ENGINE_FILE)
        shutil.copyfile(_MODEL_FILE, folder / str(version) / "model.py")


def _put(new: Path, target: Path) -> None:
    """Renames a folder to where it belongs; what was there goes only once the new one is."""
    old = new.with_name(f"{new.name}.old")
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
