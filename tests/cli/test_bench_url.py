"""twofour bench --url: the table fits, the document has its structure, errors say what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests.bench.load.fake import Mood, fake_server
from tests.bench.load.fake_grpc import fake_grpc
from tests.cli.structure import compare, structure
from twofour.cli import app

QUICK = ("--duration", "0.3", "--warm-up", "0", "--timeout", "2")
MAPS = ("results[].inputs", "results[].errors", "results[].words")


def twofour(*arguments: str | Path, width: int | None = None) -> Result:
    columns = {"COLUMNS": str(width) if width else None}
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)], env=columns)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with fake_server() as (url, _):
        yield url


@pytest.fixture
def busy() -> Iterator[str]:
    """Every third answer is a 503, once the requests were tried."""
    with fake_server(Mood(status=lambda n: 503 if n > 8 and n % 3 == 0 else 200)) as (url, _):
        yield url


def test_the_documents_structure(
    url: str, busy: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    saved, trace = tmp_path / "load.json", tmp_path / "trace.csv"
    np.savetxt(trace, np.arange(30) / 100)
    failing = fake_server(Mood(status=lambda n: 500 if n >= 8 else 200, statistics=False))
    with fake_grpc() as other, failing as (silent, _):
        calls = (
            ("--url", url, "--model", "double", "--save", saved),
            ("--url", url, "--url", busy, "--model", "double", "--rate", "100"),
            ("--url", other, "--model", "double:1", "--arrivals", trace),
            ("--url", silent, "--model", "double"),
        )
        found = [json.loads(twofour(*each, *QUICK, "--json").stdout) for each in calls]
    assert [each["schema"] for each in found] == ["twofour.bench.url/1"] * 4
    assert json.loads(saved.read_text()) == found[0]
    closed, open_, traced, _ = (each["load"] for each in found)
    assert (closed["loop"], closed["concurrency"], closed["rate"]) == ("closed", 1, None)
    assert (open_["loop"], open_["arrivals"], open_["rate"]) == ("open", "poisson", 100.0)
    assert (traced["arrivals"], found[2]["results"][0]["answered"]) == ("trace", 30)
    update = request.config.getoption("--update-golden")
    compare("bench.url/1", [structure(each, MAPS) for each in found], update=update)


@pytest.mark.parametrize("width", [None, 80])
def test_what_is_printed_fits(url: str, busy: str, width: int | None) -> None:
    result = twofour("--url", url, "--url", busy, "--model", "double", *QUICK, width=width)
    assert result.exit_code == 0, result.output
    assert max(len(line) for line in result.stdout.splitlines()) <= (width or 100)
    said = " ".join(result.stdout.split())
    assert "1 caller, with one request open (closed loop)" in said
    assert "by its own account a request waits 50.0 us, computes 20.0 us" in said
    assert "times 503 (busy): status 503, on purpose" in said
    assert "times as many" in said


def test_options_reach_the_server(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 4), np.float32))
    with fake_server() as (url, fake):
        where = ("--url", url, "--model", "double", "--header", "X-A: b", "--tensors", "json")
        result = twofour(*where, "--input", f"x={tmp_path / 'x.npy'}", *QUICK)
    assert result.exit_code == 0, result.output
    assert {each["x-a"] for each in fake.seen.headers} == {"b"}
    assert {each["content-type"] for each in fake.seen.headers} == {"application/json"}
    assert set(fake.seen.shapes) == {(2, 4)}


def test_a_server_that_answers_nothing_fails() -> None:
    with fake_server(Mood(status=lambda n: 500 if n >= 8 else 200)) as (url, _):
        result = twofour("--url", url, "--model", "double", *QUICK)
    assert result.exit_code == 1
    assert "answered nothing" in result.stderr
    assert "500: status 500, on purpose" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--url", "URL"), "which model"),
        (("--url", "URL", "--model", "none"), "no metadata of model 'none'"),
        (("--url", "URL", "--model", "double", "--shapes", "x:1x5"), "cannot have shape 1x5"),
        (("--url", "nonsense", "--model", "double"), "bad --url"),
        (("--url", "URL", "--model", "double", "--header", "a"), "bad --header"),
        (("--url", "URL", "--model", "double", "--header", "a: b\nc: d"), "bad --header"),
        (("--url", "URL", "--model", "double", "--tensors", "xml"), "bad --tensors"),
        (("--url", "URL", "--model", "double", "--rate", "0"), "--rate 0.0"),
        (("--url", "URL", "--model", "double", "--duration", "0"), "--duration 0.0"),
        (("--url", "URL", "--model", "double", "--arrivals", "constant"), "do not go together"),
        (("--url", "URL", "--model", "double", "--arrivals", "none.csv"), "cannot read the trace"),
        (("--url", "URL", "--model", "double", "--vs", "openvino"), "--vs was given beside --url"),
        (("--url", "URL", "--model", "double", "--baseline", "b.json"), "--baseline was given"),
        (("a.engine", "--rate", "5"), "--rate"),
        (("a.engine", "--warm-up", "5", "--header", "a: b"), "--warm-up, --header"),
        (("a.engine", "--model", "a.onnx", "--model", "b.onnx"), "several --model"),
    ],
)
def test_wrong_usage_is_told(arguments: tuple[str, ...], message: str, url: str) -> None:
    result = twofour(*(url if each == "URL" else each for each in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "fix:" in result.stderr or "got" in result.stderr
