"""JUnit XML that strict readers take, and Markdown that holds what it is given."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
import xmlschema

from twofour.core.errors import InputError
from twofour.core.outcome import FAILED, PASSED, UNDECIDED, Check
from twofour.pipeline.gate_files import Heading, junit, summary, write_gate

SCHEMA = xmlschema.XMLSchema(Path(__file__).with_name("junit.xsd"))
CREATED = "2026-03-01T13:00:00.25+01:00"

ACCURACY = Check(
    "accuracy", FAILED, 2.0, 1.6, 2.4, 1.5, "points", "top1 90.00 %, 2.00 points worse; of 1.5"
)
SPEED = Check("speed", UNDECIDED, 1.2, 1.1, 1.3, 1.2, "x", "1.20 times as fast; at least 1.2")
MEMORY = Check("memory", PASSED, 9e7, None, None, 2e8, "bytes", "90.0 MB; at most 200.0 MB")


def suite_of(content: bytes) -> ElementTree.Element:
    SCHEMA.validate(content.decode())
    (suite,) = ElementTree.fromstring(content)
    return suite


def test_a_case_for_each_check() -> None:
    heading = Heading("resnet20", CREATED, 12.3456, {"cpu": "a CPU", "seed": "0"})
    suite = suite_of(junit((ACCURACY, SPEED, MEMORY), heading))
    counts = {key: suite.get(key) for key in ("name", "tests", "failures", "errors", "skipped")}
    assert list(counts.values()) == ["resnet20", "3", "2", "0", "0"]
    assert suite.get("timestamp") == "2026-03-01T12:00:00"
    assert suite.get("time") == "12.346"
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert list(cases) == ["accuracy", "speed", "memory"]
    failure = cases["accuracy"].find("failure")
    assert failure.get("type") == FAILED
    assert failure.get("message") == "top1 90.00 %, 2.00 points worse"
    assert failure.text.endswith("of 1.5")
    assert cases["speed"].find("failure").get("type") == UNDECIDED
    assert len(cases["memory"]) == 0
    properties = {each.get("name"): each.get("value") for each in suite.iter("property")}
    assert properties["verdict"] == FAILED
    assert properties["accuracy.high"] == "2.4"
    assert properties["cpu"] == "a CPU"
    assert "memory.low" not in properties
    assert "90.0 MB; at most 200.0 MB" in suite.find("system-out").text


def test_undecided_may_pass() -> None:
    suite = suite_of(junit((SPEED, MEMORY), Heading("a", CREATED, undecided_passes=True)))
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")
    assert [case.find("skipped") is not None for case in suite.iter("testcase")] == [True, False]


def test_without_checks_it_is_valid_too() -> None:
    suite = suite_of(junit((), Heading("a", CREATED)))
    assert suite.get("tests") == "0"
    assert "No limit was set." in summary((), Heading("a", CREATED))


@pytest.mark.parametrize("name", ["", "a\x00b\x1b[31m", "<&\"'>", "né|`*_", "\ud800", "two\nlines"])
def test_any_text_can_be_told(name: str) -> None:
    check = Check("accuracy", FAILED, 2.0, None, None, 1.5, "", f"{name} worse; {name}")
    heading = Heading(name, CREATED, properties={"key": name, "other": "x"})
    suite = suite_of(junit((check,), heading))
    assert suite.find("testcase/failure").text.count("worse") == 1
    lines = summary((check,), heading).splitlines()
    (row,) = [line for line in lines if line.startswith("| ❌")]
    assert row.count("|") == 6


def test_the_schema_refuses_what_it_should() -> None:
    """So it is the schema that holds the file to its form."""
    good = junit((ACCURACY, MEMORY), Heading("a", CREATED)).decode()
    SCHEMA.validate(good)
    for before, after in (
        (' hostname="localhost"', ""),
        ("2026-03-01T12:00:00", "2026-03-01T12:00:00Z"),
        (' type="failed"', ""),
        ("<system-err />", ""),
        ('time="0"', 'time="1,2"'),
        ("<properties>", "<properties><x />"),
    ):
        assert before in good
        with pytest.raises(xmlschema.XMLSchemaValidationError):
            SCHEMA.validate(good.replace(before, after, 1))


def test_the_summary() -> None:
    text = summary(
        (ACCURACY, SPEED, MEMORY), Heading("resnet20", CREATED, properties={"seed": "0"})
    )
    assert text.splitlines()[0] == "## resnet20: the gate is shut (failed)"
    assert (
        "| ❌ failed | accuracy | 2.00 points | 1.60 points to 2.40 points | at most 1.50 points |"
        in text
    )
    assert "| ❔ undecided | speed | 1.200x | 1.100x to 1.300x | at least 1.200x |" in text
    assert "| ✅ passed | memory | 90.0 MB | none | at most 200.0 MB |" in text
    assert "<sub>seed: 0</sub>" in text
    opened = summary((SPEED,), Heading("a", CREATED, undecided_passes=True))
    assert opened.startswith("## a: the gate is open (undecided)")


def test_both_files_are_written_whole(tmp_path: Path) -> None:
    xml, markdown = write_gate(tmp_path, (ACCURACY,), Heading("a", CREATED))
    SCHEMA.validate(xml)
    assert markdown.read_text().startswith("## a: the gate is shut")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gate.md", "gate.xml"]
    with pytest.raises(InputError, match="cannot write the gate's files"):
        write_gate(tmp_path / "none", (ACCURACY,), Heading("a", CREATED))


def test_a_date_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ISO 8601"):
        junit((), Heading("a", "yesterday"))
