"""Which nodes the user leaves float, and why.

A pattern is one of names of nodes, as in a shell (`layer3.*`), or `op:` and one of operators
(`op:Gemm`, `op:Re*`). A pattern that matches nothing is refused: it would be a typing error that
nobody notices.

First layers are those that no layer with weights comes before, last ones those that none follows:
the stem and the classifier of a CNN, every head of a detector, and of a transformer the query, key
and value of the first block and the last product of the last.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

import onnx_ir as ir

from twofour.core.errors import InputError
from twofour.onnx_tools.eligible import why_float
from twofour.onnx_tools.options import QuantizeOptions

_OPERATOR = "op:"
_SUGGESTIONS = 3


def left_float(
    model: ir.Model, candidates: Iterable[ir.Node], options: QuantizeOptions
) -> dict[ir.Node, str]:
    """The nodes of the main graph that stay float because of what the user chose -> why.

    Args:
        model: prepared (see `prepare.py`).
        candidates: nodes that would be quantized; `include` and `first_last` are about these.
        options: `include`, `exclude` and `first_last` count here.

    Raises:
        InputError: a pattern matches no node.
    """
    nodes = list(model.graph.all_nodes())
    for name, patterns in (("include", options.include), ("exclude", options.exclude)):
        for pattern in patterns:
            require_match(pattern, name, nodes)
    found: dict[ir.Node, str] = {}
    candidates = list(candidates)
    if options.include:
        rest = [node for node in candidates if not _any_matches(options.include, node)]
        found |= dict.fromkeys(rest, "not included")
    if options.first_last == "float":
        found |= {node: why for node, why in _ends(model.graph).items() if node in candidates}
    for node in model.graph:
        for pattern in options.exclude:
            if matches(pattern, node):
                how = "operator" if pattern.startswith(_OPERATOR) else "name"
                found[node] = f"excluded by {how}"
    return found


def matches(pattern: str, node: ir.Node) -> bool:
    """Whether a pattern, as told above, is one of this node."""
    if pattern.startswith(_OPERATOR):
        return fnmatchcase(node.op_type, pattern.removeprefix(_OPERATOR))
    return fnmatchcase(node.name or "", pattern)


def require_match(pattern: str, option: str, nodes: list[ir.Node]) -> None:
    """Refuses a pattern that matches no node.

    Raises:
        InputError: names those that look like it.
    """
    if any(matches(pattern, node) for node in nodes):
        return
    by_operator = pattern.startswith(_OPERATOR)
    names = {node.op_type if by_operator else node.name or "" for node in nodes}
    raise nothing_matches(f"{option} {pattern!r} matches no node", pattern, names)


def nothing_matches(what: str, pattern: str, names: Iterable[str]) -> InputError:
    """The error for a pattern that matches none of these names."""
    every = sorted(filter(None, names))
    near = get_close_matches(pattern.removeprefix(_OPERATOR), every, _SUGGESTIONS, 0.4)
    shown = ", ".join(near or every[:_SUGGESTIONS])
    return InputError(
        what,
        [f"of {len(every)} names, such as {shown}" if every else "there are none"],
        "a pattern is as in a shell: * is any text, ? one character; op:Conv names an operator",
    )


def _any_matches(patterns: Iterable[str], node: ir.Node) -> bool:
    return any(matches(pattern, node) for pattern in patterns)


def _ends(graph: ir.Graph) -> dict[ir.Node, str]:
    """The first and the last layers -> what they are."""
    order = list(graph)
    weighted = {node for node in order if why_float(node) is not None}
    behind: set[ir.Node] = set()  # a layer, or after one
    for node in order:
        before = {value.producer() for value in node.inputs if value is not None}
        if node in weighted or before & behind:
            behind.add(node)
    ahead: set[ir.Node] = set()  # a layer, or before one
    for node in reversed(order):
        after = {reader for value in node.outputs for reader in value.consumers()}
        if node in weighted or after & ahead:
            ahead.add(node)
    found = {}
    for node in weighted:
        if not {value.producer() for value in node.inputs if value is not None} & behind:
            found[node] = "it is a first layer"
        elif not {reader for value in node.outputs for reader in value.consumers()} & ahead:
            found[node] = "it is a last layer"
    return found
