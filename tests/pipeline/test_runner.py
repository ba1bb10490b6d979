"""Stages are run once, reused by hash, and whoever is ended, whenever, leaves nothing half done."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.chain import KINDS, chain, statuses
from twofour.core.errors import GateError, InputError, UnsupportedError
from twofour.pipeline import folder as folders
from twofour.pipeline.folder import RECORD, RunFolder
from twofour.pipeline.identity import identity
from twofour.pipeline.runner import Ran, Runner
from twofour.pipeline.stage import Made, Stage, Task

ROOT = Path(__file__).parents[2]


class Place:
    """A run folder, a source, and what its stages told."""

    def __init__(self, path: Path) -> None:
        self.source = path / "source.txt"
        self.source.write_text("source\n")
        self.folder = RunFolder(path / "run")
        self.told: list[str] = []
        self.seen: list[dict[str, str]] = []
        self.last: Sequence[Ran] = ()

    def run(
        self, again: str = "", setting: str = "", stages: list[Stage] | None = None
    ) -> list[Ran]:
        self.told.clear()
        stages = stages or chain(self.source, self.told.append, setting=setting)
        with self.folder.held("a test"):
            runner = Runner(self.folder, self.source.parent, again, changed=self.changed)
            return runner.run(stages)

    def changed(self, ran: Any) -> None:
        self.seen.append(statuses(ran))
        self.last = ran

    def content(self) -> dict[str, bytes]:
        """All files of stages, without the times they took."""
        found = {}
        for path in sorted(self.folder.stages.rglob("*")):
            if path.is_file() and path.name != RECORD:
                found[str(path.relative_to(self.folder.stages))] = path.read_bytes()
        return found

    def record(self, kind: str) -> Path:
        (found,) = self.folder.stages.glob(f"{kind}-*/{RECORD}")
        return found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_second_run_reuses_everything(place: Place) -> None:
    first = place.run()
    assert set(statuses(first).values()) == {"done"}
    assert place.told == list(KINDS)
    before = place.content()
    second = place.run()
    assert set(statuses(second).values()) == {"reused"}
    assert place.told == []
    assert place.content() == before
    assert [each.text for each in second] == [f"{kind} is done" for kind in KINDS]
    assert second[-1].result == first[-1].result


def test_one_setting_reruns_the_stages_that_depend_on_it(place: Place) -> None:
    place.run()
    assert list(statuses(place.run(setting="other")).values()) == ["reused"] * 2 + ["done"] * 4
    assert place.told == list(KINDS[2:])
    place.run()  # what was made with the first setting is still there
    assert place.told == []


def test_another_source_reruns_all_and_an_equal_one_none(place: Place) -> None:
    place.run()
    place.source.write_text("another\n")
    place.run()
    assert place.told == list(KINDS)
    place.source.write_text("source\n")
    os.utime(place.source, (1, 1))
    place.run()
    assert place.told == []


def test_from_runs_a_stage_and_all_behind_it(place: Place) -> None:
    place.run()
    before = place.content()
    assert list(statuses(place.run(again="build")).values()) == ["reused"] * 3 + ["done"] * 3
    assert place.told == list(KINDS[3:])
    assert place.content() == before


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "record", "other record"])
def test_what_was_damaged_is_made_again(place: Place, damage: str) -> None:
    place.run()
    before = place.content()
    record = place.record("quantize")
    model = record.parent / "model.txt"
    if damage == "changed":
        model.write_text("x" * model.stat().st_size)
    elif damage == "cut":
        model.write_text("")
    elif damage == "gone":
        model.unlink()
    elif damage == "record":
        record.write_text("{")
    else:
        plain = json.loads(record.read_text())
        plain["outputs"]["model"]["file"] = "../../../source.txt"
        record.write_text(json.dumps(plain))
    place.run()
    assert place.told[0] == "quantize"
    assert len(place.told) == 1  # it writes the same, so what reads it is reused
    assert place.content() == before


def test_the_result_is_told_after_each_stage(place: Place) -> None:
    place.run()
    assert len(place.seen) == len(KINDS)
    assert place.seen[1] == {
        kind: "done" if n < 2 else "not reached" for n, kind in enumerate(KINDS)
    }


def failing(place: Place, error: BaseException, at: int = 3) -> list[Stage]:
    """The chain, one stage of which writes something and fails."""

    def work(task: Task) -> Made:
        (task.folder / "half").write_text("half")
        raise error

    stages = chain(place.source, place.told.append)
    broken = stages[at]
    stages[at] = Stage(broken.name, broken.kind, broken.settings, broken.inputs, work)
    return stages


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (InputError("no such layer", ["got x"], "y"), "no such layer"),
        (GateError("it broke"), "it broke"),
        (KeyboardInterrupt(), "interrupted"),
        (ZeroDivisionError("bug"), "ZeroDivisionError: bug"),
    ],
)
def test_a_failing_stage_leaves_those_before_it(
    place: Place, error: BaseException, text: str
) -> None:
    with pytest.raises(type(error)):
        place.run(stages=failing(place, error))
    assert list(place.seen[-1].values()) == ["done"] * 3 + ["failed"] + ["not reached"] * 2
    assert not list(place.folder.stages.glob(".*"))
    assert not list(place.folder.stages.glob("build*"))
    assert place.last[3].text == text
    place.run()
    assert place.told == list(KINDS[3:])


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_within_a_stage_is_one_clear_message(place: Place) -> None:
    with pytest.raises(UnsupportedError, match="no space left for build it") as caught:
        place.run(stages=failing(place, FULL))
    assert "free some space" in caught.value.fix
    place.run()
    assert len(place.told) == 3


def test_a_full_disk_behind_an_error_of_ours_is_found(place: Place) -> None:
    error = InputError("cannot write x.engine", [f"I/O error: {os.strerror(errno.ENOSPC)} (28)"])
    with pytest.raises(UnsupportedError, match="no space left for build it"):
        place.run(stages=failing(place, error))


@pytest.mark.parametrize("number", range(12))
def test_a_full_disk_at_any_file_leaves_a_folder_that_goes_on(
    place: Place, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each record and each result that is written whole finds no space, one in turn."""
    whole, count = folders.write_whole, iter(range(100))

    def full(path: Path, content: bytes) -> None:
        if next(count) == number % 6:
            if number >= 6:  # half of it is there
                Path(path).write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(path, content)

    monkeypatch.setattr(folders, "write_whole", full)
    with pytest.raises(UnsupportedError, match="no space left"):
        place.run()
    monkeypatch.setattr(folders, "write_whole", whole)
    place.run()
    assert [word.split()[0] for word in place.told] == list(KINDS[number % 6 :])
    assert not list(place.folder.stages.glob(".*"))


def test_a_folder_is_for_one_run_at_a_time(place: Place) -> None:
    with place.folder.held("the first"), pytest.raises(InputError, match="is in use") as caught:
        place.run()
    assert f"process {os.getpid()}: the first" in str(caught.value)
    place.run()


def test_a_folder_of_somebody_else_is_refused(place: Place, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("")
    for path in (home, place.source):
        with pytest.raises(InputError, match="no folder"):
            RunFolder(path).require_ours()
    assert [each.name for each in home.iterdir()] == ["thesis.tex"]


def test_a_forecast_says_what_would_run_and_writes_nothing(place: Place) -> None:
    def forecast(again: str = "", setting: str = "") -> list[bool]:
        stages = chain(place.source, place.told.append, setting=setting)
        return [each.reused for each in Runner(place.folder, Path(), again).forecast(stages)]

    assert forecast() == [False] * 6
    assert not place.folder.path.exists()
    place.run()
    before = sorted(place.folder.path.rglob("*"))
    assert forecast() == [True] * 6
    assert forecast("quantize") == [True] * 2 + [False] * 4
    assert forecast(setting="other") == [True] * 2 + [False] * 4
    assert sorted(place.folder.path.rglob("*")) == before
    stages = chain(place.source, place.told.append)
    (first, *_) = Runner(place.folder, Path()).forecast(stages)
    assert first.seconds is not None


def processes(place: Place, seconds: float) -> subprocess.Popen[bytes]:
    arguments = [place.folder.path, place.source, place.source.parent / "log", str(seconds)]
    command = [sys.executable, "-m", "tests.pipeline.chain", *map(str, arguments)]
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **path})


def finished(place: Place) -> set[str]:
    if not place.folder.stages.is_dir():
        return set()
    return {p.name for p in place.folder.stages.iterdir() if not p.name.startswith(".")}


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_it_goes_on(place: Place, tmp_path: Path, seed: int) -> None:
    other = tmp_path / "whole"
    other.mkdir()
    whole = Place(other)
    whole.run()
    draw = random.Random(seed)
    log = place.source.parent / "log"
    for _ in range(8):
        before = finished(place)
        process = processes(place, 0.2)
        deadline = time.monotonic() + 60
        while not place.folder.stages.is_dir() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert before <= finished(place)
        for name in finished(place):
            assert place.folder.find(name) is not None
    assert processes(place, 0).wait() == 0
    assert place.content() == whole.content()
    assert not list(place.folder.stages.glob(".*"))
    assert not list((place.folder.path / "scratch").iterdir())
    done = [word.split()[0] for word in log.read_text().split("\n") if word]
    assert set(done) == set(KINDS)
    # A stage may have worked and been killed before its folder was renamed; one that was renamed
    # never worked again.
    assert len(done) <= len(KINDS) + 8


def test_scratch_of_a_finished_stage_goes_and_that_of_another_try_stays(place: Place) -> None:
    place.run()
    old, new = (place.record(kind) for kind in ("sparsify", "quantize"))
    for record, later in ((old, -1), (new, 1)):
        scratch = place.folder.scratch(record.parent.name)
        scratch.mkdir()
        (scratch / "checkpoint").write_text("half")
        when = record.stat().st_mtime + later
        for path in (scratch / "checkpoint", scratch):
            os.utime(path, (when, when))
    with place.folder.held("a test"):
        assert not place.folder.scratch(old.parent.name).exists()
        assert (place.folder.scratch(new.parent.name) / "checkpoint").exists()


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    (tmp_path / "judge_of_test.py").write_text("import parts_of_test.more as more\n")
    (tmp_path / "parts_of_test").mkdir()
    (tmp_path / "parts_of_test" / "__init__.py").write_text("")
    (tmp_path / "parts_of_test" / "more.py").write_text("from parts_of_test import least\n")
    (tmp_path / "parts_of_test" / "least.py").write_text("x = 1\n")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["judge_of_test.py", "parts_of_test/more.py", "parts_of_test/least.py"]
)
def test_a_function_is_its_module_and_those_beside_it(modules: Path, name: str) -> None:
    before = identity("judge_of_test:f", modules)
    assert identity("judge_of_test:g", modules) == before
    (modules / "unrelated.py").write_text("")
    assert identity("judge_of_test:f", modules) == before
    (modules / name).write_text((modules / name).read_text() + "y = 2\n")
    assert identity("judge_of_test:f", modules) != before
    assert "judge_of_test" not in sys.modules


def test_a_folder_of_data_is_its_names_and_bytes(tmp_path: Path) -> None:
    for name in ("x.npy", "labels.npy"):
        (tmp_path / name).write_bytes(b"1")
    before = identity(str(tmp_path), tmp_path)
    (tmp_path / "x.npy").rename(tmp_path / "y.npy")
    assert identity(str(tmp_path), tmp_path) != before
    with pytest.raises(InputError, match="cannot read"):
        identity(str(tmp_path / "none.npz"), tmp_path)
    with pytest.raises(InputError, match="no module"):
        identity("no_such_module_here:f", tmp_path)
