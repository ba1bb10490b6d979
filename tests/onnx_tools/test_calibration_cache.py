"""The calibration cache: reused, gone on with after a kill, and refused where it does not fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.onnx_tools.networks import option_a, samples, weights
from twofour.core.data import Batch
from twofour.core.errors import InputError
from twofour.onnx_tools import calibrate as calibrating
from twofour.onnx_tools.calibrate import Calibration, calibrate_with_report
from twofour.onnx_tools.calibration_cache import Seen, digest_of
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.prepare import prepare
from twofour.onnx_tools.runner import Runner

TENSORS = ["x", "r1", "a4", "y"]
ROOT = Path(__file__).parents[2]


def calibrate(
    cache: Path | None, data: Any, tensors: list[str] = TENSORS, **options: Any
) -> Calibration:
    chosen = QuantizeOptions(**{"method": "mse", "threads": 1} | options)
    return calibrate_with_report(option_a(), tensors, data, chosen, None, cache)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each run of the model by the samples in it."""
    sizes: list[int] = []
    original = Runner.run

    def spy(self: Runner, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        sizes.append(len(next(iter(inputs.values()))))
        return original(self, inputs)

    monkeypatch.setattr(Runner, "run", spy)
    return sizes


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "SAVE_EVERY_S", 0.0)


def refused(*parts: str) -> Any:
    return pytest.raises(InputError, match="(?s)" + ".*".join(parts))


def test_a_second_calibration_runs_nothing(tmp_path: Path, ran: list[int]) -> None:
    cache, x = tmp_path / "c.json", samples(40)
    first = calibrate(cache, {"x": x})
    assert first.note == ""
    ran.clear()
    for data in ({"x": x}, [{"x": x[:7]}, {"x": x[7:]}], None):
        again = calibrate(cache, data)
        assert again.ranges == first.ranges
        assert "nothing was run" in again.note
    assert ran == []


@pytest.mark.parametrize("method", ["minmax", "average", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("activation", ["int8", "uint8"])
def test_another_method_needs_no_run(tmp_path: Path, method: str, activation: str) -> None:
    cache, data = tmp_path / "c.json", {"x": samples(40)}
    calibrate(cache, data)
    options = {"method": method, "activation": activation}
    assert calibrate(cache, None, **options).ranges == calibrate(None, data, **options).ranges


def test_the_file_is_text_that_people_can_read(tmp_path: Path) -> None:
    cache = tmp_path / "c.json"
    calibrate(cache, {"x": samples(40)})
    document = json.loads(cache.read_text())
    assert document["format"] == "twofour calibration 1"
    assert document["data"]["samples"] == 40
    assert document["running"] is None
    tensor = document["tensors"]["x"]
    assert tensor["high"] == float(samples(40).max())
    assert sum(line.startswith('  "') for line in cache.read_text().splitlines()) == len(TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def failing(x: np.ndarray, after: int) -> Iterator[dict[str, np.ndarray]]:
    for i in range(0, after, 8):
        yield {"x": x[i : i + 8]}
    raise KeyboardInterrupt


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("after", [8, 16, 40, 56, 64])
def test_an_interrupted_calibration_goes_on(tmp_path: Path, ran: list[int], after: int) -> None:
    whole, cache, x = tmp_path / "whole.json", tmp_path / "c.json", samples(64)
    parts = [{"x": x[i : i + 8]} for i in range(0, 64, 8)]
    calibrate(whole, parts)
    with pytest.raises(KeyboardInterrupt):
        calibrate(cache, failing(x, after))
    ran.clear()
    calibrate(cache, parts)
    assert sum(ran) == 64 - after // 16 * 16
    assert cache.read_bytes() == whole.read_bytes()


@pytest.mark.usefixtures("often")
def test_an_interrupted_calibration_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    cache, x = tmp_path / "c.json", samples(64)
    with pytest.raises(KeyboardInterrupt):
        calibrate(cache, failing(x, 40))
    with refused("does not have the ranges of 4 tensors"):
        calibrate(cache, None)
    for other in (x + 1, x[:24], x[:32] + 1):
        with refused("made from other data", "expected 32 samples"):
            calibrate(cache, [{"x": other[i : i + 8]} for i in range(0, len(other), 8)])


KILLED = """
import sys, time
from tests.onnx_tools.networks import option_a, samples
from twofour.onnx_tools import calibrate as calibrating
from twofour.onnx_tools.calibrate import calibrate
from twofour.onnx_tools.options import QuantizeOptions
calibrating.SAVE_EVERY_S = 0
def parts():
    for i in range(0, 64, 16):
        yield {"x": samples(64)[i : i + 16]}
        if i == 32 and sys.argv[2] == "wait":
            print("here", flush=True)
            time.sleep(60)
options = QuantizeOptions(threads=1)
calibrate(option_a(), ["x", "r1", "a4", "y"], parts(), options, None, sys.argv[1])
"""


def test_a_killed_calibration_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def start(cache: str, wait: str, seed: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", KILLED, str(tmp_path / cache), wait]
        out = subprocess.PIPE
        return subprocess.Popen(command, stdout=out, text=True, cwd=ROOT, env=environment)

    killed = start("c.json", "wait", "1")
    assert killed.stdout is not None
    assert killed.stdout.readline() == "here\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    assert json.loads((tmp_path / "c.json").read_text())["running"]["samples"] == 48
    for cache, seed in (("c.json", "2"), ("whole.json", "3")):
        process = start(cache, "go", seed)
        assert process.wait(60) == 0
        assert process.stdout is not None
        process.stdout.close()
    assert (tmp_path / "c.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_tensors_that_are_new_are_added(tmp_path: Path, ran: list[int]) -> None:
    cache, data = tmp_path / "c.json", {"x": samples(40)}
    calibrate(cache, data, ["x", "r1"])
    with refused("does not have the ranges of 2 tensors", "missing: a4, y", "give data"):
        calibrate(cache, None)
    with refused("made from other data"):
        calibrate(cache, {"x": samples(40, seed=1)})
    more = calibrate(cache, data)
    assert more.ranges == calibrate(None, data).ranges
    ran.clear()
    assert calibrate(cache, None).ranges == more.ranges
    assert ran == []


def test_other_data_is_refused(tmp_path: Path) -> None:
    cache, x = tmp_path / "c.json", samples(40)
    calibrate(cache, {"x": x})
    for other in (x[:39], np.concatenate([x, x]), x[::-1], x + 1):
        with refused("made from other data", "expected 40 samples, SHA-256", "got .* from"):
            calibrate(cache, {"x": other})
    with refused("expected 40 samples", "got 20"):
        calibrate(cache, {"x": x}, samples=20)


def test_no_cache_and_no_data() -> None:
    with refused("no data", "give data"):
        calibrate(None, None)


def test_a_cache_of_another_model_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "c.json"
    calibrate(cache, {"x": samples()})
    other = option_a(b1=weights(b1=(8,))["b1"] + 1)
    with refused("of another model", "expected model [0-9a-f]{16}", "got [0-9a-f]{16}", "delete"):
        calibrate_with_report(other, TENSORS, None, QuantizeOptions(), None, cache)


def test_what_a_model_computes_makes_its_digest() -> None:
    model = option_a()
    same = option_a()
    for node in same.graph:
        node.name, node.doc_string = f"{node.name}_", "text"
    same.metadata_props["author"] = "somebody"
    assert digest_of(prepare(same)) == digest_of(prepare(model)) == digest_of(prepare(model))
    stride = option_a()
    conv = next(node for node in stride.graph if node.op_type == "Conv")
    conv.attributes["pads"] = ir.AttrInt64s("pads", [0, 1, 1, 1])
    renamed = option_a()
    renamed.graph[0].outputs[0].name = "other"
    weight = option_a(fc=weights(fc=(5, 16))["fc"] * 2)
    assert len({digest_of(each) for each in (model, stride, renamed, weight)}) == 4


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_batches_make_no_difference_to_the_digest_of_samples(lengths: list[int]) -> None:
    x = samples(sum(lengths), (3,))
    cut, start = Seen(), 0
    for length in lengths:
        cut = cut.then(Batch({"x": x[start : start + length]}, None, start))
        start += length
    assert cut == Seen().then(Batch({"x": x}, None, 0))
    assert cut != Seen().then(Batch({"x": x.reshape(-1, 1, 3)}, None, 0))
    assert cut != Seen().then(Batch({"z": x}, None, 0))


def document(tmp_path: Path) -> dict[str, Any]:
    cache = tmp_path / "c.json"
    calibrate(cache, {"x": samples()})
    return json.loads(cache.read_text())


def tensor(**changed: Any) -> dict[str, Any]:
    plain = {"samples": 16, "low": -1.0, "high": 1.5, "limit": 2.0, "zeros": 0}
    plain |= {"average_low": -0.5, "average_high": 1.0, "counts": "8192:1,2 28672:3"}
    return plain | changed


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"counts": "8192:1,2 28671:3"}, "high: expected a value of bin 28671, got 1.5"),
        ({"counts": "8191:1,2 28672:3"}, "low: expected a value of bin 8191, got -1.0"),
        ({"low": 0.0, "average_low": 0.0}, "low: expected a value of bin 8192"),
        ({"low": 1.0, "average_low": 1.0, "zeros": 1}, "zeros: expected none"),
        ({"counts": "8192:" + f"{2**53 - 1}," * 9 + "1"}, "expected 1 to"),
        ({"counts": "8000:1,-2"}, "expected 1 to"),
        ({"counts": "8000:0"}, "expected 1 to"),
        ({"counts": f"8000:{2**62},{2**62}"}, "expected 1 to"),
        ({"counts": "8000:1 8000:1"}, "expected bins 8001"),
        ({"counts": "32767:1,1"}, "expected bins 0 to 32767"),
        ({"counts": "-1:1"}, "expected bins 0"),
        ({"counts": "8000"}, "invalid literal"),
        ({"counts": "8000:1,x"}, "invalid literal"),
        ({"counts": "8000:" + "9" * 5000}, "integer string|expected 1 to"),
        ({"counts": ""}, "expected nothing where nothing|expected values that"),
        ({"zeros": -1}, "zeros: expected 0"),
        ({"zeros": 2**70}, "zeros: expected 0"),
        ({"limit": 3.0}, "power of two"),
        ({"limit": 2.0**600}, "power of two"),
        ({"limit": 1.0}, "power of two"),
        ({"limit": 0.0}, "power of two"),
        ({"high": 1e39}, "expected values that can be counted"),
        ({"low": 2.0}, "expected low <= average_low"),
        ({"average_high": 9.0}, "expected low <= average_low"),
        ({"high": "1"}, "expected a finite number"),
        ({"high": 1e400}, "Infinity is no number"),
        ({"high": 1e301}, "expected a finite number"),
        ({"samples": 1.5}, "expected int"),
        ({"more": 1}, "unknown field 'more'"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(
    tmp_path: Path, changed: dict[str, Any], reason: str
) -> None:
    found = document(tmp_path)
    found["tensors"]["x"] = tensor()
    (tmp_path / "c.json").write_text(json.dumps(found))
    calibrate(tmp_path / "c.json", None)
    found["tensors"]["x"] = tensor(**changed)
    (tmp_path / "c.json").write_text(json.dumps(found))
    with refused("no calibration cache, or a damaged one", f"({reason})", "delete the file"):
        calibrate(tmp_path / "c.json", None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": "twofour calibration 1"}',
        '{"format": NaN}',
        "[" * 100_000,
        "\x00\xff",
        '{"format": "", "format": "twofour calibration 1"}',
        '{"format": "twofour calibration 1", "model": "", "data": {"samples": -1, "sha256": ""}, '
        '"running": null, "tensors": {}}',
        '{"format": "twofour calibration 2", "model": "", "data": null, "running": null, '
        '"tensors": {}}',
    ],
)
def test_a_file_that_is_no_cache_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with refused("no calibration cache, or a damaged one"):
        calibrate(tmp_path / "c.json", {"x": samples()})


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    document(tmp_path)
    content = (tmp_path / "c.json").read_bytes()
    for end in range(0, len(content.rstrip()), len(content) // 40):
        (tmp_path / "c.json").write_bytes(content[:end])
        with refused("no calibration cache, or a damaged one"):
            calibrate(tmp_path / "c.json", None)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "c.json").open("wb") as file:
        file.truncate(1 << 34)
    began = time.monotonic()
    with refused("expected at most 268435456 bytes"):
        calibrate(tmp_path / "c.json", None)
    assert time.monotonic() - began < 30


def test_a_folder_that_is_not_there_is_found_before_the_work(
    tmp_path: Path, ran: list[int]
) -> None:
    with refused("cannot write the calibration cache", "there is no folder"):
        calibrate(tmp_path / "none" / "c.json", {"x": samples()})
    with refused("cannot read the calibration cache"):
        calibrate(tmp_path, {"x": samples()})
    assert ran == []


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, ran: list[int]) -> None:
    os.mkfifo(tmp_path / "c.json")
    with refused("cannot read the calibration cache", "is no file"):
        calibrate(tmp_path / "c.json", {"x": samples()})
    assert ran == []


def test_a_tensor_that_is_always_zero_comes_back(tmp_path: Path) -> None:
    cache, zeros = tmp_path / "c.json", np.zeros((3, 4, 8, 8), np.float32)
    first = calibrate(cache, {"x": zeros}, ["x"])
    assert calibrate(cache, None, ["x"]).ranges == first.ranges
    assert first.ranges["x"].high == 0
