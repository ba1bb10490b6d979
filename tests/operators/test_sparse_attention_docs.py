"""What docs/sparse_attention.md shows is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import twofour

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sparse_attention.md"


def test_the_example_exports_what_an_engine_takes(tmp_path, monkeypatch):
    """The block of Python, then a build of its file."""
    (text,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(text, str(PAGE), "exec"), {"__name__": "page"})
    engine = twofour.build("block.onnx", race=False, tuning_effort=0)
    ops = {layer.op: layer.tactic for layer in engine.plan.layers}
    assert ops["SparseAttention"] == "lists"
