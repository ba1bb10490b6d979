"""A repository of each kind to publish to, files to publish, and what a server makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.sample_engines import sample_engine
from tests.serve.repository.sites import Site, foreign_target
from twofour.core.target import host_target
from twofour.engine import Engine
from twofour.registry.keys import new_key
from twofour.registry.publish import Published, PublishOptions, publish
from twofour.serve.repository.config import Build
from twofour.serve.repository.layout import Snapshot, VersionEntry
from twofour.serve.repository.manifest import Trust
from twofour.serve.repository.opening import Opened, open_engine
from twofour.serve.repository.rebuild import Builds
from twofour.serve.repository.store import Store


@dataclass(frozen=True)
class Shelf:
    """A repository, and folders of a publisher and of a server.

    Attributes:
        site: the repository.
        folder: of everything else.
    """

    site: Site
    folder: Path

    @property
    def key(self) -> Path:
        """A private key, made once; the public one is beside it."""
        path = self.folder / "key.pem"
        if not path.exists():
            new_key(path)
        return path

    @property
    def public(self) -> Path:
        self.key.exists()
        return self.folder / "key.pub"

    def files(self, seed: int = 0) -> dict[str, Path]:
        """An engine for this machine, one for another, and a file; other seeds, other contents."""
        folder = self.folder / f"files-{seed}"
        if not folder.exists():
            folder.mkdir()
            engine(seed).save(folder / "here.engine")
            foreign = engine(seed)
            plan = replace(foreign.plan, target=foreign_target())
            replace(foreign, plan=plan).save(folder / "there.engine")
            (folder / "labels.txt").write_text(f"cat\ndog {seed}\n")
        return {path.name: path for path in sorted(folder.iterdir())}

    def publish(self, seed: int = 0, **options: Any) -> Published:
        chosen = PublishOptions(storage=self.site.options, **options)
        return publish(self.site.location, "net", self.files(seed), chosen)

    def store(self, trust: Trust | None = None, cache: str = "cache") -> Store:
        """A server's view; another cache, another server."""
        return Store(self.site.location, self.folder / cache, self.site.options, trust=trust)

    def snapshot(self) -> Snapshot:
        return self.store().snapshot()

    def version(self, number: int) -> VersionEntry:
        return self.snapshot().models["net"].versions[number]

    def opened(self, number: int, trust: Trust | None = None, cache: str = "cache") -> Opened:
        """What a server that loads a version gets."""
        builds = Builds(self.folder / cache)
        entry = self.version(number)
        return open_engine(self.store(trust, cache), entry, Build(enabled=False), builds)

    def overwrite(self, place: str, content: bytes) -> None:
        """What a registry never does; published files are read-only, so another takes its place."""
        path = f"{self.site.root}/net/{place}"
        if self.site.system.exists(path):
            self.site.system.rm_file(path)
        self.site.system.pipe_file(path, content)

    def contents(self) -> Mapping[str, bytes]:
        """All files below the model, hidden ones too: place -> content."""
        root = f"{self.site.root}/net"
        found = self.site.system.find(root)
        return {path.split(f"{root}/", 1)[1]: self.site.system.cat_file(path) for path in found}


def engine(seed: int) -> Engine:
    """Of no code that could be run, for this machine."""
    made = sample_engine(host_target())
    plan = replace(made.plan, notes=(f"seed {seed}",))
    return replace(made, plan=plan)
