"""The example of a plugin, installed as a package of its own and used by another process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "plugin"
MODEL = """
import numpy as np, onnx, twofour
from onnx import numpy_helper
rng = np.random.default_rng(0)
x, w1, w2 = (rng.standard_normal(s).astype(np.float32) for s in ((6, 16), (16, 24), (24, 8)))
TEXT = '''<ir_version: 8, opset_import: ["" : 17, "example" : 1]>
net (float[6,16] x) => (float[6,8] z, int64[6] first, float[6] lead) {
    a = MatMul (x, w1)  b = example.SquaredRelu <scale = 0.5> (a)
    z = MatMul (b, w2)  first, lead = example.Winner (z) }'''
model = onnx.parser.parse_model(TEXT)
model.graph.initializer.extend(numpy_helper.from_array(w, n) for w, n in ((w1, "w1"), (w2, "w2")))
"""
BUILD = """
engine = twofour.build(model, race=False, tuning_effort=1)
engine.save("net.engine")
print([(layer.op, layer.tactic) for layer in engine.plan.layers])
"""
RUN = """
with twofour.load("net.engine") as session:
    got = session.run({"x": x})
z = (np.maximum(x @ w1, 0) ** 2 * np.float32(0.5)) @ w2
assert np.allclose(got["z"], z, rtol=1e-4, atol=1e-3)
assert (got["first"] == got["z"].argmax(-1)).all()
top = np.sort(got["z"], -1)
assert np.allclose(got["lead"], top[:, -1] - top[:, -2])
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the example was installed into."""
    folder, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(EXAMPLE, source)  # a build leaves files beside it
    command = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target")
    subprocess.run([*command, str(folder), str(source)], check=True, timeout=300)
    return folder


def python(code: str, folder: Path, *site: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (ROOT, *site)))
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_its_operators_are_built_run_and_missed(package: Path, tmp_path: Path) -> None:
    done = python(MODEL + BUILD + RUN, tmp_path, package)
    assert done.returncode == 0, done.stderr
    assert "('SquaredRelu', 'loop')" in done.stdout
    assert "('Winner', 'python')" in done.stdout
    gone = python(MODEL + RUN, tmp_path)
    assert gone.returncode != 0
    assert "the engine needs the operator example.Winner, which is not installed" in gone.stderr
    assert "pip install twofour-activations" in gone.stderr


def test_it_is_short() -> None:
    text = (EXAMPLE / "twofour_activations" / "__init__.py").read_text()
    assert len(text.splitlines()) < 100
