"""deploy/ci: valid for what reads them, and their commands run a recipe to its verdict."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnxruntime
import pytest
import yaml

from tests.sample_models import conv_model

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / "deploy" / "ci"
GITHUB, GITLAB = CI / "github-actions.yml", CI / "gitlab-ci.yml"
SCHEMAS = {GITHUB: "vendor.github-workflows", GITLAB: "vendor.gitlab-ci"}
RECIPE = """\
name: small
model: {{onnx: model.onnx}}
data: {{calibrate: calib.npz, evaluate: test.npz}}
sparsify: {{method: magnitude, correct: false}}
quantize: {{recipe: fast}}
build: {{tuning_effort: 0, race: false}}
benchmark: {{duration: 0.1, vs: [], memory: false}}
gate: {{max_drop: 100, min_speedup: {speedup}}}
"""
INSTALL = re.compile(r'python -m pip install "(?P<name>\w+)\[(?P<extras>[\w,]+)\]"')


def valid(path: Path, schema: str) -> subprocess.CompletedProcess[str]:
    """Against a schema that the checker brings along: no network."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
def test_they_are_valid(path: Path, tmp_path: Path) -> None:
    done = valid(path, SCHEMAS[path])
    assert done.returncode == 0, done.stdout + done.stderr
    broken = tmp_path / path.name
    broken.write_text(path.read_text().replace("timeout", "tmeout"))
    assert valid(broken, SCHEMAS[path]).returncode == 1


def github() -> tuple[Mapping[str, str], list[Mapping[str, Any]]]:
    """Variables and steps of its job."""
    document = yaml.safe_load(GITHUB.read_text())
    (job,) = document["jobs"].values()
    return document["env"], job["steps"]


def gitlab() -> Mapping[str, Any]:
    """Its job."""
    job: Mapping[str, Any] = yaml.safe_load(GITLAB.read_text())["model"]
    return job


def commands(path: Path) -> tuple[Mapping[str, str], list[tuple[str, bool]]]:
    """Variables; and each command, with whether it runs after one that failed, too."""
    if path == GITHUB:
        env, steps = github()
        return env, [(step["run"], "if" in step) for step in steps if "run" in step]
    job = gitlab()
    lines = [*job["before_script"], *job["script"]]
    return job["variables"], [(line, False) for line in lines]


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
def test_what_they_install_is_there(path: Path) -> None:
    _, found = commands(path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installs = [match for text, _ in found if (match := INSTALL.fullmatch(text))]
    assert len(installs) == 1
    assert installs[0]["name"] == project["name"]
    assert set(installs[0]["extras"].split(",")) <= set(project["optional-dependencies"])


def test_what_they_publish_is_what_the_gate_writes() -> None:
    env, steps = github()
    (report,) = [step for step in steps if "junit" in step.get("uses", "")]
    assert report["with"]["report_paths"] == "${{ env.RUN }}/gate.xml"
    (upload,) = [step for step in steps if "upload-artifact" in step.get("uses", "")]
    assert upload["with"]["path"] == "${{ env.RUN }}"
    assert all("cancelled()" in step["if"] for step in (report, upload))
    job = gitlab()
    run = job["variables"]["RUN"]
    assert run == env["RUN"]
    assert job["artifacts"]["when"] == "always"
    assert job["artifacts"]["paths"] == [f"{run}/"]
    assert job["artifacts"]["reports"]["junit"] == f"{run}/gate.xml"
    assert f"{run}/stages" in job["cache"]["paths"]


def repository(folder: Path, speedup: float) -> dict[str, str]:
    """A repository with a recipe; and an environment in which `twofour` is installed."""
    (folder / "recipe.yaml").write_text(RECIPE.format(speedup=speedup))
    model = conv_model(folder / "model.onnx")
    random = np.random.default_rng(0)
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    for name, count in (("calib", 32), ("test", 64)):
        x = random.standard_normal((count, 4, 8, 8)).astype(np.float32)
        labels = session.run(None, {"x": x})[0].argmax(1)
        np.savez(folder / f"{name}.npz", x=x, labels=labels)
    programs = folder / "bin"
    programs.mkdir()
    program = programs / "twofour"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m twofour "$@"\n')
    program.chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "GITHUB_STEP_SUMMARY": "step.md"}


def ran(path: Path, folder: Path, environment: Mapping[str, str]) -> list[int]:
    """Exit codes of the job's commands but the install, run as its runner runs them."""
    variables, found = commands(path)
    shell = ["bash", "-e"] if path == GITHUB else ["bash", "-eo", "pipefail"]
    codes: list[int] = []
    for text, always in found:
        if INSTALL.fullmatch(text) or (any(codes) and not always):
            continue
        done = subprocess.run(
            [*shell, "-c", text],
            cwd=folder,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode in (0, 1), done.stdout + done.stderr
        codes.append(done.returncode)
    return codes


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
@pytest.mark.parametrize(("speedup", "code"), [(0.0001, 0), (10_000, 1)], ids=["open", "shut"])
def test_their_commands_end_with_the_verdict(
    path: Path, speedup: float, code: int, tmp_path: Path
) -> None:
    codes = ran(path, tmp_path, repository(tmp_path, speedup))
    assert codes == ([code, 0] if path == GITHUB else [code])
    run = tmp_path / "runs" / "model"
    assert (run / "run.json").is_file()
    (suite,) = ElementTree.parse(run / "gate.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", str(code))
    if path == GITHUB:
        summary = (tmp_path / "step.md").read_text()
        assert summary == (run / "gate.md").read_text()
        assert f"the gate is {'shut' if code else 'open'}" in summary


def test_a_job_that_fails_before_the_gate_still_ends_cleanly(tmp_path: Path) -> None:
    """No summary is no error that hides the first one."""
    environment = repository(tmp_path, 1.0)
    variables, found = commands(GITHUB)
    (text,) = [text for text, always in found if always]
    done = subprocess.run(
        ["bash", "-e", "-c", text],
        cwd=tmp_path,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "step.md").exists()
