"""A repository as the fleet sees it: its files are read, and engines built, in threads.

Reading and hashing happen in threads of low priority, so that requests go on meanwhile. Looks,
loads and builds have threads of their own, so that none waits for a build; of those there is one at
a time, because kernels are timed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import Error, InputError
from twofour.serve.models.fleet import Entry, Loaded
from twofour.serve.repository.cache import Stop
from twofour.serve.repository.config import ModelConfig
from twofour.serve.repository.layout import EMPTY, ModelEntry, Snapshot
from twofour.serve.repository.opening import needs_build, open_engine
from twofour.serve.repository.rebuild import Builds
from twofour.serve.repository.store import Store
from twofour.serve.repository.watch import compare

Array = NDArray[Any]
log = logging.getLogger(__name__)
_LOADERS = 2
_NICE = 10


class Library:
    """A store and the engines that were built of it.

    Attributes:
        store: the repository.
        builds: engines that were built here.
    """

    def __init__(self, store: Store, builds: Builds) -> None:
        """Reads nothing yet."""
        self.store, self.builds = store, builds
        self._stop = Stop()
        self._snapshot: Snapshot = EMPTY
        self._look_threads = ThreadPoolExecutor(1, "look", initializer=_lower_priority)
        self._load_threads = ThreadPoolExecutor(_LOADERS, "load", initializer=_lower_priority)
        self._build_threads = ThreadPoolExecutor(1, "build", initializer=_lower_priority)

    async def entries(self) -> Mapping[str, Entry]:
        """All models as they lie there now.

        Raises:
            InputError: the repository cannot be read.
        """
        loop = asyncio.get_running_loop()
        before = self._snapshot
        self._snapshot = await loop.run_in_executor(self._look_threads, self.store.snapshot)
        for change in compare(before, self._snapshot):
            log.info("repository: %s", change)
        for name, reason in self._snapshot.refused.items():
            if before.refused.get(name) != reason:
                log.warning("%s: no model: %s", name, reason)
        return {
            name: Entry(
                model.config or ModelConfig(),
                {number: each.fingerprint for number, each in model.versions.items()},
                model.problem or ("; ".join(model.problems) if not model.versions else ""),
            )
            for name, model in self._snapshot.models.items()
        }

    async def load(self, name: str, number: int, config: ModelConfig) -> Loaded:
        """The engine of a version that runs here, built if need be, and inputs to warm it up.

        Args:
            name: of a model of the last `entries`.
            number: of a version of it.
            config: of the model.

        Raises:
            Error: no engine can be had, or the inputs cannot be read; with every reason.
        """
        loop = asyncio.get_running_loop()
        model = self._snapshot.models.get(name)
        if model is None or number not in model.versions:
            what = f"version {number} of model {name!r} is not in the repository any more"
            raise InputError(what, [], "load it when it is there again")
        try:
            needed = await loop.run_in_executor(
                self._load_threads, self._needs_build, model, number, config
            )
            threads = self._build_threads if needed else self._load_threads
            return await loop.run_in_executor(threads, self._load, model, number, config)
        except Error as e:
            raise self._for_clients(e) from e

    def close(self) -> None:
        """Ends what is being fetched or built."""
        self._stop.set()
        for threads in (self._look_threads, self._load_threads, self._build_threads):
            threads.shutdown(wait=True, cancel_futures=True)

    def _needs_build(self, model: ModelEntry, number: int, config: ModelConfig) -> bool:
        version = model.versions[number]
        return needs_build(self.store, version, config.build, self.builds, self._stop)

    def _load(self, model: ModelEntry, number: int, config: ModelConfig) -> Loaded:
        name = model.name

        def tell(reason: str) -> None:
            log.info("model %s, version %d: an engine is built here: %s", name, number, reason)

        version = model.versions[number]
        opened = open_engine(self.store, version, config.build, self.builds, self._stop, tell)
        for reason in opened.passed_over:
            log.info("model %s, version %d: passed over %s", name, number, reason)
        if not config.warm_up.data:
            return Loaded(opened.engine)
        with self.store.beside(model, config.warm_up.data, self._stop) as path:
            return Loaded(opened.engine, _arrays(path))

    def _for_clients(self, error: Error) -> Error:
        """The same without this machine's folders: the index and the status page show it."""

        def told(text: str) -> str:
            return text.replace(f"{self.store.shown}/", "")

        return type(error)(
            told(error.what), [told(each) for each in error.reasons], told(error.fix)
        )


def _arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file.

    Raises:
        InputError: it is none, or holds objects.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: np.ascontiguousarray(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as e:
        expected = "expected an .npz file with an array for each input"
        raise InputError(
            f"cannot read {path.name} for warm-up", [expected, str(e)], "write it with numpy.savez"
        ) from e


def _lower_priority() -> None:
    """Of the calling thread alone, as Linux has it."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
