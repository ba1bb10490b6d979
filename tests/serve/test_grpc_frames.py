"""The codecs below a call: frames, header blocks, messages, windows."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofour.serve.errors import ServeError
from twofour.serve.grpc import frames
from twofour.serve.grpc.allowance import Allowance
from twofour.serve.grpc.flow import STREAM_WINDOW, Budget, Inflow
from twofour.serve.grpc.frames import Code, ConnectionFault
from twofour.serve.grpc.headers import HeadReader, literal, quoted, trailers
from twofour.serve.grpc.messages import Messages, prefixed
from twofour.serve.limits import Limits

LIMITS = Limits()
FIELDS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/a/b"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]
NUMBER = st.integers(0, frames.MOST_WINDOW)
BYTE = st.integers(0, 255)


@given(st.lists(st.tuples(BYTE, BYTE, NUMBER, st.binary(max_size=300))))
def test_frames_come_back(sent: list[tuple[int, int, int, bytes]]) -> None:
    data = b"".join([frames.frame(*each) for each in sent])
    at = 0
    for kind, flags, stream, payload in sent:
        assert frames.read_head(data, at) == (len(payload), kind, flags, stream)
        at += frames.HEAD_BYTES
        assert data[at : at + len(payload)] == payload
        at += len(payload)
    assert at == len(data)


@given(st.integers(0, (1 << 24) - 1), BYTE, BYTE, st.integers(0, (1 << 32) - 1))
def test_heads_come_back_without_their_unused_bit(n: int, kind: int, flags: int, at: int) -> None:
    found = frames.read_head(frames.head(n, kind, flags, at), 0)
    assert found == (n, kind, flags, at & frames.MOST_WINDOW)


@given(st.binary(max_size=50), st.integers(0, 60), st.booleans(), st.booleans())
def test_padding_and_priority_come_off(body: bytes, pad: int, padded: bool, first: bool) -> None:
    flags = frames.PADDED * padded | frames.PRIORITIZED * first
    lead = (bytes([pad]) if padded else b"") + bytes(5 * first)
    payload = lead + body + bytes(pad * padded)
    assert frames.content(flags, payload) == body
    if padded:
        with pytest.raises(ConnectionFault):
            frames.content(flags, payload[: len(lead) + pad - 1][: max(pad, 0)])


@given(st.binary(max_size=64), BYTE)
def test_any_payload_is_content_or_a_fault(payload: bytes, flags: int) -> None:
    codes = set()
    try:
        assert frames.content(flags, payload) in payload
    except ConnectionFault as fault:
        codes.add(fault.code)
    assert codes <= {Code.PROTOCOL_ERROR, Code.FRAME_SIZE_ERROR}


@given(st.lists(st.tuples(st.integers(7, 65535), st.integers(0, (1 << 32) - 1))))
def test_settings_come_back(pairs: list[tuple[int, int]]) -> None:
    assert frames.read_settings(frames.settings(pairs)[frames.HEAD_BYTES :]) == pairs


@given(st.binary(max_size=64))
def test_any_settings_are_read_or_a_fault(payload: bytes) -> None:
    try:
        assert len(frames.read_settings(payload)) == len(payload) / 6
    except ConnectionFault:
        pass


TEXT = st.text(st.characters(codec="latin-1", exclude_characters="\0\r\n"), max_size=300)
NAME = st.from_regex(r"x-[a-z]{1,9}", fullmatch=True)


@given(st.lists(st.lists(st.tuples(NAME, TEXT, st.booleans()), max_size=4), max_size=12))
def test_blocks_that_are_remembered_mean_what_they_say(
    calls: list[list[tuple[str, str, bool]]],
) -> None:
    """A reader with its memory, and one that reads every block anew."""
    encoder, reader = hpack.Encoder(), HeadReader(LIMITS)
    for fields in [each for each in calls for _ in range(3)]:
        encoded = [(name.encode(), text.encode("latin-1"), s) for name, text, s in fields]
        head = reader.read(encoder.encode([*FIELDS, *encoded]))
        expected: dict[str, str] = {}
        for name, text, _ in fields:
            expected[name] = f"{expected[name]}, {text}" if name in expected else text
        assert (head.path, head.headers) == ("/a/b", expected)


def test_a_table_that_changes_forgets_the_blocks() -> None:
    """The same bytes mean another field after an entry has come, also one that ousts its equal."""
    reader = HeadReader(LIMITS)
    static = b"\x83\x86\x44\x04/a/b\x0f\x10\x10application/grpc"
    first, second = (static[:2] + b"\x04" + static[3:] + at for at in (b"\xbe", b"\xbf"))
    add = {
        text: static[:2] + b"\x04" + static[3:] + b"\x40\x03x-a\x01" + text for text in (b"1", b"2")
    }
    for text in (b"1", b"2", b"2", b"1"):
        assert reader.read(add[text]).headers == {"x-a": text.decode()}
        for _ in range(3):
            assert reader.read(first).headers == {"x-a": text.decode()}
    assert reader.read(second).headers == {"x-a": "2"}
    two = b"\x3f\x29"  # a table of 72 bytes, of two such entries: 32 + 3 + 1 each
    assert reader.read(two + add[b"1"]).headers == {"x-a": "1"}
    for text, before in ((b"2", "1"), (b"2", "2"), (b"2", "2"), (b"1", "2"), (b"1", "1")):
        reader.read(add[text])
        assert reader.read(second).headers == {"x-a": before}


def test_a_repeated_block_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, reader = hpack.Encoder(), HeadReader(LIMITS)
    heads = [reader.read(encoder.encode(FIELDS)) for _ in range(2)]
    monkeypatch.setattr(hpack.Decoder, "decode", None)
    again = reader.read(encoder.encode(FIELDS))
    assert again is heads[1]


@given(st.binary(max_size=200))
def test_any_block_is_a_head_or_a_fault(block: bytes) -> None:
    codes = set()
    try:
        HeadReader(LIMITS).read(block)
    except ConnectionFault as fault:
        codes.add(fault.code)
    assert codes <= {Code.COMPRESSION_ERROR, Code.ENHANCE_YOUR_CALM}


@given(NAME, st.text(st.characters(codec="ascii"), max_size=20_000))
def test_literals_are_read_by_others(name: str, text: str) -> None:
    assert hpack.Decoder().decode(literal(name, text)) == [(name, text)]


def test_messages_of_statuses_are_escaped() -> None:
    assert quoted("a%\né~ ") == "a%25%0A%C3%A9~ "
    found = dict(hpack.Decoder().decode(trailers(5, "no 'é'", [("a-b", "1")])))
    assert found == {"grpc-status": "5", "grpc-message": "no '%C3%A9'", "a-b": "1"}


@given(st.lists(st.binary(max_size=40)), st.lists(st.integers(1, 30), min_size=1))
def test_messages_come_back_however_they_are_cut(bodies: list[bytes], cuts: list[int]) -> None:
    data = b"".join([prefixed(body, len(body) % 2 == 1) + body for body in bodies])
    messages, at, found = Messages(40), 0, []
    for turn in range(len(data)):
        messages.feed(data[at : at + cuts[turn % len(cuts)]])
        at += cuts[turn % len(cuts)]
        while turn % 3 == 0 and messages.ready:
            found.append(messages.take())
    while messages.ready:
        found.append(messages.take())
    assert [(each.compressed, each.body) for each in found] == [
        (len(body) % 2 == 1, body) for body in bodies
    ]
    assert messages.have == 0


@given(st.binary(max_size=100))
def test_any_bytes_are_messages_or_refused(data: bytes) -> None:
    messages = Messages(20)
    try:
        messages.feed(data)
        while messages.ready:
            assert len(messages.take().body) <= 20
    except ServeError:
        pass


def test_room_is_reserved_in_turn() -> None:
    granted: list[str] = []
    budget = Budget(1000)
    a, b, c = (Inflow(budget, lambda name=name: granted.append(name)) for name in "abc")
    for flow, more in ((a, 600), (b, 600), (c, 300)):
        flow.need(STREAM_WINDOW + more)
    assert granted == ["a"]  # c would fit, and waits behind b
    a.took(STREAM_WINDOW + 600)
    assert granted == ["a", "b", "c"]
    b.close()
    c.close()
    a.need(STREAM_WINDOW + 1000)
    assert granted == ["a", "b", "c", "a"]


@given(st.lists(st.integers(1, 3 * STREAM_WINDOW), max_size=6), st.integers(1 << 12, 1 << 18))
def test_every_message_that_has_room_gets_its_window(sizes: list[int], part: int) -> None:
    """A client that sends all that it may never waits for ever, and never holds too much."""
    budget = Budget(4 * STREAM_WINDOW)
    flow = Inflow(budget, lambda: None)
    may = STREAM_WINDOW
    for size in sizes:
        sent = 0
        while sent < size:
            if size > STREAM_WINDOW and sent:
                flow.need(size)
            may += flow.grant(size - sent)
            assert may > 0
            now = min(may, part, size - sent)
            may -= now
            sent += now
            assert flow.came(now, now)
            assert sent + may <= max(size, STREAM_WINDOW) + STREAM_WINDOW
        flow.took(size)
    assert flow.came(may, 0)
    assert not flow.came(1, 0)


def test_an_allowance_fills_again() -> None:
    bucket = Allowance("things", 10, 5)

    def spent(now: float) -> int:
        count = 0
        while True:
            try:
                bucket.spend(now)
            except ConnectionFault:
                return count
            count += 1

    assert spent(100.0) == 10
    bucket.earn(3)
    assert spent(100.0) == 2  # one was owed
    assert 9 <= spent(102.5) <= 12
