"""Who published, promoted and rolled back what, and when: a small file an event, none ever changed.

    REPOSITORY/MODEL/.history/000001-5f0c2a9e.json

The name begins with a dot, so servers do not look at it. Two who write at once both write: the
order is that of the names, and so is who came last.
"""

from __future__ import annotations

import getpass
import json
import platform
import re
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime

from twofour.core.errors import InputError
from twofour.core.records import from_plain, to_plain
from twofour.registry.places import Place

HISTORY = ".history"
PUBLISH, PROMOTE, ROLLBACK = "publish", "promote", "rollback"
_SCHEMA = "twofour.event/1"
_MOST_BYTES = 64 << 10
_NAME = re.compile(r"(\d{6,})-[0-9a-f]{8}\.json")

Serves = dict[str, float]
"""Version -> percent of the requests that name none; keys are texts, as JSON has them."""


@dataclass(frozen=True)
class Event:
    """Something that was done to a model.

    Attributes:
        action: PUBLISH, PROMOTE or ROLLBACK.
        version: that was published, or promoted, or gone back to.
        when: ISO 8601, UTC.
        by: who, as user@machine.
        message: why, in the words of who did it.
        before: what was served; of a promotion or rollback.
        serves: what is served from then on; likewise.
    """

    action: str
    version: int
    when: str
    by: str
    message: str = ""
    before: Serves = field(default_factory=dict)
    serves: Serves = field(default_factory=dict)


@dataclass(frozen=True)
class History:
    """All events of a model.

    Attributes:
        events: the first one first.
        last: name of the file of the last one; "" where there is none.
    """

    events: tuple[Event, ...] = ()
    last: str = ""

    @property
    def highest(self) -> int:
        """Number of the highest version that ever was; 0 where there was none."""
        return max((event.version for event in self.events), default=0)

    @property
    def states(self) -> tuple[Serves, ...]:
        """What was served, the oldest first; what was rolled back is not among them.

        The first is what was served before the first promotion; the last is what is served now.
        """
        found: list[Serves] = []
        for event in self.events:
            if event.action == PUBLISH:
                continue
            if not found and event.before:
                found.append(event.before)
            if event.action == ROLLBACK and event.serves in found:
                while found[-1] != event.serves:
                    found.pop()
            else:
                found.append(event.serves)
        return tuple(found)


def read_history(place: Place, model: str) -> History:
    """All that was done to a model.

    Raises:
        InputError: it cannot be read, or one of its files is damaged.
    """
    names = sorted(filter(_NAME.fullmatch, place.hidden(f"{model}/{HISTORY}")), key=_order)
    events = tuple(_read(place, f"{model}/{HISTORY}/{name}") for name in names)
    return History(events, names[-1] if names else "")


def last_event(place: Place, model: str) -> str:
    """Name of the file of the last event; "" where there is none; raises InputError."""
    names = filter(_NAME.fullmatch, place.hidden(f"{model}/{HISTORY}"))
    return max(names, key=_order, default="")


def add_event(place: Place, model: str, event: Event, history: History) -> str:
    """Writes an event behind those that are known; the name of its file.

    Raises:
        InputError: it cannot be written.
    """
    number = _order(history.last)[0] + 1 if history.last else 1
    name = f"{number:06d}-{uuid.uuid4().hex[:8]}.json"
    text = json.dumps({"schema": _SCHEMA, **to_plain(event)}, indent=1) + "\n"
    place.replace(f"{model}/{HISTORY}/{name}", text.encode())
    return name


def now() -> str:
    """ISO 8601, UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def who() -> str:
    """user@machine; a user without a name is ?."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # in a container a user may have a number alone
        user = "?"
    return f"{user}@{platform.node() or '?'}"


def _order(name: str) -> tuple[int, str]:
    return int(name.partition("-")[0]), name


def _read(place: Place, where: str) -> Event:
    """An event's file.

    Raises:
        InputError: it is not there any more, or damaged.
    """
    content = place.small(where, _MOST_BYTES)
    try:
        plain = json.loads(content or b"")
        if not isinstance(plain, dict) or plain.pop("schema", None) != _SCHEMA:
            raise ValueError(f"its schema is not {_SCHEMA}")
        return from_plain(Event, plain)
    except (ValueError, RecursionError) as e:
        fix = "remove the file, if nobody knows what it was"
        raise InputError(f"{place.shown}/{where} is no event", [str(e)], fix) from e
