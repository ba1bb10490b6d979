"""The command line as a user meets it: real processes, exit codes, stdout and stderr apart."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.sample_engines import sample_engine
from twofour.cli import app
from twofour.cli.options import parse_size
from twofour.cli.output import Output, command
from twofour.core.errors import GateError, InputError

COMMANDS = (
    "demo",
    "doctor",
    "inspect",
    "prune",
    "quantize",
    "build",
    "explain",
    "run",
    "bench",
)


def twofour(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from twofour.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,  # type: ignore[call-overload]
    )


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return sample_engine().save(tmp_path / "e.engine")


def test_help_lists_the_commands() -> None:
    result = twofour("--help")
    assert result.returncode == 0
    for name in COMMANDS:
        assert f" {name} " in result.stdout
    assert "..." not in result.stdout.partition("Commands:")[2], "a first sentence is short"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_has_an_example(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert f"Example: twofour {name}" in result.stdout
    assert "--json" in result.stdout
    assert "--quiet" in result.stdout
    examples = [line for line in result.stdout.splitlines() if "Example:" in line]
    assert all(line.count("Example:") == 1 for line in examples), "an example is a line"


def test_version() -> None:
    assert twofour("--version").stdout == "twofour 0.1.0\n"


@pytest.mark.parametrize("arguments", [["nonsense"], ["explain"], ["explain", "a", "--what"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = twofour(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr


def test_an_error_is_one_message_on_stderr(tmp_path: Path) -> None:
    result = twofour("explain", tmp_path / "none.engine")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("InputError: no engine at")
    assert "fix:" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_error_with_json_is_on_stdout_too(tmp_path: Path) -> None:
    result = twofour("explain", tmp_path / "none.engine", "--json")
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "InputError"
    assert error["fix"].startswith("build one")
    assert result.returncode == 2


def test_starting_imports_nothing_heavy() -> None:
    code = (
        "import sys, twofour.cli; "
        "heavy = {'numpy', 'onnx', 'torch', 'llvmlite', 'onnxruntime', 'sklearn'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_a_reader_that_leaves_is_no_error(engine: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-c", "from twofour.cli import main; main()", "explain", str(engine)],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writing)
    assert result.stderr == ""
    assert result.returncode == 141


def test_an_interrupt_is_exit_code_130() -> None:
    code = (
        "import time, typer\n"
        "from twofour.cli.output import command\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "@command\n"
        "def wait() -> None:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(30)\n"
        "app()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell lets what it runs in the background ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "interrupted\n"


def test_exit_codes_come_from_the_class_and_bugs_keep_their_trace() -> None:
    import typer

    def closed() -> None:
        raise GateError("the gate is closed")

    def wrong() -> None:
        raise InputError("no such file")

    def bug() -> None:
        raise ZeroDivisionError

    for function, code in ((closed, 1), (wrong, 2)):
        with pytest.raises(typer.Exit) as ended:
            command(function)()
        assert ended.value.exit_code == code
    with pytest.raises(ZeroDivisionError):
        command(bug)()


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("65536", 65536), ("64k", 65536), ("1M", 1 << 20), ("2G", 2 << 30)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "1.5M", "-1", "1 M", "1m", "1T"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="bad size"):
        parse_size(text)


def test_wrong_usage_with_json_is_one_document() -> None:
    result = twofour("explain", "--json")
    assert result.returncode == 2
    document = json.loads(result.stdout)
    assert document["schema"] == "twofour.error/1"
    assert document["error"]["type"] == "UsageError"
    assert "engine" in document["error"]["what"].lower()
    assert "Missing argument" in result.stderr


def test_numbers_that_json_has_not_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).data("x/1", {"a": [float("inf"), 1.5], "b": {"c": float("nan")}})
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed == {"schema": "twofour.x/1", "a": [None, 1.5], "b": {"c": None}}


def test_a_check_that_failed_after_the_results_prints_no_second_document(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import typer

    out = Output(as_json=True)
    out.data("x/1", {})
    with pytest.raises(typer.Exit) as ended:
        out.fail("the gate is shut")
    assert ended.value.exit_code == 1
    said = capsys.readouterr()
    assert json.loads(said.out) == {"schema": "twofour.x/1"}
    assert said.err == "the gate is shut\n"


def test_a_terminal_of_few_characters(engine: Path) -> None:
    """ASCII has no ±: what it lacks becomes ?, and the command goes on."""
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = twofour("explain", engine, env=ascii_only)
    assert result.returncode == 0, result.stderr
    assert "layer1.0.conv1" in result.stdout
    assert result.stdout.isascii()


def test_long_lines_hang_below_their_begin() -> None:
    text = "- why\n  " + ", ".join(f"layer{i}" for i in range(12))
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "40")
        Output().show(text, "a very long sentence that goes on beyond the end of its line")
    first, *lines = printed.getvalue().splitlines()
    assert first == "- why"
    assert all(line.startswith("  layer") for line in lines[:-2])
    assert lines[-1] == "the end of its line"
    assert max(map(len, lines)) <= 40
