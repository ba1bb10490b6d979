"""The files of `twofour run`: names of outputs come from the model, whatever they hold."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnx import parser
from typer.testing import CliRunner

import twofour
from twofour.cli import app

NAMES = {
    "above": ["../x"],
    "absolute": ["/tmp/x"],
    "hidden": [".bashrc", ".."],
    "null": ["a\0b"],
    "long": ["n" * 300, "n" * 299],
    "wide": ["\u00e9" * 200],
    "the same": ["a/b", "a:b", "a_b"],
    "case": ["Out", "out"],
    "numbered": ["a/b", "a_b_2", "a:b"],
}


@pytest.mark.parametrize("case", NAMES)
def test_each_output_has_a_file_of_its_own_inside_the_folder(case, tmp_path):
    names = NAMES[case]
    outs = ", ".join(f"float[2] y{i}" for i in range(len(names)))
    nodes = " ".join(f"y{i} = Pow (x, p{i})" for i in range(len(names)))
    constants = ", ".join(f"float p{i} = {{{i + 1}}}" for i in range(len(names)))
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => ({outs}) <{constants}> '
        f"{{ {nodes} }}"
    )
    for end, node, name in zip(model.graph.output, model.graph.node, names, strict=True):
        end.name = node.output[0] = name
    twofour.build(model, tuning_effort=0).save(tmp_path / "m.engine")
    np.save(tmp_path / "x.npy", np.float32([2, 3]))
    folder = tmp_path / "a" / "b"
    done = CliRunner().invoke(app, [
        "run", str(tmp_path / "m.engine"), "--input", f"x={tmp_path / 'x.npy'}",
        "--output-dir", str(folder), "--json",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    written = json.loads(done.stdout)["outputs"]
    assert list(written) == names
    files = sorted(path for path in tmp_path.rglob("*.npy") if path.name != "x.npy")
    assert len(files) == len(names)
    assert {path.parent for path in files} == {folder}
    for power, name in enumerate(names, 1):
        values = np.load(written[name]["file"])
        assert values == pytest.approx(np.float32([2, 3]) ** power)
