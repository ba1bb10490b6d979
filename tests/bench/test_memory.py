"""Peak memory is that of a process which only loads and runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from twofour.bench.memory import peak_memory
from twofour.bench.memory_child import high_water_bytes
from twofour.compiler.build import build
from twofour.core.errors import EngineError, InputError, UnsupportedError


def product(folder: Path, size: int) -> Path:
    """An engine whose weight has size x size floats."""
    weight = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, size])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = folder / f"{size}.onnx"
    onnx.save(model, path)
    return build(path, tuning_effort=0, race=False).save(folder / f"{size}.engine")


def test_a_larger_engine_takes_more_and_this_process_does_not_count(tmp_path: Path) -> None:
    small, large = product(tmp_path, 16), product(tmp_path, 2048)
    held = np.ones(200 << 20, np.uint8)  # which the fresh process does not inherit
    found = {path: peak_memory(path, threads=1) for path in (small, large)}
    assert held.all()
    more = found[large].peak_bytes - found[small].peak_bytes
    assert 0.9 * 2048 * 2048 * 4 < more < 4 * 2048 * 2048 * 4
    assert 10e6 < found[small].before_bytes < found[small].peak_bytes < 200e6
    assert found[small].engine_bytes < found[large].engine_bytes


def test_the_input_given_is_the_one_that_runs(tmp_path: Path) -> None:
    engine = product(tmp_path, 16)
    assert peak_memory(engine, {"x": np.ones((1, 16), np.float32)}).peak_bytes > 0
    with pytest.raises(UnsupportedError, match=r"cannot measure the memory of .*16\.engine") as e:
        peak_memory(engine, {"x": np.ones((2, 16), np.float32)})
    assert "expected" in str(e.value)


def test_what_is_no_engine(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no engine at"):
        peak_memory(tmp_path / "none.engine")
    (tmp_path / "bad.engine").write_bytes(b"nothing")
    with pytest.raises(EngineError, match="not a readable engine"):
        peak_memory(tmp_path / "bad.engine")


def test_a_process_that_does_not_end_is_ended(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="did not end within"):
        peak_memory(product(tmp_path, 16), timeout_s=0.01)


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t   2152 kB\nThreads:\t1\n")
    assert high_water_bytes(tmp_path / "status") == 2152 * 1024
    (tmp_path / "status").write_text("Name:\tpython\n")
    with pytest.raises(SystemExit, match="does not tell VmHWM"):
        high_water_bytes(tmp_path / "status")
