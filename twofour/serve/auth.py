"""Who may use the server, and who may control what it serves: bearer tokens from files.

A file holds one token a line; empty lines and those that begin with # are passed over. Only hashes
are kept. Two files: tokens for requests, and tokens for control, which are good for requests too.

Control (loading and unloading models) is off where anybody could use it: without a control token
the server has to listen on loopback addresses alone, and then it still refuses what a web page in a
browser of that machine sends.

Source: RFC 6750 (bearer tokens in the header Authorization).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from twofour.core.errors import InputError
from twofour.serve.errors import ForbiddenError, ServeError, UnauthenticatedError

LEAST_CHARACTERS = 16
MOST_CHARACTERS = 4096
MOST_FILE_BYTES = 1 << 20
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_log = logging.getLogger(__name__)


class TokenFile:
    """The tokens of one file, as hashes."""

    def __init__(self, path: str | Path) -> None:
        """Reads the file.

        Raises:
            InputError: it cannot be read, holds no token, or a line that is none.
        """
        self._path = Path(path)
        self._seen: object = None
        self._hashes: tuple[bytes, ...] = ()
        self.reread()
        if self._seen is not None and os.stat(self._path).st_mode & 0o044:
            _log.warning("%s can be read by others than its owner: chmod 600", self._path)

    def reread(self) -> bool:
        """Reads the file again where it has changed; the tokens stay where that fails.

        Returns:
            Whether it has changed.

        Raises:
            InputError: as the constructor.
        """
        try:
            stat = os.stat(self._path)
            seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if seen == self._seen:
                return False
            if stat.st_size > MOST_FILE_BYTES:
                limit = f"expected at most {MOST_FILE_BYTES} bytes, got {stat.st_size}"
                raise InputError(f"the token file {self._path} is too large", [limit], "shorten it")
            text = self._path.read_text("ascii")
        except OSError as e:
            fix = "name a file with one token a line"
            raise InputError(f"cannot read the token file {self._path}", [str(e)], fix) from e
        except UnicodeDecodeError as e:
            reason = f"byte {e.start} is not ASCII"
            fix = "make tokens of letters and digits: openssl rand -hex 32"
            raise InputError(f"cannot use the token file {self._path}", [reason], fix) from e
        self._hashes = tuple(_hashes(text, self._path))
        self._seen = seen
        return True

    def holds(self, token: str) -> bool:
        """Whether it is one of them; takes as long for any token."""
        given = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = False
        for known in self._hashes:
            found |= hmac.compare_digest(given, known)
        return found


class Auth:
    """The rules for all requests of one server.

    Attributes:
        refused: name of an error -> requests that it kept out.
    """

    def __init__(
        self, tokens: TokenFile | None, control: TokenFile | None, loopback_only: bool
    ) -> None:
        """Keeps the rules.

        Args:
            tokens: good for requests; None: these need no token.
            control: good for control and requests; None: there is no such token.
            loopback_only: the server listens on loopback addresses alone.
        """
        self._tokens, self._control, self._loopback_only = tokens, control, loopback_only
        self.refused: Counter[str] = Counter()

    def check(self, headers: Mapping[str, str], control: bool) -> None:
        """Lets a request pass, or not.

        Args:
            headers: names in lower case; gRPC: the metadata.
            control: it changes what the server serves.

        Raises:
            UnauthenticatedError: it has no token, or an unknown one.
            ForbiddenError: control is off here, or the token is not good for it.
        """
        if not control and self._tokens is None:
            return
        try:
            if control:
                self._check_control(headers)
            else:
                self._check_request(headers)
        except ServeError as e:
            self.refused[type(e).__name__] += 1
            raise

    def reread(self) -> None:
        """Reads the files again where they have changed; logs what it finds.

        To be called at SIGHUP and every few seconds. Where a file has become unusable, the tokens
        that were known go on being good.
        """
        for file in (self._tokens, self._control):
            if file is None:
                continue
            try:
                if file.reread():
                    _log.info("tokens were read again")
            except InputError as e:
                _log.error("tokens stay as they were: %s", e)

    def _check_request(self, headers: Mapping[str, str]) -> None:
        if self._tokens is None:
            return
        token = _token(headers)
        known = self._tokens.holds(token)
        if not (known | (self._control is not None and self._control.holds(token))):
            raise _unknown()

    def _check_control(self, headers: Mapping[str, str]) -> None:
        if self._control is not None:
            token = _token(headers)
            if self._control.holds(token):
                return
            if self._tokens is not None and self._tokens.holds(token):
                what = "this token is not good for control"
                raise ForbiddenError(what, [], "send one of the server's control tokens")
            raise _unknown()
        if not self._loopback_only:
            reason = "the server listens beyond this machine and has no control token"
            fix = "start it with a file of control tokens, or on a loopback address"
            raise ForbiddenError("control is off", [reason], fix)
        if "origin" in headers or headers.get("sec-fetch-site", "none") != "none":
            reason = "the request comes from a web page, and the server has no control token"
            fix = "use a client outside of the browser, or a control token"
            raise ForbiddenError("control is off for web pages", [reason], fix)
        self._check_request(headers)


def is_loopback(hosts: Iterable[str]) -> bool:
    """Whether all of these are addresses that only this machine reaches.

    Args:
        hosts: addresses or names that a server listens on.

    Raises:
        InputError: a name has no address.
    """
    return all(ipaddress.ip_address(each).is_loopback for host in hosts for each in _known(host))


def _known(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", None)
    except (OSError, UnicodeError) as e:
        fix = "name an address of this machine, as 127.0.0.1 or 0.0.0.0"
        raise InputError(f"{host!r} has no address", [str(e)], fix) from e
    return [str(address[0]).partition("%")[0] for *_, address in found]


def _hashes(text: str, path: Path) -> list[bytes]:
    """Of all tokens in a file's text; no message shows any of it."""
    hashes = []
    reasons = []
    for number, line in enumerate(text.splitlines(), start=1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if len(token) < LEAST_CHARACTERS or len(token) > MOST_CHARACTERS:
            span = f"{LEAST_CHARACTERS} to {MOST_CHARACTERS}"
            reasons.append(f"line {number}: expected {span} characters, got {len(token)}")
        elif not _TOKEN.fullmatch(token):
            reasons.append(f"line {number}: expected letters, digits and -._~+/ with = at the end")
        hashes.append(hashlib.sha256(token.encode()).digest())
    if not hashes:
        reasons.append("it holds no token")
    if reasons:
        fix = "write one token a line, as `openssl rand -hex 32` makes them"
        raise InputError(f"cannot use the token file {path}", reasons, fix)
    return hashes


def _token(headers: Mapping[str, str]) -> str:
    """What a request sends.

    Raises:
        UnauthenticatedError: nothing, or something else.
    """
    kind, _, token = headers.get("authorization", "").partition(" ")
    token = token.strip()
    if kind.lower() != "bearer" or not token or len(token) > MOST_CHARACTERS:
        fix = "send the header Authorization: Bearer TOKEN"
        raise UnauthenticatedError("the request needs a token", [], fix)
    return token


def _unknown() -> UnauthenticatedError:
    fix = "send one of the server's tokens"
    return UnauthenticatedError("the token is unknown", [], fix)
