"""The head that documents of benchmarks share, as data and as a page; the README takes it up."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from twofour.core.version import __version__


def about(
    title: str, module: str, arguments: Sequence[str], device: Sequence[str], tools: Sequence[str]
) -> dict[str, Any]:
    """What was run, on what, and with what.

    Args:
        title: of the page.
        module: of `benchmarks`, its name.
        arguments: of its command line.
        device: what it ran on, a line each.
        tools: names of distributions; those that are not installed are left out.
    """
    return {
        "title": title,
        "command": command(module, arguments),
        "version": __version__,
        "device": list(device),
        "tools": installed(tools),
    }


def command(module: str, arguments: Sequence[str]) -> str:
    """What reproduces the figures: not where they are written, nor the folders of a machine.

    Args:
        module: of `benchmarks`, its name.
        arguments: of its command line.
    """
    found = [each for each in arguments if not each.startswith("--output=")]
    if "--output" in found:
        at = found.index("--output")
        del found[at : at + 2]
    told = [Path(each).name if each.startswith("/") else each for each in found]
    return shlex.join(["python", "-m", f"benchmarks.{module}", *told])


def installed(tools: Sequence[str]) -> dict[str, str]:
    """Distribution -> its version, of those that are installed."""
    found = {}
    for name in tools:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def head(document: Mapping[str, Any]) -> list[str]:
    """The first lines of a page: its title, the command, the machine and the versions."""
    tools = [f"twofour {document['version']}"]
    tools += [f"{name} {text}" for name, text in document["tools"].items()]
    lines = [f"# {document['title']}", "", f"    {document['command']}", ""]
    return [*lines, f"Run on: {'; '.join(document['device'])}. {', '.join(tools)}.", ""]


def noted(document: Mapping[str, Any]) -> list[str]:
    """What else is to be said of the figures, a paragraph each."""
    return [line for note in document.get("notes", ()) for line in (note, "")]


def write(folder: Path, name: str, document: Mapping[str, Any], page: str) -> None:
    """Both files of a benchmark: called after each row, what was measured survives what follows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    (folder / f"{name}.md").write_text(page)
