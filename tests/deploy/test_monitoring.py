"""Prometheus rules and the Grafana dashboard: PromQL that parses, metrics that the server has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from twofour.serve.metrics import Metrics
from twofour.serve.models.tally import Tally
from twofour.serve.readings import ServerReading, VersionReading
from twofour.serve.totals import Totals

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
OTHERS = {"up", "process_resident_memory_bytes"}  # Prometheus' own, and its client library's
TARGET_LABELS = {"job", "instance", "pod", "le"}


def dashboard_expressions() -> list[str]:
    expressions = [target["expr"] for panel in PANELS for target in panel["targets"]]
    return [each.replace("$__rate_interval", "1m") for each in expressions]


EXPRESSIONS = [rule["expr"] for rule in RULES] + dashboard_expressions()


def exposed() -> dict[str, set[str]]:
    """Every sample that /metrics has, and its labels."""
    reading = VersionReading("m", "1", Tally(), queue_length=1, instances=1)
    server = ServerReading("s", "1", True, versions=[reading], swaps={"m": 1})
    found: dict[str, set[str]] = {}
    for metric in Metrics(lambda: server, Totals()).collect():
        for sample in metric.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def selectors(expression: str) -> list[tuple[str, set[str]]]:
    """Metrics of an expression, and the labels that it asks them for."""
    found = re.findall(r"\b((?:twofour|process)_\w+|up)\b(?:\{([^}]*)\})?", expression)
    return [(name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inner))) for name, inner in found]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_it_parses_and_asks_for_what_there_is(expression: str) -> None:
    promql_parser.parse(expression)
    metrics = exposed()
    asked = selectors(expression)
    assert asked, "an expression without a metric"
    for name, labels in asked:
        assert name in metrics.keys() | OTHERS, f"/metrics has no {name}"
        assert labels <= metrics.get(name, set()) | TARGET_LABELS, f"{name} has no such label"
    grouped = {
        label
        for inner in re.findall(r"by \(([^)]*)\)", expression)
        for label in re.findall(r"\w+", inner)
    }
    known = set().union(*(metrics.get(name, set()) for name, _ in asked))
    assert grouped <= known | TARGET_LABELS


@pytest.mark.parametrize("broken", ["rate(twofour_requests_total[5m]", "sum by (x twofour_ready)"])
def test_the_parser_finds_what_is_wrong(broken: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        promql_parser.parse(broken)


def test_metrics_that_are_not_there_are_found() -> None:
    assert [name for name, _ in selectors("rate(twofour_nothing_total[1m])")] == [
        "twofour_nothing_total"
    ]
    assert "twofour_nothing_total" not in exposed()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_say_what_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "action"}
    assert re.fullmatch(r"\d+[smh]", rule["for"])


def test_prometheus_reads_the_rules_and_scrapes_the_servers_path() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    assert all((DEPLOY / name).is_file() for name in config["rule_files"])
    names = [job["job_name"] for job in config["scrape_configs"]]
    assert all(re.fullmatch("twofour.*", name) for name in names)  # as the alerts select them
    assert len(set(names)) == len(names)
    assert config["scrape_configs"][0]["metrics_path"] == "/metrics"


def test_panels_lie_beside_each_other_and_say_what_they_show() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        own = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not own & cells, panel["title"]
        cells |= own
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)


def test_variables_are_defined_and_used() -> None:
    defined = {each["name"] for each in DASHBOARD["templating"]["list"]}
    text = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    used = set(re.findall(r"\$(?!__)(\w+)", text))
    assert used | {"datasource"} == defined
    for each in DASHBOARD["templating"]["list"]:
        if each["type"] == "query":
            (query,) = re.findall(r"label_values\((.*), \w+\)", each["definition"])
            ((name, labels),) = selectors(query)
            assert labels <= exposed()[name]
