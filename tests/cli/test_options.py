"""Options are called what their parameters are, whichever typer is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args, get_type_hints

import pytest
import typer
from typer.models import OptionInfo
from typer.testing import CliRunner

from twofour.cli import app, registry

OTHERWISE = {"as_json": "--json", "inputs": "--input", "every": "--all", "again": "--from"}
"""Parameters whose own name is no good in Python, or none for people."""


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """What each command is called, and it."""
    command = typer.main.get_command(app) if command is None else command
    if path:
        yield " ".join(path), command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


def functions() -> list[Callable[..., Any]]:
    known = (*app.registered_commands, *registry.app.registered_commands)
    return [each.callback for each in known if each.callback is not None]


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_called_what_their_parameters_are(name: str) -> None:
    options = [each for each in COMMANDS[name].params if each.param_type_name == "option"]
    given = {each.name: [o for o in each.opts if o.startswith("--")] for each in options}
    wanted = {name: [OTHERWISE.get(name, f"--{name.replace('_', '-')}")] for name in given}
    assert given == wanted


@pytest.mark.parametrize("function", functions(), ids=lambda function: function.__name__)
def test_an_option_that_says_what_it_takes_is_named(function: Callable[..., Any]) -> None:
    """Typer 0.27 calls one without a name TARGET if that is what it takes, in place of target."""
    for parameter, hint in get_type_hints(function, include_extras=True).items():
        for info in get_args(hint)[1:]:
            if isinstance(info, OptionInfo) and info.metavar is not None:
                # In Annotated the first name stands where a default value would.
                names = [str(name) for name in (info.default, *(info.param_decls or ()))]
                assert any(name.startswith("--") for name in names), parameter


@pytest.mark.parametrize("name", COMMANDS)
def test_usage_shows_once_what_there_may_be_several_of(name: str) -> None:
    said = CliRunner().invoke(app, [*name.split(), "--help"]).stdout
    usage = said.strip().partition("\n\n")[0]
    several = sum(each.nargs == -1 for each in COMMANDS[name].params)
    assert usage.count("...") == several + hasattr(COMMANDS[name], "commands"), usage


def test_build_takes_its_target_and_names_all_of_them() -> None:
    context = COMMANDS["build"].make_context("build", ["m.onnx", "-o", "e", "--target", "cuda"])
    assert context.params["target"] == "cuda"
    said = " ".join(CliRunner().invoke(app, ["build", "--help"]).stdout.split())
    for target in ("cpu", "cpu:NAME", "cuda", "cuda:sm90", "tensorrt", "tensorrt:ampere+"):
        assert f" {target}: " in said
