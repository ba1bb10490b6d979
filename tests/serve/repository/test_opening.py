"""From a version to an engine: picked, built by a real `twofour build`, or every reason why not."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.sample_models import conv_model
from tests.serve.repository.sites import KINDS, Site, engine_bytes, foreign_target, site
from twofour.core.errors import EngineError, Error
from twofour.core.gpus import Gpu
from twofour.core.target import host_target
from twofour.core.version import __version__
from twofour.runtime.session import Session
from twofour.serve.repository import rebuild
from twofour.serve.repository.cache import Stop
from twofour.serve.repository.config import Build
from twofour.serve.repository.errors import PassingError
from twofour.serve.repository.layout import VersionEntry
from twofour.serve.repository.opening import Opened, needs_build, open_engine
from twofour.serve.repository.rebuild import Builds
from twofour.serve.repository.store import Store

QUICK = Build(arguments=("--tuning-effort", "0", "--no-race", "--shapes", "x:2x4x8x8"))
X = np.ones((2, 4, 8, 8), np.float32)


class Server:
    """What a server has of one repository with one model `m`."""

    def __init__(self, place: Site, cache: Path) -> None:
        self.place, self.cache = place, cache
        self.store = Store(place.location, cache, place.options)
        self.builds = Builds(cache)
        self.reasons: list[str] = []

    @property
    def version(self) -> VersionEntry:
        return self.store.snapshot().models["m"].versions[1]

    def needs_build(self, build: Build = QUICK) -> bool:
        return needs_build(self.store, self.version, build, self.builds)

    def open(self, build: Build = QUICK, stop: threading.Event | None = None) -> Opened:
        told = self.reasons.append
        return open_engine(self.store, self.version, build, self.builds, stop, told)


@pytest.fixture(scope="session")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return conv_model(tmp_path_factory.mktemp("onnx") / "x.onnx").read_bytes()


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(site("local", tmp_path, str), tmp_path / "cache")


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was built"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_fits_is_taken(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = site(kind, tmp_path, lambda: request.getfixturevalue("endpoint"))
    place.put("m/1/foreign.engine", engine_bytes(foreign_target()))
    place.put("m/1/here.engine", engine_bytes())
    place.put("m/1/m.onnx", b"never looked at")
    server = Server(place, tmp_path / "cache")
    forbid(monkeypatch)
    assert not server.needs_build()
    opened = server.open()
    assert opened.name == "here.engine"
    assert opened.engine.plan.target == host_target()
    assert "riscv64" in opened.passed_over[0]
    assert server.reasons == []


@pytest.mark.parametrize("kind", KINDS)
def test_one_is_built_where_none_fits_and_kept(
    kind: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    onnx: bytes,
) -> None:
    place = site(kind, tmp_path, lambda: request.getfixturevalue("endpoint"))
    place.put("m/1/foreign.engine", engine_bytes(foreign_target()))
    place.put("m/1/-o.onnx", onnx)
    server = Server(place, tmp_path / "cache")
    assert server.needs_build()
    first = server.open()
    assert first.name == ""
    assert "riscv64" in server.reasons[0]
    with Session(first.engine) as session:
        assert session.run({"x": X})["y"].shape == (2, 10)
    forbid(monkeypatch)
    again = Server(place, tmp_path / "cache")
    assert not again.needs_build()
    assert again.open().engine.plan == first.engine.plan


def test_other_arguments_or_weights_are_another_build(server: Server, onnx: bytes) -> None:
    server.place.put("m/1/m.onnx", onnx)
    server.open()
    assert not server.needs_build()
    assert server.needs_build(QUICK.model_copy(update={"arguments": (*QUICK.arguments, "--bf16")}))
    server.place.put("m/1/weights.bin", b"x")
    assert server.needs_build()


def test_a_build_for_a_gpu_depends_on_it(
    server: Server, onnx: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.onnx").write_bytes(onnx)
    server.place.put("m/1/m.onnx", onnx)

    def keys(*gpus: Gpu) -> tuple[str, str]:
        monkeypatch.setattr(rebuild, "read_gpus", lambda: gpus)
        found = [
            rebuild.job_of(server.version, tmp_path, Build(arguments=arguments), Stop()).key
            for arguments in ((), ("--target", "cuda"))
        ]
        return found[0], found[1]

    one, other = keys(Gpu("H200", 1, "580")), keys(Gpu("H100", 1, "580"))
    assert one[0] == other[0]
    assert one[1] != other[1]


def test_a_damaged_result_is_built_again(server: Server, onnx: bytes) -> None:
    server.place.put("m/1/m.onnx", onnx)
    server.open()
    (path,) = (server.cache / "builds").glob("*/model.engine")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    server.open()
    assert path.read_bytes() != content[:-1] + bytes([content[-1] ^ 1])


def test_every_reason_is_told(server: Server) -> None:
    server.place.put("m/1/damaged.engine", engine_bytes()[:-1])
    server.place.put("m/1/foreign.engine", engine_bytes(foreign_target()))
    os.mkfifo(Path(server.place.location) / "m" / "1" / "pipe.engine")
    for ask in (server.needs_build, server.open):
        with pytest.raises(EngineError) as caught:
            ask()
        text = str(caught.value)
        for reason in ("damaged.engine", "riscv64", "pipe.engine", "no .onnx file"):
            assert reason in text
        assert caught.value.what == "version 1 of model 'm' cannot be used here"


def test_an_empty_version_says_what_is_missing(server: Server) -> None:
    server.place.put("m/1/notes.txt", b"")
    with pytest.raises(EngineError, match=r"no \.engine file; no \.onnx file"):
        server.open()


def test_building_can_be_forbidden(server: Server, onnx: bytes) -> None:
    server.place.put("m/1/m.onnx", onnx)
    with pytest.raises(EngineError, match=r"build\.enabled is false"):
        server.open(Build(enabled=False))


def test_of_several_models_one_has_to_be_meant(server: Server, onnx: bytes) -> None:
    server.place.put("m/1/a.onnx", onnx)
    server.place.put("m/1/b.onnx", onnx)
    with pytest.raises(EngineError, match=r"a\.onnx, b\.onnx"):
        server.open()
    server.place.put("m/1/model.onnx", onnx)
    assert server.needs_build()


def test_a_build_that_fails_shows_what_the_command_said(server: Server, onnx: bytes) -> None:
    server.place.put("m/1/m.onnx", onnx[:-100])
    with pytest.raises(EngineError) as caught:
        server.open()
    assert "ended with code 2" in str(caught.value)
    assert "InputError" in str(caught.value)
    assert [p for p in (server.cache / "builds").iterdir() if p.is_dir()] == []


def test_files_that_still_come_are_not_usable_yet(
    server: Server, onnx: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = engine_bytes()
    server.place.put("m/1/a.engine", sound[:1000])
    entry = server.version
    server.place.put("m/1/a.engine", sound[:2000])
    with pytest.raises(EngineError, match="not usable yet") as caught:
        open_engine(server.store, entry, QUICK, server.builds)
    assert "still changing" in caught.value.fix
    server.place.put("m/1/a.engine", sound)
    assert server.version.fingerprint != entry.fingerprint
    assert server.open().name == "a.engine"


def test_a_full_disk_is_an_error_that_passes(
    server: Server, onnx: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.place.put("m/1/m.onnx", onnx)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", full)
        with pytest.raises(PassingError, match="No space left"):
            server.open()
    assert server.open().name == ""


def test_a_store_that_does_not_answer_is_an_error_that_passes(
    tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = site("s3", tmp_path, lambda: endpoint)
    place.put("m/1/a.engine", engine_bytes())
    server = Server(place, tmp_path / "cache")
    entry = server.version

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(server.store._remote._system, "open", refuse)  # type: ignore[union-attr]
        with pytest.raises(PassingError, match="reset by peer"):
            open_engine(server.store, entry, QUICK, server.builds)
    assert server.open().name == "a.engine"


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def slow(server: Server, onnx: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From now on a build sleeps, with a child that sleeps too."""
    server.place.put("m/1/m.onnx", onnx)
    program = tmp_path / "slow.py"
    program.write_text(
        "import os, subprocess, sys, time\nos.nice(10)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('begun', flush=True)\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(rebuild, "_CHILD", program)


def ended(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, 10)
    return not alive


def test_a_build_is_killed_when_nobody_wants_it(
    server: Server, onnx: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow(server, onnx, monkeypatch, tmp_path)
    stop, before = threading.Event(), set(children())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.open, QUICK, stop)
        while len(set(children()) - before) < 2:
            assert not waiting.done()
            time.sleep(0.05)
        begun = list(set(children()) - before)
        stop.set()
        with pytest.raises(Error, match="given up"):
            waiting.result(20)
    assert ended(begun)


def test_a_build_that_takes_too_long_is_killed(
    server: Server, onnx: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow(server, onnx, monkeypatch, tmp_path)
    before = set(children())
    with pytest.raises(EngineError, match="longer than 1 s") as caught:
        server.open(QUICK.model_copy(update={"timeout_s": 1}))
    assert "begun" in caught.value.reasons
    assert ended(list(set(children()) - before))


def test_servers_that_start_together_build_once(
    server: Server, onnx: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.place.put("m/1/m.onnx", onnx)
    begun, start = [], subprocess.Popen

    def counted(*args: object, **options: object) -> subprocess.Popen[bytes]:
        begun.append(args)
        return start(*args, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(subprocess, "Popen", counted)
    servers = [Server(server.place, server.cache) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        opened = list(pool.map(Server.open, servers))
    assert len(begun) == 1
    assert all(each.engine.plan == opened[0].engine.plan for each in opened)


def test_the_child_ignores_modules_in_its_working_folder(tmp_path: Path) -> None:
    for name in ("typer", "numpy", "runpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\n")
    words = [sys.executable, "-P", str(rebuild._CHILD), "--version"]
    with subprocess.Popen(
        words, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
    ) as child:
        assert child.stdout is not None
        assert child.stdout.read() == f"twofour {__version__}\n".encode()
        assert child.wait(60) == 0


PARENT = """
import os, subprocess, sys, time
environment = os.environ | {"PYTHONPATH": sys.argv[2]}
child = subprocess.Popen(
    [sys.executable, "-P", sys.argv[1]], stdin=subprocess.PIPE, env=environment, process_group=0
)
print(child.pid, flush=True)
time.sleep(60)
"""


def test_the_child_is_nice_and_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "twofour").mkdir()
    (tmp_path / "twofour" / "__init__.py").touch()
    (tmp_path / "twofour" / "__main__.py").write_text("import time; time.sleep(60)\n")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(rebuild._CHILD), str(tmp_path)], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    expected, last = min(19, psutil.Process().nice() + 10), time.monotonic() + 20
    while child.nice() != expected:
        assert time.monotonic() < last
        time.sleep(0.02)
    assert not psutil.wait_procs([child], 0.5)[0], "it ends with its parent, not before"
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert ended([child])
    parent.stdout.close()
