"""This process as a driver of a Ray cluster."""

from __future__ import annotations

import logging
import os
import re
import socket

import ray
from ray.exceptions import RayError

from twofour.core.errors import InputError

REACH_S = 5.0
_HOST_PORT = re.compile(r"(.+):(\d{1,5})")


def connect(address: str = "", shows_logs: bool = False) -> None:
    """Makes this process a driver of a cluster.

    Args:
        address: "auto", the one of this machine; "host:port", that of its head; "": one is started
            on this machine, and ends with this process's connection.
        shows_logs: what workers of a cluster that is started here print comes out here.

    Raises:
        InputError: there is none, or it runs other versions of Ray or Python.
    """
    _require_reachable(address)
    try:
        if address:
            ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        ray.init(
            "local",
            include_dashboard=False,
            log_to_driver=shows_logs,
            logging_level=logging.WARNING,
        )
    except (OSError, ValueError, RuntimeError, RayError) as e:
        if "ersion mismatch" in str(e):
            what, fix = (
                f"the Ray cluster at {address!r} runs other versions",
                ("run this with the versions of Ray and Python that its nodes have"),
            )
        else:
            what, fix = _none_at(address)
        raise InputError(what, str(e).splitlines(), fix) from e


def _none_at(address: str) -> tuple[str, str]:
    start = "start it: ray start --head; or leave --ray-address out to start one here"
    if not address:
        return "Ray could not be started here", "leave --ray out to work in processes"
    return f"there is no Ray cluster at {address!r}", start


def _require_reachable(address: str) -> None:
    """Asks for a connection: Ray itself tries a wrong address for a minute. Raises InputError."""
    if address in ("", "auto") or "://" in address:
        return
    found = _HOST_PORT.fullmatch(address)
    what, fix = _none_at(address)
    if found is None:
        expected = ["expected auto or HOST:PORT of its head, such as 10.0.0.1:6379"]
        raise InputError(what, expected, fix)
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), REACH_S).close()
    except (OSError, OverflowError) as e:
        raise InputError(what, [f"nobody answers there: {e}"], fix) from e
