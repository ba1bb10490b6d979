"""What is wrong with a recipe, each fault with its file, line and field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

from twofour.core.errors import InputError
from twofour.pipeline.yaml_lines import Document, Path, path_text

FUNCTION = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_PATTERNS = {
    FUNCTION: "module:function",
    NAME: "a name of letters, digits, '.', '_' and '-'",
}
_WORDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list: [a, b]",
    "dict_type": "fields: {name: value}",
    "model_type": "fields: {name: value}",
    "model_attributes_type": "fields: {name: value}",
    "string_too_short": "some text",
    "too_short": "at least one of them",
}
_LIMITS = {
    "greater_than": ("a number above {}", "gt"),
    "greater_than_equal": ("{} or more", "ge"),
    "less_than": ("a number below {}", "lt"),
    "less_than_equal": ("{} or less", "le"),
}
_MOST_FIXES = 4


@dataclass(frozen=True)
class Fault:
    """What is wrong with one field.

    Attributes:
        reason: where it is, what was expected and found, in one line.
        fix: how it may be mended; "" where the reason says it.
    """

    reason: str
    fix: str = ""


def refusal(document: Document, faults: Iterable[Fault]) -> InputError:
    """All that is wrong, as one error."""
    found = list(dict.fromkeys(faults))
    fixes = list(dict.fromkeys(each.fix for each in found if each.fix))
    return InputError(
        f"{document.name} cannot be used",
        [each.reason for each in found],
        "; ".join(fixes[:_MOST_FIXES]) or "mend these lines; docs/pipeline.md lists all fields",
    )


def fault_at(document: Document, path: Path, what: str, fix: str = "") -> Fault:
    """A fault of a field, or of a section, that is or should be at a path."""
    return Fault(f"{document.where(path)}: {path_text(path)}: {what}", fix)


def fault_of(document: Document, error: Mapping[str, Any], top: Any) -> Fault:
    """An error as pydantic tells it, in words of the recipe.

    Args:
        document: the file.
        error: an item of `ValidationError.errors()`.
        top: the model of the whole.
    """
    path, kind = tuple(error["loc"]), error["type"]
    if kind == "extra_forbidden":
        return _unknown(document, path, top)
    if kind == "missing":
        return fault_at(document, path, "expected a value, got none", f"add {path_text(path)}: ...")
    given = error["input"]
    shown = "nothing" if given is None else repr(given) if len(repr(given)) < 60 else "more"
    fix = ""
    if kind == "string_type" and isinstance(given, (int, float)):
        fix = f"put it in quotes: {path[-1]}: '{given}'"
    what = f"expected {_expected(error)}, got {_yaml_words(given, shown)}"
    return fault_at(document, path, what, fix)


def _unknown(document: Document, path: Path, top: Any) -> Fault:
    known = _fields(path[:-1], top)
    near = get_close_matches(str(path[-1]), known, 1)
    fix = f"write {near[0]!r} for {path[-1]!r}" if near else f"leave {path[-1]!r} out"
    return fault_at(document, path, f"unknown; expected {', '.join(known)}", fix)


def _fields(path: Path, section: Any) -> list[str]:
    """The fields of the section at this path."""
    for part in path:
        kinds = get_args(section.model_fields[part].annotation) or (
            section.model_fields[part].annotation,
        )
        section = next(kind for kind in kinds if isinstance(kind, type))
    return list(section.model_fields)


def _expected(error: Mapping[str, Any]) -> str:
    """What pydantic expected, in words of the recipe."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        return f"one of {str(context['expected']).replace(' or ', ', ')}"
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(context["pattern"], f"text like {context['pattern']}")
    if kind in _WORDS:
        return _WORDS[kind]
    if kind in _LIMITS:
        words, name = _LIMITS[kind]
        return words.format(f"{context[name]:g}")
    message = str(error["msg"])
    message = message.removeprefix("Input should be ").removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _yaml_words(given: Any, shown: str) -> str:
    """A value as the file has it."""
    if isinstance(given, bool):
        return str(given).lower()
    if isinstance(given, dict):
        return "fields"
    if isinstance(given, tuple):
        return "a list" if given else "an empty list"
    return shown
