"""What start.py writes for other servers; the servers themselves have environments of their own."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.sample_models import conv_model

START = Path(__file__).parents[2] / "examples" / "serve_peers" / "start.py"


@pytest.fixture(scope="module")
def start() -> ModuleType:
    spec = importlib.util.spec_from_file_location("start", START)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def asked(tmp_path: Path) -> argparse.Namespace:
    model = conv_model(tmp_path / "m.onnx")
    ports = {"http": 1, "grpc": 2}
    numbers = {"threads": 1, "parallel": 2, "max_batch": 8, "delay_us": 500}
    return argparse.Namespace(model=model, name="net", **ports, **numbers)


def test_tritons_configuration(start: ModuleType, asked: argparse.Namespace) -> None:
    """With batches the first axis is Triton's own."""
    text = start.triton_config(asked)
    assert "max_batch_size: 8" in text
    assert 'input [{ name: "x" data_type: TYPE_FP32 dims: [4, 8, 8] }]' in text
    assert "max_queue_delay_microseconds: 500" in text
    asked.max_batch = 1
    text = start.triton_config(asked)
    assert "max_batch_size: 0" in text
    assert "dims: [-1, 4, 8, 8]" in text
    assert "dynamic_batching" not in text


def test_mlservers_settings(start: ModuleType, asked: argparse.Namespace, tmp_path: Path) -> None:
    command, _ = start.mlserver(asked, tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    model = json.loads((tmp_path / "model-settings.json").read_text())
    assert command[1:] == ["start", str(tmp_path)]
    assert (settings["host"], settings["http_port"], settings["grpc_port"]) == ("127.0.0.1", 1, 2)
    assert (model["name"], model["max_batch_size"], model["max_batch_time"]) == ("net", 8, 0.0005)
    assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4, 8, 8]}]
    assert (tmp_path / "mlserver_onnxruntime.py").is_file()
