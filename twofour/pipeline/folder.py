"""The folder of a run: what lies where, one run at a time, and nothing in it half written.

    RUN/recipe.yaml  run.json  report.html  gate.xml  gate.md
    RUN/stages/NAME-KEY12/          files of a stage, and stage.json with their hashes
    RUN/cache/                      measured times, what calibration saw: shared by all stages
    RUN/scratch/NAME-KEY12/         of a stage that was ended early: it may go on from there

A stage writes into `stages/.part-*`, which is renamed as a whole when it has ended. So whoever is
killed, whenever, leaves either the whole folder or none that counts; what is left of it is removed
by the next run.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from twofour.core.errors import InputError
from twofour.core.records import from_plain
from twofour.core.writing import write_whole
from twofour.pipeline.identity import sha256_of
from twofour.pipeline.stage import Given, Kept, Result

SCHEMA = "twofour.stage/1"
RECORD = "stage.json"
RECIPE, RUN, REPORT, GATE_XML, GATE_MD = (
    "recipe.yaml",
    "run.json",
    "report.html",
    "gate.xml",
    "gate.md",
)
_PART, _OLD = ".part-", ".old-"
_LOCK = ".lock"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    Attributes:
        path: of it.
    """

    path: Path

    @property
    def stages(self) -> Path:
        """Where stages lie."""
        return self.path / "stages"

    @property
    def cache(self) -> Path:
        """What stages share."""
        return self.path / "cache"

    def scratch(self, name: str) -> Path:
        """What a stage may go on from."""
        return self.path / "scratch" / name

    @contextmanager
    def held(self, command: str) -> Iterator[None]:
        """Makes the folder, and keeps other runs out of it; cleans up after one that was killed.

        Args:
            command: that holds it, for the message that others get.

        Raises:
            InputError: it cannot be made, belongs to something else, or another run holds it.
        """
        self.require_ours()
        try:
            for part in (self.stages, self.cache, self.path / "scratch"):
                part.mkdir(parents=True, exist_ok=True)
            lock = (self.path / _LOCK).open("a+")
        except OSError as e:
            fix = "name another folder: --run DIR"
            raise InputError(f"cannot use the run folder {self.path}", [str(e)], fix) from e
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                raise InputError(
                    f"the run folder {self.path} is in use",
                    [f"expected nobody else in it, got {holder}"],
                    "wait until it has ended, or name another folder: --run DIR",
                ) from e
            lock.truncate(0)
            lock.write(f"process {os.getpid()}: {command}\n")
            lock.flush()
            self._clean()
            yield

    def require_ours(self) -> None:
        """Refuses a folder with somebody else's files. Raises InputError."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            fix = "name another folder: --run DIR"
            raise InputError(f"{self.path} is no folder", ["expected a folder for the run"], fix)
        names = sorted(os.listdir(self.path))
        if names and not {"stages", RECIPE, _LOCK}.intersection(names):
            raise InputError(
                f"{self.path} is no folder of a run",
                [f"expected an empty or a run's folder, got {', '.join(names[:5])}"],
                "name another folder: --run DIR",
            )

    def find(self, name: str) -> Result | None:
        """The result in a stage's folder; None where there is none, or a file is not what it was.

        Args:
            name: of the folder.
        """
        result = self._read(self.stages / name)
        if result is None:
            return None
        for kept in result.outputs.values():
            path = self.stages / name / kept.file
            try:
                same = path.stat().st_size == kept.size_bytes and sha256_of(path) == kept.sha256
            except OSError:
                same = False
            if not same:
                return None
        return result

    def last_seconds(self, stage: str) -> float | None:
        """How long a stage of this name took, the last time that it ran; None if it never did."""
        found: list[tuple[float, float]] = []
        for folder in self._folders():
            result = self._read(folder)
            if result is not None and result.name == stage:
                found.append(((folder / RECORD).stat().st_mtime, result.seconds))
        return max(found)[1] if found else None

    def begin(self) -> Path:
        """An empty folder to write into."""
        return Path(tempfile.mkdtemp(prefix=_PART, dir=self.stages))

    def commit(self, part: Path, name: str, result: Result) -> None:
        """Makes what was written the result of a stage; one that is there is replaced.

        Args:
            part: of `begin`.
            name: of the stage's folder.
            result: of it.

        Raises:
            OSError: it cannot be written.
        """
        write_whole(part / RECORD, to_json(result))
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o777 & ~umask)
        final = self.stages / name
        if final.exists():
            old = Path(tempfile.mkdtemp(prefix=_OLD, dir=self.stages)) / name
            final.rename(old)
            part.rename(final)
            shutil.rmtree(old.parent, ignore_errors=True)
        else:
            part.rename(final)
        shutil.rmtree(self.scratch(name), ignore_errors=True)

    def _clean(self) -> None:
        """Removes what a run that was killed has left."""
        for path in self.stages.iterdir():
            if path.name.startswith((_PART, _OLD)):
                shutil.rmtree(path, ignore_errors=True)
        for path in (self.path / "scratch").iterdir():
            # Killed behind the result; what is newer is of a stage that was to be run again.
            record = self.stages / path.name / RECORD
            if record.is_file() and _newest_ns(path) <= record.stat().st_mtime_ns:
                shutil.rmtree(path, ignore_errors=True)

    def _folders(self) -> Iterator[Path]:
        if self.stages.is_dir():
            yield from (p for p in self.stages.iterdir() if not p.name.startswith("."))

    def _read(self, folder: Path) -> Result | None:
        """What stage.json says; None where it says nothing that can be trusted."""
        try:
            plain = json.loads((folder / RECORD).read_bytes())
            return _result(plain)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None


def _newest_ns(folder: Path) -> int:
    """When anything in a folder was last changed."""
    return max(path.lstat().st_mtime_ns for path in (folder, *folder.rglob("*")))


def to_json(result: Result) -> bytes:
    """The content of stage.json."""
    return json.dumps({"schema": SCHEMA, **asdict(result)}, indent=1).encode()


def _result(plain: dict[str, object]) -> Result:
    """The inverse of `to_json`. Raises ValueError, TypeError, KeyError, AttributeError."""
    if plain["schema"] != SCHEMA:
        raise ValueError("another schema")
    inputs, outputs, notes = plain["inputs"], plain["outputs"], plain["notes"]
    facts, settings, seconds = plain["facts"], plain["settings"], plain["seconds"]
    if not (isinstance(inputs, dict) and isinstance(outputs, dict) and isinstance(notes, list)):
        raise TypeError("inputs, outputs or notes")
    if not (isinstance(facts, dict) and isinstance(settings, dict)):
        raise TypeError("facts or settings")
    if not isinstance(seconds, (int, float)):
        raise TypeError("seconds")
    kept = {str(name): from_plain(Kept, each, "output") for name, each in outputs.items()}
    if any(Path(each.file).name != each.file for each in kept.values()):
        raise ValueError("a file outside the folder")
    return Result(
        str(plain["name"]),
        str(plain["key"]),
        settings,
        {str(name): from_plain(Given, each, "input") for name, each in inputs.items()},
        kept,
        float(seconds),
        str(plain["text"]),
        facts,
        tuple(str(note) for note in notes),
        str(plain["version"]),
    )
