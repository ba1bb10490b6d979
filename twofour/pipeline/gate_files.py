"""The gate for continuous integration: JUnit XML, and a summary in Markdown.

    RUN/gate.xml    a test case for each check; what is shut is a failure, with its text
    RUN/gate.md     the same as a table: for $GITHUB_STEP_SUMMARY, or a comment

There is no standard for JUnit XML. This keeps to what the stricter of its readers ask for (Ant's
schema, which Jenkins, GitLab and the GitHub actions read as well): each attribute there, times as
decimals, the date without a zone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

from twofour.core.errors import InputError
from twofour.core.outcome import FAILED, PASSED, UNDECIDED, Check
from twofour.core.writing import write_whole
from twofour.pipeline.gate import is_open, verdict_of
from twofour.pipeline.gate_text import quantity

XML, MARKDOWN = "gate.xml", "gate.md"
_SUITE = "twofour.gate"
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SIGNS = {PASSED: "✅ passed", FAILED: "❌ failed", UNDECIDED: "❔ undecided"}
_MARKED = re.compile(r"([\\`*_{}\[\]<>()#|!~])")


@dataclass(frozen=True)
class Heading:
    """What stands above the checks.

    Attributes:
        name: of the recipe.
        created: when the gate judged, ISO 8601; UTC where it names no zone.
        seconds: that it took to measure.
        properties: what else is to be known, name -> value: CPU, threads, seed, version.
        undecided_passes: as the recipe says.
    """

    name: str
    created: str
    seconds: float = 0.0
    properties: Mapping[str, str] = field(default_factory=dict)
    undecided_passes: bool = False


def write_gate(folder: Path, checks: Sequence[Check], heading: Heading) -> tuple[Path, Path]:
    """Writes both files, each whole or not at all.

    Returns:
        The XML file, the Markdown file.

    Raises:
        InputError: the folder cannot be written.
    """
    xml, markdown = folder / XML, folder / MARKDOWN
    try:
        write_whole(xml, junit(checks, heading))
        write_whole(markdown, summary(checks, heading).encode("utf-8", "replace"))
    except OSError as e:
        raise InputError(
            f"cannot write the gate's files to {folder}", [str(e)], "choose a writable folder"
        ) from e
    return xml, markdown


def junit(checks: Sequence[Check], heading: Heading) -> bytes:
    """One test suite, a test case for each check. What passes has its text in `system-out`."""
    shut = sum(not is_open([check], heading.undecided_passes) for check in checks)
    skipped = sum(check.verdict == UNDECIDED for check in checks) * heading.undecided_passes
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        {
            "name": _clean(heading.name) or _SUITE,
            "package": _SUITE,
            "id": "0",
            "timestamp": _without_zone(heading.created),
            "hostname": "localhost",
            "tests": str(len(checks)),
            "failures": str(shut),
            "errors": "0",
            "skipped": str(skipped),
            "time": f"{heading.seconds:.3f}",
        },
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(checks, heading).items():
        ElementTree.SubElement(properties, "property", name=_clean(name), value=_clean(value))
    for check in checks:
        _test_case(suite, check, heading.undecided_passes)
    lines = [f"{check.verdict}: {check.name}: {check.text}" for check in checks]
    ElementTree.SubElement(suite, "system-out").text = _clean("\n".join(lines))
    ElementTree.SubElement(suite, "system-err")
    ElementTree.indent(root)
    found: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return found + b"\n"


def summary(checks: Sequence[Check], heading: Heading) -> str:
    """A heading with the verdict, a table, what was asked and found, and the surroundings."""
    rows = ["| | check | found | interval | limit |", "|---|---|--:|--:|--:|"]
    for check in checks:
        ends = "none"
        if check.low is not None and check.high is not None:
            ends = f"{quantity(check.low, check.unit)} to {quantity(check.high, check.unit)}"
        found, limit = (quantity(each, check.unit) for each in (check.value, check.limit))
        sign = "at least " if check.unit == "x" else "at most "
        cells = [_SIGNS[check.verdict], check.name, found, ends, sign + limit]
        rows.append(f"| {' | '.join(cells)} |")
    texts = [f"- **{check.name}**: {_plain(check.text)}" for check in checks]
    known = [f"{_plain(name)}: {_plain(value)}" for name, value in heading.properties.items()]
    table = ["", *rows, "", *texts] if checks else ["", "No limit was set."]
    foot = ["", f"<sub>{'; '.join(known)}</sub>"] if known else []
    return "\n".join([f"## {_title(checks, heading)}", *table, *foot, ""])


def _title(checks: Sequence[Check], heading: Heading) -> str:
    verdict = verdict_of(checks)
    state = "open" if is_open(checks, heading.undecided_passes) else "shut"
    return f"{_plain(heading.name)}: the gate is {state}{f' ({verdict})' if verdict else ''}"


def _test_case(suite: ElementTree.Element, check: Check, undecided_passes: bool) -> None:
    case = ElementTree.SubElement(
        suite, "testcase", classname=_SUITE, name=_clean(check.name), time="0"
    )
    if check.verdict == PASSED:
        return
    message, _, more = _clean(check.text).partition("; ")
    if check.verdict == UNDECIDED and undecided_passes:
        ElementTree.SubElement(case, "skipped", message=f"undecided: {message}")
        return
    failure = ElementTree.SubElement(case, "failure", type=check.verdict, message=message)
    failure.text = f"{message}\n{more}"


def _properties(checks: Sequence[Check], heading: Heading) -> dict[str, str]:
    found = {"verdict": verdict_of(checks), **heading.properties}
    for check in checks:
        ends = {"value": check.value, "low": check.low, "high": check.high, "limit": check.limit}
        known = {key: f"{end:.6g}" for key, end in ends.items() if end is not None}
        unit = {"unit": check.unit} if check.unit else {}
        found |= {f"{check.name}.{key}": value for key, value in {**known, **unit}.items()}
    return found


def _without_zone(created: str) -> str:
    """2026-01-31T12:00:00, in UTC."""
    try:
        when = datetime.fromisoformat(created)
    except ValueError as e:
        raise InputError("bad date of a run", [f"expected ISO 8601, got {created!r}"]) from e
    if when.tzinfo is not None:
        when = when.astimezone(UTC)
    return when.replace(tzinfo=None, microsecond=0).isoformat()


def _clean(text: str) -> str:
    """Without what XML cannot hold."""
    return _NO_XML.sub("?", text)


def _plain(text: str) -> str:
    """Text in one line that Markdown does not read as its own."""
    return _MARKED.sub(r"\\\1", " ".join(_clean(text).split()))
