"""A YAML file as plain data, with the line of each part of it: so that errors can name the line.

Scalars mean what YAML 1.2 says: `2:4` is text (not 124), `1e-3` a number, `no` text. What can do
harm or hide a mistake is refused: tags, anchors and aliases, keys that stand twice, several
documents, files larger than `MOST_BYTES`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from twofour.core.errors import InputError

MOST_BYTES = 256 << 10
_MOST_DEPTH = 32
_INT = re.compile(r"[-+]?\d+")
_FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?")
_WORDS: dict[str, Any] = {"": None, "~": None, "null": None, "true": True, "false": False}
_MOST_DIGITS = 400

Path = tuple[str | int, ...]
"""Keys and indices from the top: ("build", "targets", 0)."""


@dataclass(frozen=True)
class Document:
    """What a file says, and where.

    Attributes:
        name: of the file, for messages.
        plain: dicts, tuples, strings, numbers, bools and None.
        lines: path -> line, from 1, of the key or the item.
    """

    name: str
    plain: Any
    lines: Mapping[Path, int]

    def where(self, path: Path) -> str:
        """FILE:LINE of a part, or of the innermost part around it that is there."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.name}:{self.lines.get(path, 1)}"


def path_text(path: Path) -> str:
    """`build.targets[0]`, as messages show it; "the recipe" for the whole."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "the recipe"


def read_document(content: bytes, name: str) -> Document:
    """Reads YAML.

    Args:
        content: of the file.
        name: of the file, for messages.

    Raises:
        InputError: it is too large, no YAML, or has what is refused; the line is named.
    """
    if len(content) > MOST_BYTES:
        got = f"expected at most {MOST_BYTES} bytes, got {len(content)}"
        raise InputError(f"{name} is too large", [got], "shorten it")
    try:
        text = content.decode("utf-8-sig")
        _require_plain(text, name)
        root = yaml.compose(text, yaml.SafeLoader)
    except UnicodeDecodeError as e:
        raise InputError(f"{name} is no text", [str(e)], "write it in UTF-8") from e
    except yaml.MarkedYAMLError as e:
        raise _unreadable(name, e) from e
    except yaml.YAMLError as e:
        raise InputError(f"{name} is no YAML", [str(e).replace("\n", ", ")]) from e
    except RecursionError as e:
        raise InputError(f"{name} is nested too deep", [f"at most {_MOST_DEPTH} levels"]) from e
    lines: dict[Path, int] = {(): 1}
    plain = {} if root is None else _plain(root, (), lines, name)
    return Document(name, plain, lines)


def _unreadable(name: str, error: yaml.MarkedYAMLError) -> InputError:
    mark = error.problem_mark or error.context_mark
    where = name if mark is None else f"{name}:{mark.line + 1}"
    parts = [part for part in (error.context, error.problem) if part]
    fix = "check indentation, quotes and the blank behind each colon at this line"
    return InputError(f"{name} is no YAML", [f"{where}: {', '.join(parts)}"], fix)


def _require_plain(text: str, name: str) -> None:
    """Refuses tags, anchors, aliases, and a second document. Raises InputError."""
    documents = depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        found = ""
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            found = "a second document (---)" if documents > 1 else ""
        elif isinstance(event, yaml.AliasEvent):
            found = f"an alias (*{event.anchor})"
        elif isinstance(event, yaml.NodeEvent):
            tag = getattr(event, "tag", None)
            found = f"an anchor (&{event.anchor})" if event.anchor else ""
            found = f"a tag ({tag})" if tag else found
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            found = found or ("a deeper level" if depth > _MOST_DEPTH else "")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if found:
            mark = event.start_mark
            where = name if mark is None else f"{name}:{mark.line + 1}"
            reason = f"{where}: expected plain keys and values, got {found}"
            raise InputError(f"{name} cannot be used", [reason], "write the values out")


def _plain(node: yaml.Node, path: Path, lines: dict[Path, int], name: str) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            lines[*path, index] = item.start_mark.line + 1
            items.append(_plain(item, (*path, index), lines, name))
        return tuple(items)
    found: dict[str, Any] = {}
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise InputError(f"{name} cannot be used", [f"{name}:{line}: a key has to be a name"])
        key = str(key_node.value)
        if key in found:
            first = lines[*path, key]
            reason = f"{name}:{line}: {path_text((*path, key))} stands twice, first at line {first}"
            raise InputError(f"{name} cannot be used", [reason], "keep one of them")
        lines[*path, key] = line
        found[key] = _plain(value, (*path, key), lines, name)
    return found


def _scalar(node: yaml.ScalarNode) -> Any:
    """The value of a scalar by YAML 1.2's core schema; what is quoted is text."""
    text: str = node.value
    if node.style is not None or len(text) > _MOST_DIGITS:
        return text
    if text.lower() in _WORDS and text in (text.lower(), text.title(), text.upper()):
        return _WORDS[text.lower()]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
