"""What may work the next time, though no file has changed."""

from __future__ import annotations

from twofour.core.errors import InputError


class PassingError(InputError):
    """The network, the store behind it or the disk failed: it makes sense to try again."""
