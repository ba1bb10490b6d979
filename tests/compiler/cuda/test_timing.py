"""What candidates are timed with."""

from __future__ import annotations

import numpy as np
import pytest

from tests.compiler.cuda.test_interpreted import IMAGES, LAST, model_of
from twofour.compiler.cuda import assemble, timing
from twofour.compiler.cuda.assemble import Constants
from twofour.compiler.cuda.check import sample_of
from twofour.compiler.cuda.graphs import network_of
from twofour.compiler.cuda.lower import Turn
from twofour.compiler.cuda.timing import _Room, made_up
from twofour.compiler.cuda.types import Types
from twofour.core.cuda_program import WEIGHTS


def turns_of(text: str) -> list[Turn]:
    """Of a whole network."""
    (part,) = network_of(model_of(text), {}, Types("float16"), forced=False, dump=None).parts
    assert part.gpu is not None
    return list(part.gpu.turns)


def test_a_residual_that_is_what_the_convolution_reads_holds_the_same() -> None:
    found = [t for t in (*turns_of(IMAGES), *turns_of(LAST)) if "r" in t.operands]
    assert len(found) == 2
    for turn in found:
        x, r = turn.operands["x"], turn.operands["r"]
        assert (x.buffer, x.offset) == (r.buffer, r.offset)
        inputs = made_up(turn)
        np.testing.assert_array_equal(inputs["x"], inputs["r"])
        assert inputs["x"].any()
        assert sample_of(turn, inputs) is not None


def test_each_operand_has_the_bytes_it_spans() -> None:
    for turn in turns_of(LAST):
        inputs = made_up(turn)
        assert inputs.keys() == turn.operands.keys() - set(turn.writes)
        assert {role: x.nbytes for role, x in inputs.items()} == {
            role: turn.operands[role].span_bytes for role in inputs
        }


class Memory:
    """What a room asks of a device; addresses are counted."""

    cache_bytes = 1 << 20

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.copied: list[bytes] = []

    def take(self, size_bytes: int, what: str) -> int:
        self.held[len(self.held) + 1] = size_bytes
        return len(self.held)

    def give_back(self, address: int) -> None:
        assert self.held[address] >= 0, "given back twice"
        self.held[address] = -1

    def to_gpu(self, at: int, array: np.ndarray, stream: int) -> None:
        assert self.held[at] >= array.nbytes
        self.copied.append(array.tobytes())

    def fill(self, at: int, value: int, size_bytes: int, stream: int) -> None:
        assert self.held[at] == size_bytes

    def stream(self) -> int:
        return 9

    def drop_stream(self, stream: int) -> None:
        assert stream == 9

    def wait(self, stream: int) -> None:
        assert stream == 9


def test_constants_that_ways_share_are_read_and_copied_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed: list[int] = []
    real = assemble.hashlib.sha256
    monkeypatch.setattr(
        assemble.hashlib, "sha256", lambda data: hashed.append(len(data)) or real(data)
    )
    memory, digests = Memory(), {}
    room = _Room(memory, 64)  # type: ignore[arg-type]
    large, other = np.arange(5000, dtype=np.int32), np.arange(7, dtype=np.int8)
    places = []
    for arrays in ((large, other), (large, other.copy()), (other, large), (large,)):
        constants = Constants(digests)
        places.append([constants.keep(array) for array in arrays])
        room.put_weights(constants)
        for array, place in zip(arrays, places[-1], strict=True):
            block = memory.copied[room.blocks[WEIGHTS] - 2]
            found = block[place.offset : place.offset + place.size_bytes]
            assert found == array.tobytes()
    assert hashed.count(large.nbytes) == 1
    assert len(memory.copied) == 3  # the second is equal to the first
    room.close()
    assert set(memory.held.values()) == {-1}


@pytest.mark.parametrize(
    ("size_bytes", "copies"), [(1 << 17, 1), ((1 << 17) + 256, 16), (1 << 20, 2), (3 << 20, 1)]
)
def test_large_constants_come_from_memory(size_bytes: int, copies: int) -> None:
    """As they do in a network whose weights are more than the cache holds."""
    memory = Space()
    room = _Room(memory, 64)  # type: ignore[arg-type]
    for _ in range(2):
        constants = Constants()
        constants.keep(np.arange(size_bytes, dtype=np.uint8))
        room.put_weights(constants)
        found = [blocks[WEIGHTS] for blocks in room.copies]
        assert found[0] == room.blocks[WEIGHTS]
        assert np.diff(found).tolist() == [size_bytes] * (copies - 1)
        assert sorted(memory.written) == [(at, size_bytes) for at in found]
    assert memory.held[found[0]] == copies * size_bytes
    room.close()


class Space(Memory):
    """Addresses have room between them."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[int, int]] = []

    def take(self, size_bytes: int, what: str) -> int:
        address = (len(self.held) + 1) << 40
        self.held[address] = size_bytes
        return address

    def to_gpu(self, at: int, array: np.ndarray, stream: int) -> None:
        self.written.append((at, array.nbytes))


def test_constants_that_leave_too_little_room_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_HELD", 1000)
    memory = Memory()
    room = _Room(memory, 64)  # type: ignore[arg-type]
    for value in range(5):
        constants = Constants()
        constants.keep(np.full(100, value, np.int32))
        room.put_weights(constants)
        assert memory.held[room.blocks[WEIGHTS]] >= 400
        assert sum(size for size in memory.held.values() if size > 64) <= 1024
    assert len(memory.copied) == 5
    room.close()
    assert set(memory.held.values()) == {-1}
