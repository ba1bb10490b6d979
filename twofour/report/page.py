"""One HTML file that needs nothing else: styles, drawings and what little script it has are in it.

Templates lie in `templates/`; all that comes from a model or a user is escaped. Beside that a page
has a policy: no other script than ours runs, by the hash of its text, and nothing is loaded.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from twofour.core.errors import InputError
from twofour.core.writing import write_whole


def render(template: str, content: Mapping[str, Any]) -> str:
    """Fills a template.

    Args:
        template: name of a file in `templates/`.
        content: what its names stand for; one that is missing is a bug, never a blank.
    """
    environment, scripts = _environment()
    hashes = " ".join(f"'sha256-{_digest(text)}'" for text in scripts.values())
    known = {"scripts": scripts, "script_hashes": hashes}
    return environment.get_template(template).render({**known, **content})


@cache
def _environment() -> tuple[Environment, dict[str, str]]:
    """How templates are read, and the texts of all scripts among them."""
    loader = PackageLoader("twofour.report")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = environment.list_templates(extensions=["js"])
    return environment, {name: loader.get_source(environment, name)[0] for name in names}


def _digest(text: str) -> str:
    """As a Content-Security-Policy names a script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write_page(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file under a temporary name, then renames it.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        write_whole(path, text.encode())
    except OSError as e:
        raise InputError(f"cannot write {path}", [str(e)], "name a file in another folder") from e
