"""The structure of a JSON document: its keys and types without its values.

    {"a": 1, "b": [{"c": "x"}, {"c": None, "d": 2.5}]}
    {"a": "integer", "b": [{"c": "null|string", "d?": "number"}]}

Elements of a list have one structure together; a key that not all of them have ends in "?". What
has names of its own as keys (a map of counts by operator, say) becomes {"*": structure}.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden" / "json"

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def structure(value: Any, maps: Collection[str] = (), path: str = "") -> Any:
    """The structure of plain data.

    Args:
        value: what json.loads gives.
        maps: paths of maps, such as "weights[].counts".
        path: of `value`.
    """
    if isinstance(value, dict):
        if path in maps:
            return {"*": _together([structure(each, maps, f"{path}.*") for each in value.values()])}
        inner = f"{path}." if path else ""
        return {key: structure(each, maps, inner + key) for key, each in value.items()}
    if isinstance(value, list):
        return [_together([structure(each, maps, f"{path}[]") for each in value])] if value else []
    return _TYPES[type(value)]


def merged(one: Any, other: Any) -> Any:
    """The structure that covers two.

    An empty list, and an empty map, are covered by any; objects and scalars in one place are
    alternatives: {"|": [...]} has an object, a list or a type each.
    """
    if one == other or other is None:
        return one
    if one is None:
        return other
    if isinstance(one, str) and isinstance(other, str):
        types = {*one.split("|"), *other.split("|")}
        return "|".join(sorted(types - {"integer"} if "number" in types else types))
    if isinstance(one, list) and isinstance(other, list):
        return [_together([*one, *other])]
    if isinstance(one, dict) and isinstance(other, dict) and "|" not in one and "|" not in other:
        return _merged_keys(one, other)
    return {"|": _alternatives([*_cases(one), *_cases(other)])}


def compare(schema: str, found: Sequence[Any], *, update: bool) -> None:
    """Holds the structures of documents against their golden file, or writes it.

    Args:
        schema: NAME/VERSION; the file is NAME.json.
        found: structures of documents of that schema; together they have all that it may have.
        update: write what was found.
    """
    path, covered = GOLDEN / f"{schema.partition('/')[0]}.json", _together(list(found))
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(covered, indent=2) + "\n", encoding="utf-8")
    assert path.is_file(), f"{path} is missing; run pytest --update-golden and read what it wrote"
    golden = json.loads(path.read_text(encoding="utf-8"))
    assert merged(golden, covered) == golden, (
        f"differs from {path}: pytest --update-golden writes it; if a key went away or changed its "
        "meaning, raise the schema's version"
    )


def _together(values: list[Any]) -> Any:
    found = None
    for value in values:
        found = merged(found, value)
    return found


def _merged_keys(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Keys in the order of `one`; those that are not in both, or were optional, get "?"."""
    names = list(dict.fromkeys(key.removesuffix("?") for key in (*one, *other)))
    found = {}
    for name in names:
        always = name in one and name in other
        found[name if always else f"{name}?"] = merged(_get(one, name), _get(other, name))
    return found


def _get(keys: dict[str, Any], name: str) -> Any:
    return keys[name] if name in keys else keys.get(f"{name}?")


def _cases(value: Any) -> list[Any]:
    return value["|"] if isinstance(value, dict) and "|" in value else [value]


def _alternatives(cases: list[Any]) -> list[Any]:
    """One object, one list and one text of types at most, in this order."""
    found = []
    for kind in (dict, list, str):
        same = [case for case in cases if isinstance(case, kind)]
        if same:
            found.append(_together(same))
    return found
