"""One HTML file that needs nothing else: styles, drawings and what little script it has are in it.

Templates lie in `templates/`; all that comes from a model or a user is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
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
    loader = PackageLoader("twofour.report")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(content)


def write_page(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file under a temporary name, then renames it.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        write_whole(path, text.encode())
    except OSError as e:
        raise InputError(f"cannot write {path}", [str(e)], "name a file in another folder") from e
