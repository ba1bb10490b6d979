"""The public names: they are there, they are what they say, and importing the package is cheap."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import twofour

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", twofour.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(twofour, name) is not None
    assert name in dir(twofour)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = twofour.nothing


def test_the_import_loads_nothing_heavy() -> None:
    code = "import sys, twofour; print(sorted(m for m in sys.modules if m.startswith('twofour')))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout == "['twofour']\n"


def test_a_session_loads_no_compiler_and_no_torch() -> None:
    code = (
        "import sys, twofour; twofour.Session, twofour.load; "
        "print(sorted({'torch', 'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'rich', 'typer'}"
        " & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout == "[]\n"


def test_metadata_names_what_the_runtime_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {item.partition(">")[0] for item in project["dependencies"]}
    assert {"numpy", "llvmlite", "safetensors"} <= names
    assert not any(item.startswith("torch") for item in project["dependencies"])
    assert "torch>=2.6" in project["optional-dependencies"]["train"]
    assert project["scripts"]["twofour"] == "twofour.cli:main"
