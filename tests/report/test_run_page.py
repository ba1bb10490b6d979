"""The page of a run: whatever of it there is, with any names and numbers, in one safe file."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.report import sample_runs
from tests.report.sample_runs import HOSTILE, hostile, many_layers, plain, sample_run
from tests.report.test_quantize_page import found as quantized
from tests.report.test_quantize_page import tensor
from tests.report.test_sensitivity_page import Page
from twofour.compiler.outline import Outline
from twofour.core.errors import InputError
from twofour.core.outcome import Artifact, Cell, Check, Edge, Figure, LayerRow, Outcome, Point
from twofour.report import quantities
from twofour.report.charts import last_parts
from twofour.report.outcomes import read_outcome
from twofour.report.run import run_page, write_run


def layer(name: str, time_us: float | None = 1.0, **more: Any) -> LayerRow:
    values = {"op": "QConv", "shape": "16x8x8 -> 16x8x8", "precision": "int8", "pattern": "2:4",
              "choice": "2:4 H 7x4", "reason": "", "time_us": time_us, "share": 0.25,
              "dense_us": 1.5, "sparse_us": 1.0}  # fmt: skip
    return LayerRow(name=name, **(values | more))


def chain(*rows: LayerRow) -> Outline:
    edges = [Edge(k, k + 1, f"t{k}") for k in range(len(rows) - 1)]
    return Outline(rows, (Edge(-1, 0, "x"), *edges, Edge(len(rows) - 1, -1, "y")))


SMALL = sample_run(
    (
        chain(
            layer("conv1", choice="dense 14x2", sparse_us=None, share=0.25),
            layer("conv2", 4.0, share=0.5, float_us=9.0, roofline=0.61),
            layer("softmax", 2.0, choice="onnxruntime", pattern="", precision="float32"),
        ),
        {
            "quantize": quantized(*(tensor(f"t{k}", 30.0 + k) for k in range(20))),
            "sensitivity": sample_runs.scanned(["conv1", "conv2", "conv3"]),
        },
    )
)


def texts(outcome: Outcome | dict[str, Any]) -> str:
    """All texts of its page, spaces as they are."""
    document = outcome if isinstance(outcome, dict) else plain(outcome)
    page = Page(run_page(document))
    assert page.open == []
    return " ".join(filter(None, page.texts)).replace("\u00a0", " ").replace("\u2060", "")


def test_a_whole_run_is_one_file_that_needs_nothing_else() -> None:
    text = run_page(plain(SMALL))
    page = Page(text)
    assert page.open == []
    assert "://" not in text
    assert all(link.startswith("#") or link == "data:," for link in page.links)
    assert re.findall(r"@import|url\((?!#)", text) == []
    parts = re.findall(r'<section id="(\w+)"', text)
    assert parts == ["verdict", "notes", "plot", "networks", "layers", "graphs", "sensitivity",
                     "quantization", "stages", "lineage", "environment"]  # fmt: skip
    assert re.findall(r"<nav.*?</nav>", text, re.S)[0].count("<a ") == len(parts)


EXPECTED = (
    *("Passed", "every limit of the gate holds", "91.26 %", "3.12\u00d7", "41.2 \u00b5s"),
    *("0.31 points", "(\u22120.05 to 0.68)", ", asked for: at most 1.5 points", "83.1 MB"),
    *("asked for: at least 1.5\u00d7", "at most 200 MB", "40.8 \u00b5s to 41.8 \u00b5s"),
    *("0.677\u00d7 of dense", "184 kB", "90.70 to 91.80", "unavailable", "3 min 08 s", "reused"),
    *("267 kB", "AVX-512", "twofour pipeline recipes/resnet20.yaml", "2.13.0", "4.00 \u00b5s"),
    *("61.0 %", "9.00 \u00b5s"),
)


def test_every_figure_is_there_with_its_unit() -> None:
    said = texts(SMALL)
    for part in EXPECTED:
        assert part in said, part


def test_each_layer_is_a_row_and_a_node() -> None:
    text = run_page(plain(SMALL))
    assert len(re.findall(r'<tr id="layer-\d+">', text)) == 3
    assert [int(k) for k in re.findall(r'class="node [^"]*"[^>]*data-row="(\d)"', text)] == [
        0,
        1,
        2,
    ]
    kinds = re.findall(r'class="node (\w+) (\w*)"', text)
    assert kinds == [("input", ""), ("dense", "int8"), ("sparse", "int8"), ("outside", "outside"),
                     ("output", "")]  # fmt: skip
    assert len(re.findall(r'data-ends="', text)) == 4


def test_a_cell_that_was_not_made_says_why() -> None:
    cells = (
        Cell("dense", "float32", Figure(91.0), 100.0),
        Cell("2:4", "QAT", note="no training data"),
    )
    said = texts(dataclasses.replace(SMALL, cells=cells))
    assert "2:4 QAT no training data" in said
    silent = texts(dataclasses.replace(SMALL, cells=(cells[0], Cell("2:4", "PTQ"))))
    assert "2:4 PTQ not made" in silent


def test_joules_are_shown_where_they_were_measured() -> None:
    cells = (dataclasses.replace(SMALL.cells[0], joules=0.00213), *SMALL.cells[1:])
    said = texts(dataclasses.replace(SMALL, cells=cells))
    assert "2.13 mJ" in said
    assert "shows no counter for it" not in said


@pytest.mark.parametrize(
    ("verdict", "word"), [("passed", "Passed"), ("failed", "Failed"), ("undecided", "Undecided")]
)
def test_the_verdict_stands_on_top(verdict: str, word: str) -> None:
    text = run_page(plain(dataclasses.replace(SMALL, verdict=verdict)))
    assert f'class="verdict {verdict}"' in text
    assert text.index(f"<b>{word}</b>") < text.index('id="plot"')


def places(check: Check) -> tuple[float, float, float, float]:
    """Value, limit, and where the allowed side begins and ends."""
    text = run_page(plain(Outcome("", "", "passed", (check,), None, *[()] * 6, SMALL.surroundings)))
    plot = re.findall(r'<svg viewBox="0 0 360 58".*?</svg>', text, re.S)[0]
    (value,) = re.findall(r'class="found \w+" cx="([\d.]+)"', plot)
    (limit,) = re.findall(r'class="limit" x1="([\d.]+)"', plot)
    ((left, width),) = re.findall(r'class="allowed" x="([\d.]+)" y="8" width="([\d.]+)"', plot)
    return float(value), float(limit), float(left), float(left) + float(width)


@pytest.mark.parametrize("unit", ["points", "x", "bytes", ""])
@pytest.mark.parametrize(("value", "limit"), [(1.0, 2.0), (2.0, 1.0), (1e-9, 5e8), (3.0, 3.0)])
@pytest.mark.parametrize("name", ["accuracy", "speed", "memory", "size"])
def test_what_passed_lies_on_the_allowed_side(
    name: str, value: float, limit: float, unit: str
) -> None:
    more = name == "speed" or (name == "size" and value > limit)
    passed = value >= limit if more else value <= limit
    check = Check(name, "passed" if passed else "failed", value, None, None, limit, unit, "")
    at, edge, left, right = places(check)
    assert (left <= at <= right) == passed
    assert edge in (pytest.approx(left), pytest.approx(right))


def test_networks_are_drawn_where_they_are() -> None:
    """A faster one is further left, a better one further up; the gate's limits divide the plot."""
    text = run_page(plain(SMALL))
    plot = re.findall(r'<figure class="wide plot">.*?</figure>', text, re.S)[0]
    spot = re.findall(
        r'<g class="net (\w+)".*?<title>(.*?): ([\d.]+).%.*?, ([\d.]+).*?</title>', plot
    )
    assert len(spot) == len(SMALL.points)
    (x, y, width, height) = map(float, re.findall(
        r'class="allowed" x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', plot)[0])  # fmt: skip
    (cx, cy) = map(float, re.findall(r'candidate".*?cx="(.*?)" cy="(.*?)"', plot, re.S)[0])
    assert x < cx < x + width
    assert y < cy < y + height
    (bx, _) = map(
        float, re.findall(r'baseline".*?<rect class="dot" x="(.*?)" y="(.*?)"', plot, re.S)[0]
    )
    assert bx > x + width, "the baseline is not 1.5 times as fast as itself"


def test_latencies_far_apart_are_drawn_on_a_logarithmic_axis() -> None:
    near = [Point(f"p{us}", "peer", Figure(90.0), us) for us in (10.0, 20.0)]
    far = [*near, Point("slow", "peer", Figure(89.0), 5000.0)]
    for points, logarithmic in ((near, False), (far, True)):
        said = texts(dataclasses.replace(SMALL, points=tuple(points)))
        assert ("logarithmic" in said) == logarithmic


def test_a_scan_is_a_heat_map() -> None:
    document = sample_runs.scanned(["first", "a", "b"])
    document["cases"] = [
        {**case, "drop": drop, "drop_error": 0.1}
        for case, drop in zip(document["cases"][:2], (2.0, 0.15), strict=True)
    ]
    text = run_page({"documents": {"sensitivity": document}})
    cells = re.findall(r'<td class="(\w+)" style="--heat: ([\d.]+)%".*?>(.*?)</td>', text)
    assert cells == [("sure", "62.0", "+2.00"), *[("none", "0.0", "\u2013")] * 2,
                     ("chance", "17.0", "+0.15"), *[("none", "0.0", "\u2013")] * 2,
                     *[("none", "0.0", "\u2013")] * 3]  # fmt: skip
    assert text.count("not a multiple of 4") == 3


def test_a_search_is_a_heat_map_where_there_is_no_scan() -> None:
    units = [
        {"name": "a", "drops": {"2:4": 0.5, "int8": None}},
        {"name": "b", "drops": {"2:4": 1.0}},
    ]
    document = {"metric": "top1", "unit": "%", "dense": 91.0, "samples": 500, "units": units}
    said = texts({"documents": {"search": document}})
    assert "layer 2:4 int8 a +0.50 no number b +1.00 \u2013" in said


@pytest.mark.parametrize("name", ["sensitivity", "quantize", "search"])
@pytest.mark.parametrize("document", [3, [], "text", {"cases": 4, "quality": 5, "units": "x"},
                                      {"quality": {"tensors": [7]}, "cases": [{"drop": "much"}],
                                       "units": [{"drops": [1]}]}])  # fmt: skip
def test_another_document_that_cannot_be_read_says_so(name: str, document: Any) -> None:
    said = texts({"documents": {name: document}})
    assert f"The document of {name} in this run cannot be shown" in said


def test_hostile_names_are_texts() -> None:
    text = run_page(hostile(SMALL))
    page = Page(text)
    assert page.open == []
    assert page.tags.count("script") == 3  # the page's own
    assert page.tags.count("img") == 0
    assert HOSTILE not in text
    assert "<script>alert" not in text
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", text)[0]
    handlers = [name for name, _ in re.findall(r"<\w+[^>]*?\s(on\w+)=(\"|')", text)]
    assert handlers == []


ODD = ("a" * 10_000, "\U0001f600" * 500, "\u0645\u0631\u062d\u0628\u0627" * 99, "a.b/c;" * 800,
       "\ud800", "\x00\x1b[31m", " ", "")  # fmt: skip


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_odd_names_leave_the_page_whole(name: str) -> None:
    run = sample_run((chain(layer(name), layer(name, reason=name)), {}))
    text = run_page(hostile(run, name))
    assert Page(text).open == []
    text.encode()
    shown = re.findall(r'class="title"[^>]*>([^<]*)<', text)
    assert max(map(len, shown)) <= 40


def test_two_thousand_layers() -> None:
    run = many_layers(SMALL, 2000)
    text = run_page(plain(run))
    assert Page(text).open == []
    assert text.count('<tr id="layer-') == 2000
    assert text.count('<g id="node-') == 2000
    assert len(text) < 4_000_000
    many = texts(many_layers(SMALL, 4001))
    assert "4,001 layers are too many to draw" in many


def test_what_led_to_the_engine_is_drawn() -> None:
    """Neither the recipe, which nothing was made from, nor the figures that the engine gave."""
    text = run_page(plain(SMALL))
    drawing = re.findall(r'<svg class="made".*?</svg>', text, re.S)[0]
    drawn = {int(k) for k in re.findall(r'href="#artifact-(\d+)"', drawing)}
    paths = {SMALL.artifacts[place].path.rpartition("/")[2] for place in drawn}
    assert paths == {"resnet20.pt", "cifar10-train.npz", "masks.npz", "sparse.pt", "qat.pt",
                     "model.onnx", "cpu.engine"}  # fmt: skip
    assert drawing.count("<path d=") - 1 == sum(  # the head of the arrows is a path, too
        len(each.made_from) for place, each in enumerate(SMALL.artifacts) if place in drawn
    )
    for link in re.findall(r'href="#(artifact-\d+)"', text):
        assert f'<tr id="{link}">' in text
    assert "masks.npz of sparsify" in texts(SMALL)


def test_files_made_from_each_other_in_a_circle_are_listed() -> None:
    circle = tuple(
        Artifact(f"f{k}", "engine", "ab", 1, "build", (f"f{(k + 1) % 3}", "gone")) for k in range(3)
    )
    said = texts(dataclasses.replace(SMALL, artifacts=circle))
    assert said.count("gone") == 3


def test_an_engine_that_does_not_know_its_edges_says_so() -> None:
    said = texts(dataclasses.replace(SMALL, edges=()))
    assert "The engine does not say what its layers read" in said


def test_nothing_at_all_is_a_page() -> None:
    assert "has not got to anything that can be shown" in texts({})
    assert "has no gate" in texts({"notes": ["a note"]})


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Outcome)])
def test_each_part_may_be_missing_or_null(field: str) -> None:
    document = plain(SMALL)
    without = {key: value for key, value in document.items() if key != field}
    assert texts(without) == texts(without | {field: None})


def test_what_is_no_run_is_refused() -> None:
    with pytest.raises(InputError, match="no record of a run") as caught:
        run_page({"layers": [{"name": 3}]})
    assert "run.layers[0].name: expected str, got 3" in str(caught.value)


def test_numbers_that_json_cannot_spell() -> None:
    document = plain(SMALL)
    document["checks"][0] |= {"value": None, "low": None}
    document["cells"][0]["latency_us"] = None
    document["points"][0]["figure"]["value"] = None
    document["layers"][0] |= {"time_us": None, "share": None}
    said = texts(document)
    assert "no number" in said
    assert "nan" not in said.lower().replace("penance", "")


def nothing_but(words: str) -> str:
    return (
        words.replace(" ", "\u00a0")
        .replace("us", "\u00b5s")
        .replace("-", "\u2212")
        .replace("x", "\u00d7")
    )


@pytest.mark.parametrize(
    ("value", "unit", "words", "signed", "on_an_axis"),
    [
        (91.257, "%", "91.26 %", "+91.26", "91.26 %"),
        (-0.004, "points", "0.00 points", "0.00", "-0.004 points"),
        (0.005, "%", "0.01 %", "+0.01", "0.005 %"),
        (-1.5, "points", "-1.50 points", "-1.50", "-1.5 points"),
        (0.86318, "", "0.8632", "+0.8632", "0.8632"),
        (3.1, "x", "3.10x", "+3.100", "3.1x"),
        (12_340_000, "bytes", "12.3 MB", None, "12.34 MB"),
        (999.96, "us", "1.00 ms", None, "1 ms"),
        (0.0123, "us", "0.01 us", None, "0.0123 us"),
        (0.0, "us", "0 us", None, "0 us"),
        (float("nan"), "%", "", "", None),
        (float("inf"), "bytes", "", None, None),
    ],
)  # fmt: skip
def test_quantities(
    value: float, unit: str, words: str, signed: str | None, on_an_axis: str | None
) -> None:
    assert quantities.with_unit(value, unit) == nothing_but(words)
    if signed is not None:
        assert quantities.signed(value, unit) == nothing_but(signed)
    if on_an_axis is not None:
        assert quantities.rounded(value, unit) == nothing_but(on_an_axis)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (412.0, "6 min 52 s"), (7200.0, "2.0 h")],
)
def test_waiting(seconds: float, words: str) -> None:
    assert quantities.seconds(seconds) == words.replace(" ", "\u00a0")


@pytest.mark.parametrize(
    ("name", "letters", "short"),
    [
        ("layer1.0.conv1", 20, "layer1.0.conv1"),
        ("encoder.layer.11.attention.output.dense", 20, "\u2026\u2060output.dense"),
        ("a;model/conv2d_2/BiasAdd;model/conv2d_2/Conv2D", 20, "\u2026\u2060conv2d_2/Conv2D"),
        ("x" * 50, 10, "\u2026\u2060" + "x" * 9),
        ("a." + "x" * 8, 10, "a." + "x" * 8),
    ],
)
def test_long_names_keep_their_last_parts(name: str, letters: int, short: str) -> None:
    assert last_parts(name, letters) == short


FLOATS = st.floats() | st.sampled_from([0.0, -1.0, 1e308, 5e-324])
st.register_type_strategy(float, FLOATS)
EDGES = st.lists(
    st.builds(Edge, st.integers(-3, 6), st.integers(-3, 6), st.text(max_size=3)), max_size=12
)
DOCUMENTS = st.dictionaries(
    st.sampled_from(["sensitivity", "quantize", "search", "forecast"]),
    st.recursive(
        st.none() | st.integers() | FLOATS | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["cases", "quality", "tensors", "layers", "units", "drops", "left"]
                ),
                inner,
                max_size=3,
            )
        ),
        max_leaves=8,
    ),
    max_size=2,
)
OUTCOMES = st.builds(Outcome, edges=EDGES.map(tuple), documents=DOCUMENTS)


def some_of(value: Any, random: Random) -> Any:
    """The plain data without some of its keys."""
    if isinstance(value, dict):
        return {key: some_of(each, random) for key, each in value.items() if random.random() < 0.93}
    return [some_of(each, random) for each in value] if isinstance(value, list) else value


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(OUTCOMES, st.integers(0, 1 << 30))
def test_any_part_of_any_outcome_is_a_page(outcome: Outcome, seed: int) -> None:
    document = some_of(json.loads(json.dumps(dataclasses.asdict(outcome))), Random(seed))
    assert Page(run_page(document)).open == []


def test_what_is_read_is_what_was_written() -> None:
    assert read_outcome(plain(SMALL)) == SMALL


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_run(plain(SMALL), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(InputError, match="cannot write"):
        write_run(plain(SMALL), tmp_path / "none" / "report.html")


def test_the_speed_on_top_is_the_one_that_the_gate_judged() -> None:
    point = {"figure": {"value": 99.0}, "name": "n"}
    points = [
        point | {"kind": "baseline", "latency_us": 100.0},
        point | {"kind": "candidate", "latency_us": 50.0},
    ]
    check = {"name": "speed", "verdict": "passed", "value": 2.25, "limit": 1.0, "unit": "x"}
    assert "2.25\u00d7" in run_page({"points": points, "checks": [check]})
    assert "2.00\u00d7" in run_page({"points": points})
