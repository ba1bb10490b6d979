"""What a model serves, changed in the text of its config.yaml; all else stays, comments too.

    versions: {latest: 2}  # as we like it     versions: {specific: [3, 4]}  # as we like it
    traffic: {sticky_header: x}                traffic: {split: {3: 90, 4: 10}, sticky_header: x}

The text is changed where the parser says that a value stands. Then it is read again: a text of
which anything else would change is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from twofour.core.errors import InputError
from twofour.serve.repository.config import ModelConfig, read_config

_VERSIONS, _TRAFFIC, _SPLIT, _SPECIFIC = "versions", "traffic", "split", "specific"


def serving(
    content: bytes, versions: Sequence[int], split: Mapping[int, float] | None, where: str
) -> bytes:
    """The text of a config.yaml by which the server serves these versions.

    Args:
        content: of the file as it is; empty where there is none.
        versions: all that are served.
        split: their shares; None: leave out, which gives the highest all requests.
        where: the file, for messages.

    Raises:
        InputError: it cannot be used as it is, or is written in a way that is not understood.
    """
    before = read_config(content, where)
    wanted = {n: float(share) for n, share in (split or {}).items()}
    try:
        text = content.decode()
        text = _changed(text, (_VERSIONS,), {_SPECIFIC: list(versions)})
        if split is not None:
            text = _changed(text, (_TRAFFIC, _SPLIT), {n: _short(s) for n, s in wanted.items()})
        after = read_config(text.encode(), where)
    except (yaml.YAMLError, ValueError, InputError) as e:
        raise _by_hand(where, versions, split) from e
    same = _without(before) == _without(after)
    kept = wanted if split is not None else before.traffic.split
    if not same or after.versions.specific != tuple(versions) or after.traffic.split != kept:
        raise _by_hand(where, versions, split)
    return text.encode()


def _without(config: ModelConfig) -> ModelConfig:
    """All that stays."""
    traffic = config.traffic.model_copy(update={_SPLIT: {}})
    return config.model_copy(update={_VERSIONS: None, _TRAFFIC: traffic})


def _by_hand(where: str, versions: Sequence[int], split: Mapping[int, float] | None) -> InputError:
    lines = f"versions: {_flow({_SPECIFIC: list(versions)}, quoted=False)}"
    if split is not None:
        shares = {n: _short(share) for n, share in split.items()}
        lines += f" and traffic.split: {_flow(shares, quoted=False)}"
    reason = "its text cannot be changed without changing more: anchors, or several documents"
    return InputError(f"{where} was left as it is", [reason], f"write by hand: {lines}")


def _changed(text: str, path: tuple[str, ...], value: Any) -> str:
    """The text with another value at a path of keys.

    Raises:
        ValueError: a value on the way is none that keys are in, or an alias.
        yaml.YAMLError: no YAML.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None or root.tag.endswith(":null"):
        newline = "" if not text or text.endswith("\n") else "\n"
        return f"{text}{newline}{_entry(path, value, quoted=False)}\n"
    return _set(text, root, None, path, value)


def _set(text: str, node: Node, key: Node | None, path: tuple[str, ...], value: Any) -> str:
    """The text with another value below a node.

    Args:
        text: the whole.
        node: the value to change, or in which `path` leads on.
        key: of the node; None: it is the root.
        path: of keys, still to go.
        value: to set.
    """
    if key is not None and node.start_mark.index < key.end_mark.index:
        raise ValueError("an alias")
    if not path:
        return _replaced(text, node, key, _flow(value, quoted=_is_json(node)))
    if not isinstance(node, MappingNode):
        raise ValueError("no mapping")
    for inner, found in node.value:
        if isinstance(inner, ScalarNode) and inner.value == path[0]:
            return _set(text, found, inner, path[1:], value)
    return _inserted(text, node, key, path, value)


def _replaced(text: str, node: Node, key: Node | None, new: str) -> str:
    """The text with another value in the place of a node."""
    start, end = node.start_mark.index, _end(node)
    before = text[:start]
    if key is not None and node.start_mark.line > key.start_mark.line:
        # A sequence may stand below its key without being indented, another value may not.
        before += " " * max(0, key.start_mark.column + 2 - node.start_mark.column)
    elif before and not before[-1].isspace():
        before += " "
    return before + new + text[end:]


def _inserted(
    text: str, node: MappingNode, key: Node | None, path: tuple[str, ...], value: Any
) -> str:
    """The text with another entry: of the whole at its end, else in front.

    A last line that does not end may be a text's, which would be another one with a line end.
    """
    start = node.start_mark.index
    if node.flow_style:
        quoted = _is_json(node) or (key is None and not node.value)
        comma = ", " if node.value else ""
        return f"{text[: start + 1]}{_entry(path, value, quoted=quoted)}{comma}{text[start + 1 :]}"
    indent = " " * node.start_mark.column
    if key is None and text.endswith("\n"):
        return f"{text}{indent}{_entry(path, value, quoted=False)}\n"
    return f"{text[:start]}{_entry(path, value, quoted=False)}\n{indent}{text[start:]}"


def _end(node: Node) -> int:
    """Behind the last character of a value; that of a block ends where its last leaf does."""
    if isinstance(node, SequenceNode) and not node.flow_style and node.value:
        return _end(node.value[-1])
    if isinstance(node, MappingNode) and not node.flow_style and node.value:
        return _end(node.value[-1][1])
    return int(node.end_mark.index)


def _is_json(node: Node) -> bool:
    """Whether a value in braces is JSON, and should stay so."""
    if not isinstance(node, MappingNode) or not node.flow_style or not node.value:
        return False
    return all(isinstance(key, ScalarNode) and key.style == '"' for key, _ in node.value)


def _entry(path: tuple[str, ...], value: Any, *, quoted: bool) -> str:
    """`key: value`, the rest of the path within braces."""
    inner = value
    for name in reversed(path[1:]):
        inner = {name: inner}
    name = json.dumps(path[0]) if quoted else path[0]
    return f"{name}: {_flow(inner, quoted=quoted)}"


def _flow(value: Any, *, quoted: bool) -> str:
    """Plain data on one line; numbers and our own names need no quotes."""
    if isinstance(value, Mapping):
        names = ((json.dumps(str(k)) if quoted else str(k), v) for k, v in value.items())
        return "{" + ", ".join(f"{k}: {_flow(v, quoted=quoted)}" for k, v in names) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(each, quoted=quoted) for each in value) + "]"
    return json.dumps(value)


def _short(share: float) -> float | int:
    return int(share) if share == int(share) else share
