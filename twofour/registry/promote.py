"""Which version the server serves: promote one, give it a share of the requests, go back.

A promotion is an event in the model's history, then `versions` and `traffic.split` of its
config.yaml. Whoever has written that looks whether a later event came meanwhile, and if so writes
what that one says: so the file ends as the history does, whoever was faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from twofour.core.errors import Error, InputError
from twofour.registry.config_text import serving
from twofour.registry.history import (
    PROMOTE,
    PUBLISH,
    ROLLBACK,
    Event,
    History,
    Serves,
    add_event,
    last_event,
    now,
    read_history,
    who,
)
from twofour.registry.places import Place, open_place
from twofour.registry.reading import read_model_config, read_published, version_of, versions_of
from twofour.serve.models.traffic import parts
from twofour.serve.repository.config import ModelConfig
from twofour.serve.repository.layout import CONFIG, MANIFEST, VersionEntry

WHOLE = 100.0
_TRIES = 20
_DIGITS = 6


@dataclass(frozen=True)
class PromoteOptions:
    """How a version is promoted.

    Attributes:
        share: percent of the requests that it gets; the others keep theirs among themselves.
        message: why, for the history.
        by: who; "": user@machine.
        storage: options of fsspec's file system.
    """

    share: float = WHOLE
    message: str = ""
    by: str = ""
    storage: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Promotion:
    """What a promotion or a rollback changed.

    Attributes:
        event: as the history has it.
        config: the file that was changed.
        changed: whether anything is served otherwise than before.
    """

    event: Event
    config: str
    changed: bool


def promote(
    repository: str, name: str, version: int, options: PromoteOptions | None = None
) -> Promotion:
    """Lets the server serve a version, alone or with a share of the requests.

    Args:
        repository: a folder or a URL.
        name: of the model.
        version: of it.
        options: how.

    Raises:
        InputError: there is no such version, it is not what was published, the share cannot be, or
            config.yaml cannot be changed.
    """
    options = options or PromoteOptions()
    if not 0 < options.share <= WHOLE:
        reason = f"expected more than 0 and at most 100 percent, got {options.share:g}"
        raise InputError("no version can be promoted to that share", [reason], "try --share 10")
    place = open_place(repository, options.storage)
    versions = versions_of(place, name)
    _require_whole(place, version_of(versions, version))
    before = served_now(read_model_config(place, name)[1], versions)
    serves = _with_share(before, version, options.share)
    event = Event(PROMOTE, version, now(), options.by or who(), options.message, before, serves)
    return _apply(place, name, event, read_history(place, name))


def rollback(repository: str, name: str, options: PromoteOptions | None = None) -> Promotion:
    """Goes back to the version that was served alone before the present state.

    What was promoted for a share of the requests only is passed over.

    Args:
        repository: a folder or a URL.
        name: of the model.
        options: its message, author and storage.

    Raises:
        InputError: there is nothing to go back to, or config.yaml cannot be changed.
    """
    options = options or PromoteOptions()
    place = open_place(repository, options.storage)
    versions = versions_of(place, name)
    history = read_history(place, name)
    before = served_now(read_model_config(place, name)[1], versions)
    states = [state for state in history.states if len(state) == 1]
    earlier = states[:-1] if states and states[-1] == before else states
    there = [state for state in earlier if state != before and int(next(iter(state))) in versions]
    if not there:
        reason = "its history has no other version that was served alone, and is still there"
        fix = "promote the version that you want: twofour registry promote"
        raise InputError(f"model {name!r} cannot be rolled back", [reason], fix)
    serves = there[-1]
    version = int(next(iter(serves)))
    _require_whole(place, versions[version])
    event = Event(ROLLBACK, version, now(), options.by or who(), options.message, before, serves)
    return _apply(place, name, event, history)


def served_now(config: ModelConfig, versions: Mapping[int, VersionEntry]) -> Serves:
    """Version -> percent of the requests, by what config.yaml says of those that are there."""
    chosen = config.versions.choose(list(versions))
    if not chosen:
        return {}
    shares = parts(chosen, config.traffic)
    return _percent(shares)


def _percent(shares: Mapping[int, float]) -> Serves:
    total = sum(shares.values())
    return {str(n): round(WHOLE * share / total, _DIGITS) for n, share in sorted(shares.items())}


def _with_share(before: Serves, version: int, share: float) -> Serves:
    """The shares when a version gets one, and the others keep theirs among themselves."""
    others = {int(n): part for n, part in before.items() if int(n) != version}
    if share == WHOLE or not others:
        return {str(version): WHOLE}
    rest = (WHOLE - share) / sum(others.values())
    return _percent({**{n: part * rest for n, part in others.items()}, version: share})


def _require_whole(place: Place, version: VersionEntry) -> None:
    """Refuses a published version of which files are missing, or its manifest damaged.

    Raises:
        InputError: it is so.
    """
    published = MANIFEST in {file.name for file in version.files}
    if not published and not version.files:
        raise InputError(f"{version.title} is empty", [], "publish it, or copy its files there")
    if published and read_published(place, version) is None:
        fix = "see twofour registry verify; publish it anew"
        raise InputError(f"{version.title} is not what was published", [], fix)


def _apply(place: Place, name: str, event: Event, history: History) -> Promotion:
    """Writes the event, then config.yaml as the last event of all says.

    Raises:
        InputError: config.yaml cannot be changed; then nothing was.
    """
    where = f"{name}/{CONFIG}"
    shown = f"{place.shown}/{where}"
    if event.serves == event.before and _is_pinned(place, name, event.serves):
        return Promotion(event, shown, False)
    _written(place, name, event.serves)  # what cannot be changed is found out before the event
    mine = add_event(place, name, event, history)
    wanted, last = event.serves, mine
    for _ in range(_TRIES):
        place.replace(where, _written(place, name, wanted))
        newest = last_event(place, name)
        if newest == last:
            break
        last = newest
        later = [each for each in read_history(place, name).events if each.action != PUBLISH]
        wanted = later[-1].serves
    return Promotion(event, shown, True)


def _is_pinned(place: Place, name: str, serves: Serves) -> bool:
    """Whether config.yaml names the versions, so that a new one changes nothing."""
    specific = read_model_config(place, name)[1].versions.specific
    return {*map(str, specific)} >= {*serves}


def _written(place: Place, name: str, serves: Serves) -> bytes:
    """The text of config.yaml by which these versions are served.

    Raises:
        InputError: it cannot be changed.
    """
    text, config = read_model_config(place, name)
    numbers = {int(n): share for n, share in serves.items()}
    shadow = config.traffic.shadow
    kept = {shadow} if shadow is not None and _is_served(place, name, config, shadow) else set()
    split = numbers if len(numbers) > 1 or config.traffic.split else None
    return serving(text, sorted({*numbers, *kept}), split, f"{place.shown}/{name}/{CONFIG}")


def _is_served(place: Place, name: str, config: ModelConfig, number: int) -> bool:
    try:
        return number in config.versions.choose(list(versions_of(place, name)))
    except Error:
        return False
