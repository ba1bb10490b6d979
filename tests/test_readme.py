"""The README: its links lead somewhere, its commands run, its figures are those in benchmarks/."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.sample_models import conv_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^<!-- run -->\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECIPE = re.compile(r"^<!-- (\S+\.yaml) -->\n```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def blocks(kind: str) -> list[str]:
    """The marked blocks of one language."""
    return [text for lang, text in BLOCK.findall((ROOT / "README.md").read_text()) if lang == kind]


def anchors(page: Path) -> set[str]:
    """Headings as links spell them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_recipe_is_the_one_in_the_folder() -> None:
    found = RECIPE.search((ROOT / "README.md").read_text())
    assert found is not None
    name, shown = found.groups()
    lines = (ROOT / name).read_text().splitlines(keepends=True)
    assert shown == "".join(line for line in lines if not line.startswith("#"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the README's commands are run: the files that it speaks of."""
    random = np.random.default_rng(0)
    conv_model(tmp_path / "model.onnx", scale=0.2)
    samples = random.standard_normal((64, 4, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", x=samples, labels=random.integers(0, 10, 64))
    np.save(tmp_path / "x.npy", samples[:1])
    program = f'#!/bin/sh\nexec {sys.executable} -c "from twofour.cli import main; main()" "$@"\n'
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "twofour").write_text(program)
    (tmp_path / "bin" / "twofour").chmod(0o755)
    return tmp_path


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    paths = {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_commands_run(folder: Path) -> None:
    lines = [line for text in blocks("sh") for line in text.splitlines()]
    assert len(lines) >= 5
    for line in lines:
        result = run(["sh", "-c", line], folder)
        assert result.returncode == 0, f"{line}\n{result.stderr}"
    assert (folder / "outputs" / "y.npy").exists()


def test_the_python_runs(folder: Path) -> None:
    texts = blocks("python")
    assert texts
    for text in texts:
        result = run(
            [sys.executable, "-c", text + "\nassert outputs['y'].shape == (1, 10)"], folder
        )
        assert result.returncode == 0, result.stderr


def update_readme() -> ModuleType:
    path = ROOT / "benchmarks" / "update_readme.py"
    spec = importlib.util.spec_from_file_location("update_readme", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_are_those_that_were_measured() -> None:
    module = update_readme()
    readme = (ROOT / "README.md").read_text()
    assert module.updated(readme, module.figures(ROOT / "benchmarks")) == readme


def test_figures_come_from_a_summary(tmp_path: Path) -> None:
    module = update_readme()
    (tmp_path / "run.json").write_text(
        '{"title": "T", "cpu": "C", "target": "cpu:x", "version": "1", "command": "go",'
        ' "baseline": "B", "rows": [{"name": "B", "weights": "w", "median_us": 2.0,'
        ' "spread_us": 0.5, "speed": 1.0, "top1": 0.5, "size_bytes": 1000}]}'
    )
    text = module.figures(tmp_path)
    assert "Reproduce: `go`" in text
    assert "| B | w | 50.00 % | 2.0 us | 0.5 | 1.00x | 1 kB |" in text
    page = "a\n<!-- figures -->\nold\n<!-- /figures -->\nb\n"
    assert module.updated(page, "new\n") == page.replace("old", "new")
    with pytest.raises(ValueError, match="lacks"):
        module.updated("no markers", text)
