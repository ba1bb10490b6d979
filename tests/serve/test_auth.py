from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from twofour.core.errors import InputError
from twofour.serve.auth import Auth, TokenFile, is_loopback
from twofour.serve.errors import ForbiddenError, UnauthenticatedError

USER, OTHER, ADMIN = "user-0123456789abcdef", "other-0123456789abcdef", "admin-0123456789abcdef"


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def token_file(folder: Path, name: str, *tokens: str) -> TokenFile:
    path = folder / name
    path.write_text("# who\n\n" + "".join(f"  {token} \n" for token in tokens))
    path.chmod(0o600)
    return TokenFile(path)


@pytest.fixture
def auth(tmp_path: Path) -> Auth:
    users = token_file(tmp_path, "users", USER, OTHER)
    return Auth(users, token_file(tmp_path, "admins", ADMIN), loopback_only=False)


def test_requests_pass_with_any_token_and_control_with_its_own(auth: Auth) -> None:
    for token in (USER, OTHER, ADMIN):
        auth.check(bearer(token), control=False)
    auth.check({"authorization": f"bearer   {ADMIN} "}, control=True)


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": USER},
        {"authorization": f"Basic {USER}"},
        bearer("unknown-0123456789abcdef"),
        bearer(USER + "x"),
        bearer(USER[:-1]),
        bearer(USER.upper()),
        bearer("# who"),
        bearer("\udcff\u2028é"),
        bearer("x" * 1_000_000),
    ],
)
def test_nothing_else_passes(auth: Auth, headers: dict[str, str], control: bool) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        auth.check(headers, control)
    assert auth.refused == {"UnauthenticatedError": 1}
    assert USER not in str(caught.value)
    assert "unknown-" not in str(caught.value)


def test_a_token_for_requests_is_not_good_for_control(auth: Auth) -> None:
    with pytest.raises(ForbiddenError, match="not good for control"):
        auth.check(bearer(USER), control=True)


def test_without_files_requests_are_free_and_control_is_for_loopback_alone() -> None:
    Auth(None, None, loopback_only=False).check({}, control=False)
    Auth(None, None, loopback_only=True).check({}, control=True)
    with pytest.raises(ForbiddenError, match="control is off"):
        Auth(None, None, loopback_only=False).check({}, control=True)


def test_on_loopback_the_tokens_of_requests_are_good_for_control(tmp_path: Path) -> None:
    auth = Auth(token_file(tmp_path, "users", USER), None, loopback_only=True)
    auth.check(bearer(USER), control=True)
    with pytest.raises(UnauthenticatedError):
        auth.check({}, control=True)


@pytest.mark.parametrize(
    "headers",
    [{"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}],
)
def test_a_web_page_cannot_control_a_server_on_its_readers_machine(
    headers: dict[str, str], auth: Auth
) -> None:
    with pytest.raises(ForbiddenError, match="web page"):
        Auth(None, None, loopback_only=True).check(headers, control=True)
    auth.check(bearer(ADMIN) | headers, control=True)


def test_tokens_are_read_again_where_the_file_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    users = token_file(tmp_path, "users", USER)
    auth = Auth(users, None, loopback_only=False)
    path = tmp_path / "users"
    path.with_suffix(".new").write_text(OTHER + "\n")
    os.replace(path.with_suffix(".new"), path)
    auth.check(bearer(USER), control=False)
    caplog.set_level(logging.INFO)
    auth.reread()
    auth.reread()
    assert caplog.messages == ["tokens were read again"]
    auth.check(bearer(OTHER), control=False)
    with pytest.raises(UnauthenticatedError):
        auth.check(bearer(USER), control=False)
    path.unlink()
    auth.reread()
    assert "tokens stay as they were" in caplog.messages[-1]
    auth.check(bearer(OTHER), control=False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no token"),
        ("# nobody\n", "no token"),
        ("short\n", "line 1: expected 16"),
        ("# a\ntwo words are no token\n", "line 2: expected letters"),
        ("é" * 20, "not ASCII"),
        ("x" * 5000, "got 5000"),
        ("x" * (2 << 20), "at most"),
    ],
)
def test_files_that_cannot_be_used_are_refused_and_not_shown(
    tmp_path: Path, text: str, reason: str
) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(InputError, match=reason) as caught:
        TokenFile(path)
    assert "two words" not in str(caught.value)
    assert "short" not in str(caught.value).replace("shorten", "")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.txt"):
        TokenFile(tmp_path / "none.txt")


def test_a_file_that_others_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token_file(tmp_path, "a", USER)
    assert caplog.messages == []
    path = tmp_path / "b"
    path.write_text(USER)
    path.chmod(0o644)
    TokenFile(path)
    assert "chmod 600" in caplog.messages[0]


def test_only_hashes_are_kept(tmp_path: Path) -> None:
    users = token_file(tmp_path, "users", USER)
    assert USER not in repr(vars(users))


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["127.0.0.1"], True),
        (["::1", "127.0.0.5"], True),
        (["localhost"], True),
        (["0.0.0.0"], False),
        ([""], False),
        (["::"], False),
        (["127.0.0.1", "0.0.0.0"], False),
        (["192.0.2.1"], False),
    ],
)
def test_loopback(hosts: list[str], expected: bool) -> None:
    assert is_loopback(hosts) is expected


def test_a_name_without_address_is_refused() -> None:
    with pytest.raises(InputError, match="no address"):
        is_loopback(["no-such-host.invalid"])
