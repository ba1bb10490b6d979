"""A repository: what is in it, and its files as files of this machine.

    store = Store("s3://models/prod", Path("/var/cache/twofour"))
    snapshot = store.snapshot()
    with store.files(version, version.engines) as folder: ...

Local folders are read in place, but where keys are required: then what was verified is a copy that
nobody else may write to. All of it blocks: an event loop calls it in threads.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from twofour.core.errors import InputError
from twofour.serve.repository.cache import Cache, Stop, check_wanted
from twofour.serve.repository.config import MOST_CONFIG_BYTES, ModelConfig, read_config
from twofour.serve.repository.errors import PassingError
from twofour.serve.repository.layout import (
    CLAIM,
    CONFIG,
    MANIFEST,
    SIGNATURE,
    File,
    Folder,
    Limits,
    ModelEntry,
    Snapshot,
    VersionEntry,
    fingerprint,
    sort_files,
    sort_models,
    sort_versions,
)
from twofour.serve.repository.local import list_folder, parts
from twofour.serve.repository.manifest import (
    MOST_MANIFEST_BYTES,
    NOT_PUBLISHED,
    NOT_SIGNED,
    SIGNATURE_BYTES,
    Manifest,
    Trust,
    expected_of,
    not_trusted,
    read_manifest,
)
from twofour.serve.repository.remote import Remote

_HASHES = ".manifest.json"  # a hidden name, which no file of a repository has
_PART_BYTES = 8 << 20
_LOCAL = ("file://", "local://")

Config = tuple[ModelConfig | None, str]
Parts = Callable[[str, int], Iterator[bytes]]
Hashes = Mapping[str, str] | None


class Store:
    """A repository in a local folder, or behind a URL that fsspec reads.

    Args:
        location: a path, or a URL such as s3://bucket/folder, gs://..., memory://...
        cache: folder for the files of URLs; several servers may share it.
        options: of fsspec's file system, for example its credentials.
        limits: of the repository.
        most_cached_bytes: in the cache; what was not used for longest goes first.
        trust: versions are read only where their manifest has a signature that this believes; None:
            signatures mean nothing.

    Raises:
        InputError: the URL cannot be read, or the cache is not safe.
    """

    def __init__(
        self,
        location: str,
        cache: Path,
        options: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        most_cached_bytes: int = 64 << 30,
        trust: Trust | None = None,
    ) -> None:
        """Reads nothing yet."""
        for prefix in _LOCAL:
            location = location.removeprefix(prefix)
        self.limits = limits or Limits()
        self._remote = Remote(location, options or {}) if "://" in location else None
        self._root = Path(location)
        self._trust = trust
        cached = self._remote is not None or trust is not None
        self._cache = Cache(cache / "files", most_cached_bytes) if cached else None
        self._configs: dict[str, tuple[File, Config]] = {}
        self._lock = threading.Lock()

    @property
    def shown(self) -> str:
        """Where it is, as messages show it: without passwords."""
        return self._remote.shown if self._remote else str(self._root)

    def snapshot(self) -> Snapshot:
        """What is in the repository now.

        Raises:
            InputError: it cannot be read at all; what is wrong with one model is in its entry.
        """
        found, refused = sort_models(self._listing(), self.limits)
        models = {name: self._model(name, folder) for name, folder in found.items()}
        with self._lock:
            self._configs = {name: kept for name, kept in self._configs.items() if name in models}
        return Snapshot(models, refused)

    @contextmanager
    def files(
        self, version: VersionEntry, names: tuple[str, ...], stop: Stop | None = None
    ) -> Iterator[Path]:
        """A folder with files of a version, which stay while the context is open.

        Of a published version they are what was published: hashes are compared, those of fetched
        files while they are fetched.

        Args:
            version: of a snapshot.
            names: of files of it. The folder of a local repository has others too.
            stop: ends fetching.

        Raises:
            InputError: a file is not there any more, has changed, cannot be fetched, or is not what
                was published; or no trusted key has signed the version.
            Error: `stop` was set.
        """
        manifest = self.manifest(version)
        wanted = tuple(file for file in version.files if file.name in names)
        hashes = expected_of(manifest, tuple(file.name for file in wanted)) if manifest else None
        with self._folder(_place(version), wanted, hashes, stop or Stop()) as folder:
            yield folder

    def manifest(self, version: VersionEntry) -> Manifest | None:
        """What a version was published as; None if it was not. Its files are not read.

        Raises:
            InputError: no trusted key has signed it, or it is not that of this version.
            PassingError: it cannot be read now, or is still being published.
        """
        files = {file.name: file for file in version.files}
        if MANIFEST not in files:
            if self._trust is not None:
                raise not_trusted(version, NOT_PUBLISHED)
            if self._remote is not None and self._remote.has(f"{_place(version)}/{CLAIM}"):
                what = f"{version.title} is still being published"
                raise PassingError(what, [f"it has no {MANIFEST} yet"], "wait until it is whole")
            return None
        content = self._small(version, files[MANIFEST], MOST_MANIFEST_BYTES)
        if self._trust is not None:
            file = files.get(SIGNATURE)
            signature = self._small(version, file, SIGNATURE_BYTES) if file else b""
            if not self._trust(content, signature):
                raise not_trusted(version, NOT_SIGNED)
        return read_manifest(content, version)

    @contextmanager
    def beside(self, model: ModelEntry, name: str, stop: Stop | None = None) -> Iterator[Path]:
        """A file beside a model's config.yaml, for example the data of its warm-up.

        Args:
            model: of a snapshot.
            name: of the file; no path.
            stop: ends fetching.

        Raises:
            InputError: there is no such file, it has changed, or cannot be fetched.
            Error: `stop` was set.
        """
        wanted = tuple(file for file in model.files if file.name == name)
        if not wanted:
            found = ", ".join(file.name for file in model.files) or "none"
            raise InputError(
                f"model {model.name!r} has no file {name!r}",
                [f"files beside {CONFIG}: {found}"],
                f"put it beside {CONFIG}, and name it without a path",
            )
        with self._folder(model.name, wanted, None, stop or Stop()) as folder:
            yield folder / name

    def has_changed(self, version: VersionEntry) -> bool:
        """Whether a version is not, or not any more, as its entry says: its files still come."""
        try:
            folder = self._listing().folders.get(version.model)
        except InputError:
            return True
        if not isinstance(folder, Folder):
            return True
        versions, _ = sort_versions(version.model, folder, self.limits)
        now = versions.get(version.number)
        return now is None or now.fingerprint != version.fingerprint

    def _listing(self) -> Folder:
        return self._remote.list_all() if self._remote else list_folder(self._root)

    def _model(self, name: str, folder: Folder) -> ModelEntry:
        """A model's entry, its configuration read where it is not the one that was read before."""
        files, wrong = sort_files(folder, self.limits)
        versions, problems = sort_versions(name, folder, self.limits)
        config, problem = self._config(name, folder)
        tag = fingerprint(files, (*wrong, problem))
        return ModelEntry(name, config, problem, versions, (*problems, *wrong), files, tag)

    def _config(self, name: str, folder: Folder) -> Config:
        """The configuration of a model, or why it cannot be used."""
        file = folder.files.get(CONFIG)
        where = f"{self.shown}/{name}/{CONFIG}"
        if file is None:
            return ModelConfig(), ""
        if isinstance(file, str):
            return None, f"{where} cannot be used: {file}"
        with self._lock:
            before = self._configs.get(name)
        if before is not None and before[0] == file:
            return before[1]
        try:
            text = self._text(f"{name}/{CONFIG}", file, MOST_CONFIG_BYTES)
        except InputError as e:  # of the network, perhaps: not kept, so the next time may mend it
            return None, str(e)
        try:
            found: Config = read_config(text, where), ""
        except InputError as e:
            found = None, str(e)
        with self._lock:
            self._configs[name] = (file, found)
        return found

    def _small(self, version: VersionEntry, file: File, most_bytes: int) -> bytes:
        return self._text(f"{_place(version)}/{file.name}", file, most_bytes)

    def _text(self, place: str, file: File, most_bytes: int) -> bytes:
        """A small file's content; of a larger one more than its limit allows.

        Raises:
            InputError: it cannot be read.
        """
        if file.size_bytes > most_bytes:
            return b" " * (most_bytes + 1)
        if self._remote:
            return b"".join(self._remote.parts(place, file.size_bytes))
        try:
            with (self._root / place).open("rb") as content:
                return content.read(most_bytes + 1)
        except OSError as e:
            fix = "make it readable for this user"
            raise InputError(f"{self._root / place} cannot be read", [str(e)], fix) from e

    @contextmanager
    def _folder(
        self, place: str, wanted: tuple[File, ...], hashes: Hashes, stop: Stop
    ) -> Iterator[Path]:
        """The folder where files are, as their hashes say: in place, or fetched."""
        if self._cache is None or (self._remote is None and hashes is None):
            _require_same(self._root / place, wanted)
            _require_content(self._root / place, hashes or {}, stop)
            yield self._root / place
            return
        content = json.dumps(hashes, sort_keys=True)
        text = "\n".join((self.shown, place, fingerprint(wanted), content))
        read = self._remote.parts if self._remote else partial(parts, self._root)
        fetch = partial(_fetch, read, place, wanted, hashes, stop)
        key = hashlib.sha256(text.encode()).hexdigest()
        with self._cache.entry(key, partial(_is_whole, stop=stop), fetch, stop) as folder:
            yield folder


def _place(version: VersionEntry) -> str:
    return f"{version.model}/{version.number}"


def _require_same(folder: Path, wanted: tuple[File, ...]) -> None:
    """Refuses local files that are not of the size that they were listed with.

    Raises:
        InputError: names them.
    """
    problems = []
    for file in wanted:
        try:
            size = (folder / file.name).stat().st_size
        except OSError as e:
            problems.append(f"{file.name}: {e.strerror}")
            continue
        if size != file.size_bytes:
            problems.append(f"{file.name}: expected {file.size_bytes} bytes, got {size}")
    if problems:
        fix = "wait until all files are there"
        raise InputError(f"{folder} has changed since it was listed", problems, fix)


def _require_content(folder: Path, hashes: Mapping[str, str], stop: Stop) -> None:
    """Refuses local files that are not what was published.

    Raises:
        InputError: names them.
        Error: `stop` was set.
    """
    try:
        wrong = [name for name in hashes if sha256_of(folder / name, stop) != hashes[name]]
    except OSError as e:
        fix = "make them readable for this user"
        raise InputError(f"files of {folder} cannot be read", [str(e)], fix) from e
    if wrong:
        raise _altered(wrong)


def _altered(names: list[str]) -> InputError:
    reasons = [f"{name}: its content is not what was published" for name in names]
    fix = "copy it again from where it is whole, or serve another version"
    return InputError("a published version was altered", reasons, fix)


def _fetch(
    read: Parts,
    place: str,
    wanted: tuple[File, ...],
    expected: Hashes,
    stop: Stop,
    folder: Path,
    _: int,
) -> None:
    """Writes files and what they are into an empty folder.

    Raises:
        InputError: one cannot be read, or is not what was published.
        Error: `stop` was set.
    """
    hashes = {}
    for file in wanted:
        digest = hashlib.sha256()
        with (folder / file.name).open("xb") as content:
            for part in read(f"{place}/{file.name}", file.size_bytes):
                check_wanted(stop, f"fetching {place}")
                digest.update(part)
                content.write(part)
        hashes[file.name] = digest.hexdigest()
    if wrong := [name for name in hashes if expected and hashes[name] != expected[name]]:
        raise _altered(wrong)
    (folder / _HASHES).write_text(json.dumps(hashes))


def _is_whole(folder: Path, stop: Stop) -> bool:
    """Whether every fetched file is what it was when it was fetched."""
    try:
        hashes = dict(json.loads((folder / _HASHES).read_bytes()))
        return all(sha256_of(folder / name, stop) == value for name, value in hashes.items())
    except (OSError, ValueError, TypeError):
        return False


def sha256_of(path: Path, stop: Stop) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        OSError: it cannot be read.
        Error: `stop` was set.
    """
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while part := content.read(_PART_BYTES):
            check_wanted(stop, f"reading {path}")
            digest.update(part)
    return digest.hexdigest()
