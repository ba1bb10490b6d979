"""A page that is measured in pieces: new rows beside those of an earlier run.

Rows stand side by side only if they were measured alike: on one machine, with the same tools and
options, and by the same code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from twofour.bench.suite.entries import Plain
from twofour.core.errors import InputError

# What has to agree -> how people call it.
_ALIKE = {
    "cpu": "CPU",
    "cores": "number of cores",
    "target": "target",
    "tools": "versions",
    "peers": "peers",
    "threads": "threads",
    "duration_s": "seconds a row",
    "code_sha256": "code of ours",
}


def read_page(path: Path) -> Plain | None:
    """The figures of an earlier run; None if there is no such file.

    Raises:
        InputError: it is not the JSON of a page.
    """
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
            raise ValueError("expected an object with rows")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is no page of a suite", [str(e)], "move it away") from e
    return found


def differences(earlier: Plain, now: Plain) -> list[str]:
    """Why rows of two runs do not belong on one page; empty if they do.

    Args:
        earlier: a page.
        now: the circumstances of a run.
    """
    found = []
    for key, words in _ALIKE.items():
        if earlier.get(key) == now.get(key):
            continue
        if key == "code_sha256":
            found.append("the code that builds and measures has changed since")
        elif key == "tools":
            found += _changed_versions(earlier.get(key) or {}, now.get(key) or {})
        else:
            found.append(f"{words}: the page has {earlier.get(key)}, this run {now.get(key)}")
    return found


def _changed_versions(earlier: Plain, now: Plain) -> list[str]:
    names = sorted({*earlier, *now})
    return [
        f"{name}: the page has {earlier.get(name)}, this run {now.get(name)}"
        for name in names
        if earlier.get(name) != now.get(name)
    ]


def merged(
    earlier: Sequence[Plain], measured: Sequence[Plain], order: Sequence[str]
) -> list[Plain]:
    """The rows of both by name, a measured one instead of an earlier one.

    Args:
        earlier: rows.
        measured: rows.
        order: names of all rows of the suite; others are left out.
    """
    rows = {row["name"]: row for row in [*earlier, *measured]}
    return [rows[name] for name in order if name in rows]
