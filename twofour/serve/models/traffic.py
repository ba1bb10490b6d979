"""Which version answers a request that names none."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Mapping

from twofour.serve.repository.config import Traffic


def choose(live: Iterable[int], traffic: Traffic, sticky: str) -> int:
    """A version by the shares of the split, among those that are live.

    Args:
        live: at least one version.
        traffic: of the configuration. The share of a version that is not live goes to the others;
            without a split, or where none of its versions lives, the highest answers.
        sticky: requests with the same text get the same version while the shares stay, on every
            server; "": drawn.
    """
    shares = parts(live, traffic)
    if len(shares) == 1:
        return next(iter(shares))
    point = zlib.crc32(sticky.encode()) / 2**32 if sticky else random.random()
    return _at(point, shares)


def parts(live: Iterable[int], traffic: Traffic) -> dict[int, float]:
    """The share of each live version that has one, ascending; they need not add up to 1."""
    numbers = sorted(live)
    shares = {n: traffic.split[n] for n in numbers if traffic.split.get(n)}
    if shares:
        return shares
    others = [n for n in numbers if n != traffic.shadow]  # whose answers go nowhere
    return {(others or numbers)[-1]: 1.0}


def shadowed(traffic: Traffic) -> bool:
    """Whether the shadow version gets a copy of this request: drawn."""
    return traffic.shadow_percent >= 100 or random.random() * 100 < traffic.shadow_percent


def _at(point: float, shares: Mapping[int, float]) -> int:
    """The version on whose part of the line from 0 to 1 a point lies."""
    left = point * sum(shares.values())
    for number, share in shares.items():
        left -= share
        if left < 0:
            return number
    return max(shares)  # rounding
