"""How often a client may do what costs the server more than the client."""

from __future__ import annotations

from twofour.serve.grpc.frames import Code, ConnectionFault

RESETS, RESETS_PER_S = 1000, 200
IDLE_FRAMES, IDLE_FRAMES_PER_S = 2000, 200


class Allowance:
    """A bucket of tokens.

    Source: CVE-2023-44487 (rapid reset), CVE-2019-9512, -9515, -9518 (floods of PING, SETTINGS and
    empty DATA).
    """

    def __init__(self, what: str, most: int, per_s: float) -> None:
        """Begins full.

        Args:
            what: is counted, for the client's log.
            most: tokens in the full bucket.
            per_s: tokens that come back.
        """
        self._what, self._most, self._per_s = what, most, per_s
        self._left = float(most)
        self._since: float | None = None

    def spend(self, now: float) -> None:
        """Takes a token.

        Args:
            now: of the loop's clock, in seconds.

        Raises:
            ConnectionFault: there is none.
        """
        since = now if self._since is None else self._since
        self._left = min(self._left + (now - since) * self._per_s, self._most) - 1
        self._since = now
        if self._left < 0:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, f"too many {self._what}")

    def earn(self, tokens: int) -> None:
        """Gives tokens back, for work that the client let the server do."""
        self._left = min(self._left + tokens, self._most)
