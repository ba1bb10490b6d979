"""Load on one server, or on several in turns, so that all see the same machine."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import uvloop

from twofour.bench.load.client import Answer, AnswerError, Client, Target, require_answer, said
from twofour.bench.load.drive import Record, Span, closed_turn, open_turn
from twofour.bench.load.grpc import GrpcClient
from twofour.bench.load.requests import Message, Wanted, encode, in_turn, make_requests, shapes_of
from twofour.bench.load.rest import HttpClient
from twofour.bench.load.result import Found, Result, summarize
from twofour.bench.load.schedule import Arrivals
from twofour.bench.load.statistics import Counters
from twofour.core.errors import InputError

_SLICE_S, _MIN_ROUNDS = 1.0, 3
_TICK_S = 0.5


@dataclass(frozen=True)
class Load:
    """What is done to a server.

    Attributes:
        callers: requests open at once: that many in a closed loop, at most so many in an open one.
        arrivals: of the open loop; None for a closed one.
        duration_s: timed seconds, shared by all targets.
        warm_up_s: before the first turn of each; later ones take a tenth of their turn.
        timeout_s: after which a request has failed.
        binary: HTTP: tensors as bytes; else as JSON.
    """

    callers: int = 1
    arrivals: Arrivals | None = None
    duration_s: float = 5.0
    warm_up_s: float = 0.5
    timeout_s: float = 10.0
    binary: bool = True

    def __post_init__(self) -> None:
        """Refuses what cannot be measured."""
        limits = {"duration": self.duration_s, "timeout": self.timeout_s}
        rate = 1.0 if self.arrivals is None else self.arrivals.rate
        wrong = [f"--{name} {value}" for name, value in limits.items() if not 0 < value < 1e5]
        wrong += [] if 0 <= self.warm_up_s < 1e5 else [f"--warm-up {self.warm_up_s}"]
        wrong += [] if 0 < rate <= 1e6 else [f"--rate {rate}"]
        if wrong:
            expected = "expected seconds above 0, and a rate above 0 and up to a million"
            raise InputError(f"cannot measure with {', '.join(wrong)}", [expected], "give others")

    def turns(self, targets: int) -> list[Span]:
        """Of each target: one, or where there are several, of about a second."""
        if targets == 1:
            return [Span(self.warm_up_s, 0.0, self.duration_s)]
        rounds = max(_MIN_ROUNDS, round(self.duration_s / (targets * _SLICE_S)))
        seconds = self.duration_s / (targets * rounds)
        later = min(self.warm_up_s, seconds / 10)
        return [
            Span(later if turn else self.warm_up_s, turn * seconds, seconds)
            for turn in range(rounds)
        ]


@dataclass
class _Contestant:
    """One target while it is measured."""

    client: Client
    name: str
    server: str
    inputs: dict[str, str]
    stream: Iterator[Message]
    turns: list[Record] = field(default_factory=list)
    counted: Counters | None = None

    def found(self) -> Found:
        """All that was noted."""
        return Found(
            self.client.target,
            self.name,
            self.server,
            self.inputs,
            self.turns,
            self.counted,
            self.client.held,
        )

    async def turn(self, load: Load, span: Span) -> None:
        before = await self.client.statistics()
        if load.arrivals is None:
            record = await closed_turn(self.client, self.stream, load.callers, span)
        else:
            record = await open_turn(self.client, self.stream, load.arrivals, span)
        after = await self.client.statistics()
        self.turns.append(record)
        if before is not None and after is not None:
            self.counted = (self.counted or Counters()) + (after - before)


def measure(
    targets: Sequence[Target],
    load: Load,
    wanted: Wanted,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Drives all targets, taking turns.

    Args:
        targets: the first is the one that others are compared with.
        load: how.
        wanted: with what.
        progress: called with (seconds gone, seconds in all).

    Raises:
        InputError: a server is not there, has no such model, or refuses the request.
        UnsupportedError: a model reads texts.
    """
    return uvloop.run(_measure(targets, load, wanted, progress))


async def _measure(
    targets: Sequence[Target],
    load: Load,
    wanted: Wanted,
    progress: Callable[[int, int], None] | None,
) -> list[Result]:
    spans = load.turns(len(targets))
    clients: list[Client] = [connect(target, load) for target in targets]
    try:
        racing = [
            await _prepared(client, name, load, wanted)
            for client, name in zip(clients, names(targets), strict=True)
        ]
        seconds = len(targets) * sum(span.warm_s + span.seconds for span in spans)
        with _no_collections():
            async with _ticking(seconds, progress):
                for span in spans:
                    for each in racing:
                        await each.turn(load, span)
    finally:
        for client in clients:
            await client.close()
    found = [each.found() for each in racing]
    return [summarize(each, None if each is found[0] else found[0]) for each in found]


def connect(target: Target, load: Load) -> Client:
    """The client for a URL's scheme; nothing is opened yet."""
    if target.scheme.startswith("grpc"):
        return GrpcClient(target, load.timeout_s)
    return HttpClient(target, load.timeout_s, binary=load.binary)


def names(targets: Sequence[Target]) -> list[str]:
    """What tells the targets apart: the server, the model, or both."""
    urls = [target.url for target in targets]
    models = [f"{target.model}{f':{target.version}' * bool(target.version)}" for target in targets]
    if len(set(models)) == 1:
        return urls
    if len(set(urls)) == 1:
        return models
    return [f"{url} {model}" for url, model in zip(urls, models, strict=True)]


async def _prepared(client: Client, name: str, load: Load, wanted: Wanted) -> _Contestant:
    """Connects, makes the requests, and asks each of them once."""
    await client.open(load.callers)
    server, info = await client.server(), await client.model()
    requests = make_requests(info, wanted, client.target)
    messages = encode(client, requests)
    for message in messages:
        await _try(client, message)
    return _Contestant(client, name, server, shapes_of(requests), in_turn(messages))


async def _try(client: Client, message: Message) -> None:
    """Sends a request alone, and learns what its answers hold.

    Raises:
        InputError: the server refuses it, or answers with something else.
    """
    answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    client.send(message.data, answered.set_result)
    answer = await answered
    target = client.target
    if answer.error in ("400", "INVALID_ARGUMENT"):
        require_shape(answer, target)
    require_answer(answer, target, f"model {target.model!r} does not answer")
    try:
        _, message.content = client.outputs(answer)
    except AnswerError as e:
        raise InputError(
            f"{target.url}: model {target.model!r} gives answers that cannot be read",
            [str(e)],
            "check it with another client, or measure with --tensors json",
        ) from e


def require_shape(answer: Answer, target: Target) -> None:
    """A request that was made from the model's metadata was refused.

    Raises:
        InputError: always.
    """
    raise InputError(
        f"{target.url}: model {target.model!r} refuses the request",
        [f"expected an answer, got {answer.error}: {said(answer.body)}"],
        "give shapes that it takes with --batch or --shapes, or values with --input",
    )


@contextmanager
def _no_collections() -> Iterator[None]:
    """What is there now is not looked at again by the garbage collector."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@asynccontextmanager
async def _ticking(
    seconds: float, progress: Callable[[int, int], None] | None
) -> AsyncIterator[None]:
    """Tells the progress twice a second."""
    began = time.monotonic()

    async def tick() -> None:
        while progress is not None:
            progress(min(int(time.monotonic() - began), int(seconds)), int(seconds))
            await asyncio.sleep(_TICK_S)

    task = asyncio.get_running_loop().create_task(tick())
    try:
        yield
    finally:
        task.cancel()
