"""A version of a snapshot -> an engine that runs here: picked, or built; else every reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from twofour.core.errors import EngineError, Error
from twofour.engine import Engine
from twofour.serve.repository.cache import Stop, check_wanted
from twofour.serve.repository.config import Build
from twofour.serve.repository.errors import PassingError
from twofour.serve.repository.layout import ONNX, VersionEntry
from twofour.serve.repository.pick import judge, pick
from twofour.serve.repository.rebuild import Builds, job_of
from twofour.serve.repository.store import Store


@dataclass(frozen=True)
class Opened:
    """An engine of a version.

    Attributes:
        engine: read, every hash compared, for a target that runs here. Nothing of it was mapped.
        name: of its file; "" where it was built here.
        passed_over: why other engines of the version were not taken, one line each.
    """

    engine: Engine
    name: str
    passed_over: tuple[str, ...]


def needs_build(
    store: Store, version: VersionEntry, build: Build, builds: Builds, stop: Stop | None = None
) -> bool:
    """Whether opening a version will take a build; reads plans and hashes, nothing is built.

    Args:
        store: the repository.
        version: of a snapshot of it.
        build: the section of the model's configuration.
        builds: of this machine.
        stop: ends fetching and hashing.

    Raises:
        Error: it cannot be opened at all, with every reason that is known by now; or `stop` was
            set.
    """
    wanted = stop or Stop()
    refused: tuple[str, ...] = version.problems
    try:
        with store.files(version, version.engines, wanted) as folder:
            choice = judge(folder, version.engines)
        if choice.fits:
            return False
        refused += tuple(f"{name}: {reason}" for name, reason in sorted(choice.refused.items()))
        _require_source(version, build)
        with store.files(version, version.sources, wanted) as folder:
            return not builds.has(job_of(version, folder, build, wanted))
    except (Error, OSError) as e:
        check_wanted(wanted, f"opening {version.title}")
        raise _unusable(store, version, refused, e) from e


def open_engine(
    store: Store,
    version: VersionEntry,
    build: Build,
    builds: Builds,
    stop: Stop | None = None,
    on_build: Callable[[str], None] | None = None,
) -> Opened:
    """The engine of a version that fits this machine best, or one built of its ONNX file.

    Args:
        store: the repository.
        version: of a snapshot of it.
        build: the section of the model's configuration.
        builds: of this machine.
        stop: ends fetching and building.
        on_build: called with the reason when no engine fits, before one is built or taken from
            the cache.

    Raises:
        EngineError: no engine can be used, with every reason. Where files are still coming, it
            says so: try again when the version's fingerprint has changed.
        PassingError: the network or the disk failed: try again.
        Error: `stop` was set.
    """
    wanted = stop or Stop()
    refused: tuple[str, ...] = version.problems
    try:
        with store.files(version, version.engines, wanted) as folder:
            picked = pick(folder, version.engines)
        refused += picked.refused
        if picked.engine is not None:
            return Opened(picked.engine, picked.name, refused)
        _require_source(version, build)
        with store.files(version, version.sources, wanted) as folder:
            job = job_of(version, folder, build, wanted)
            if on_build is not None:
                on_build("; ".join(refused) or f"{version.title} has no engine")
            return Opened(builds.engine(job, wanted), "", refused)
    except (Error, OSError) as e:
        check_wanted(wanted, f"opening {version.title}")
        raise _unusable(store, version, refused, e) from e


def _require_source(version: VersionEntry, build: Build) -> None:
    """Refuses a version of which nothing can be built.

    Raises:
        EngineError: says why.
    """
    if not any(name.endswith(ONNX) for name in version.sources):
        reason = f"no {ONNX} file to build one of"
    elif not build.enabled:
        reason = "build.enabled is false in config.yaml"
    else:
        return
    none = "" if version.engines else "no .engine file; "
    raise EngineError(f"{none}{reason}")


def _unusable(
    store: Store, version: VersionEntry, refused: tuple[str, ...], error: Error | OSError
) -> Error:
    """All reasons in one error."""
    last = [error.what, *error.reasons] if isinstance(error, Error) else [str(error)]
    if isinstance(error, PassingError):
        return PassingError(f"{version.title} cannot be read now", [*refused, *last], error.fix)
    if store.has_changed(version):
        what = f"{version.title} is not usable yet"
        fix = "its files are still changing: it is tried again when they have"
        return EngineError(what, [*refused, *last], fix)
    fix = (error.fix if isinstance(error, Error) else "") or (
        "put an engine for this machine, or the .onnx file, into the version's folder"
    )
    return EngineError(f"{version.title} cannot be used here", [*refused, *last], fix)
