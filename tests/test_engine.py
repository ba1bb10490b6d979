"""The engine file: what is loaded equals what was saved, and damage of any kind is refused."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sample_engines import sample_engine
from twofour.core.errors import EngineError, InputError
from twofour.core.sizes import Symbol, symbol_size
from twofour.core.target import ISAS, Target
from twofour.engine import Candidate, Engine, Fill, Layer, Plan, Profile, Step, TensorInfo


def parts(engine: Engine) -> tuple[Plan, bytes, dict[str, bytes], dict[str, bytes]]:
    """An engine as something that can be compared."""
    code = {name: data.tobytes() for name, data in engine.code.items()}
    subgraphs = {name: data.tobytes() for name, data in engine.subgraphs.items()}
    return engine.plan, engine.weights.tobytes(), code, subgraphs


text = st.text(st.characters(codec="utf-8"), max_size=12)
names = st.text("abcxyz./_0", min_size=1, max_size=8)
times = st.none() | st.floats(0, 1e9)
blobs = st.binary(max_size=40).map(lambda data: np.frombuffer(data, np.uint8))
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
infos = st.builds(TensorInfo, names, st.sampled_from(["float32", "int8", "uint8"]), shapes)
candidates = st.builds(Candidate, text, text, times, text)
layers = st.builds(
    Layer,
    name=text,
    op=text,
    tactic=text,
    config=text,
    time_us=times,
    macs=st.integers(0, 2**60),
    candidates=st.lists(candidates, max_size=3).map(tuple),
    notes=st.lists(text, max_size=2).map(tuple),
)


@st.composite
def engines(draw: st.DrawFn) -> Engine:
    """Consistent engines with any contents."""
    code = draw(st.dictionaries(names, blobs, max_size=3))
    subgraphs = draw(st.dictionaries(names, blobs, max_size=3))
    inputs, outputs = (tuple(draw(st.lists(infos, max_size=3))) for _ in range(2))
    listed = tuple(draw(st.lists(layers, max_size=3)))
    tensors = tuple(t.name for t in (*inputs, *outputs))
    steps = [Step("onnxruntime", name, tensors, tensors, ()) for name in subgraphs]
    steps += [Step("native", name, (), tensors, tuple(range(len(listed)))) for name in code]
    arena = draw(st.integers(80, 4096))
    least, usual, most = sorted(draw(st.lists(st.integers(1, 99), min_size=3, max_size=3)))
    symbols = (Symbol(draw(text), least, usual, most),) if draw(st.booleans()) else ()
    if symbols:
        size = symbol_size(symbols, 0)
        inputs = (TensorInfo.of("open", "float32", (size, 3)), *inputs)
        outputs = (TensorInfo.of("far", "float32", (3, size * size * 2 + size + 1)), *outputs)
    profile = Profile(
        inputs=inputs,
        outputs=outputs,
        boundary=(),
        steps=tuple(steps),
        arena_bytes=arena,
        fills=(Fill(draw(st.integers(8, arena - 64)), 56, draw(st.integers(0, 255))),),
        symbols=symbols,
    )
    plan = Plan(
        target=Target(draw(st.sampled_from(ISAS)), draw(text), draw(text)),
        version=draw(text),
        source_sha256=draw(text),
        profiles=(profile,),
        layers=listed,
        threads=draw(st.integers(1, 64)),
        code=tuple(code),
        graph=draw(st.dictionaries(text, st.integers(), max_size=2)),
    )
    return Engine(plan, draw(blobs), code, subgraphs)


@given(engine=engines())
@settings(max_examples=60, deadline=None)
def test_what_is_loaded_is_what_was_saved(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("e") / "e.engine"
    assert engine.save(path) == path
    assert parts(Engine.load(path)) == parts(engine)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return sample_engine().save(tmp_path_factory.mktemp("e") / "e.engine").read_bytes()


def load_bytes(data: bytes, folder: Path) -> Engine:
    path = folder / "e.engine"
    path.write_bytes(data)
    return Engine.load(path)


def test_a_file_cut_anywhere_is_refused(saved: bytes, tmp_path: Path) -> None:
    lengths = {*range(20), *range(0, len(saved), 97), *range(len(saved) - 20, len(saved))}
    for length in sorted(lengths):
        with pytest.raises(EngineError, match=r"e\.engine"):
            load_bytes(saved[:length], tmp_path)


def test_a_file_with_more_at_its_end_is_refused(saved: bytes, tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        load_bytes(saved + b"\0", tmp_path)


@pytest.mark.parametrize("bit", [0, 1, 5, 7])
def test_a_bit_flipped_anywhere_is_refused(bit: int, saved: bytes, tmp_path: Path) -> None:
    header = 8 + int.from_bytes(saved[:8], "little")
    offsets = {*range(0, header, 41), *range(8), *range(header - 12, len(saved), 13)}
    for offset in sorted(offsets):
        altered = bytearray(saved)
        altered[offset] ^= 1 << bit
        with pytest.raises(EngineError):
            load_bytes(bytes(altered), tmp_path)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_altered_bytes_never_change_what_is_loaded(
    data: st.DataObject, saved: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    altered = bytearray(saved)
    for _ in range(data.draw(st.integers(1, 4))):
        altered[data.draw(st.integers(0, len(saved) - 1))] = data.draw(st.integers(0, 255))
    try:
        engine = load_bytes(bytes(altered), tmp_path_factory.mktemp("e"))
    except EngineError:
        return
    assert parts(engine) == parts(sample_engine())


def test_messages_name_the_file_and_a_fix(saved: bytes, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as refused:
        load_bytes(saved[:100], tmp_path)
    assert "e.engine is not a readable engine" in refused.value.what
    assert refused.value.fix
    assert refused.value.exit_code == 2


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no engine at .*none\.engine"):
        Engine.load(tmp_path / "none.engine")
    with pytest.raises(InputError, match="no engine at"):
        Engine.load(tmp_path)


@pytest.mark.parametrize(
    "contents", [b"", b"hello", b"PK\x03\x04", b"\x08\x07\x12\x07pytorch:" * 20, b"{}" * 50]
)
def test_a_file_of_another_kind_is_refused(contents: bytes, tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        load_bytes(contents, tmp_path)


def test_saving_replaces_the_old_file_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "e.engine"
    path.write_bytes(b"old")
    sample_engine().save(path)
    assert Engine.load(path).plan == sample_engine().plan
    assert [file.name for file in tmp_path.iterdir()] == ["e.engine"]


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    path = sample_engine().save(tmp_path / "e.engine")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_saving_where_it_cannot_be_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write .*missing"):
        sample_engine().save(tmp_path / "missing" / "e.engine")
    (tmp_path / "folder.engine").mkdir()
    with pytest.raises(InputError, match="got a folder"):
        sample_engine().save(tmp_path / "folder.engine")
    assert os.listdir(tmp_path) == ["folder.engine"]
    assert os.listdir(tmp_path / "folder.engine") == []


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sample_engine().save(tmp_path / "e.engine")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match="no space left"):
        dataclasses.replace(sample_engine(), weights=np.zeros(9, np.uint8)).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["e.engine"]


def test_size_counts_weights_code_and_subgraphs() -> None:
    assert sample_engine().size_bytes == 2800 + 300 + 200
