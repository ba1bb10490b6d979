"""Whatever exporter wrote it: a valid model builds, runs, and equals ONNX Runtime on the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.compiler.habits import HABITS, MICROSOFT, Habit
from twofour.compiler.build import build
from twofour.compiler.whole import OP_TYPE
from twofour.engine import Engine
from twofour.runtime.session import Session

Arrays = dict[str, np.ndarray]


def session_of(path: Path) -> ort.InferenceSession:
    """ONNX Runtime on the file, each node by itself."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(path, options)


def feeds_of(session: ort.InferenceSession, habit: Habit) -> Arrays:
    """Random inputs."""
    random, feeds = np.random.default_rng(2), {}
    kinds = {"float": np.float32, "double": np.float64}
    for end in session.get_inputs():
        name = end.type.removeprefix("tensor(").removesuffix(")")
        dtype = np.dtype(kinds.get(name, name))
        open_ = any(not isinstance(dim, int) for dim in end.shape)
        shape = habit.shape if open_ else tuple(end.shape)
        if dtype.kind == "f":
            feeds[end.name] = random.normal(size=shape).astype(dtype)
        else:
            feeds[end.name] = np.asarray(random.integers(0, habit.highest, shape, endpoint=True)
                                         ).astype(dtype)  # fmt: skip
    return feeds


def cosine(got: np.ndarray, want: np.ndarray) -> float:
    a, b = (array.astype(np.float64).ravel() for array in (got, want))
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size else float(np.array_equal(a, b))


def compare(path: Path, feeds: Arrays, **options) -> Engine:
    """Builds the file for these inputs; every output must be that of ONNX Runtime."""
    session = session_of(path)
    names = [end.name for end in session.get_outputs()]
    shapes = {name: array.shape for name, array in feeds.items()}
    engine = build(path, shapes=shapes, tuning_effort=0, **options)
    with Session(engine) as own:
        got = own.run(feeds)
    assert list(got) == names
    for name, want in zip(names, session.run(names, feeds), strict=True):
        assert (got[name].dtype, got[name].shape) == (want.dtype, want.shape), name
        assert cosine(got[name], want) >= 0.9999, name
    return engine


def on_onnxruntime(engine: Engine) -> list[str]:
    """The operators that fell back, in order of name."""
    return sorted({layer.op for layer in engine.plan.layers if layer.tactic == "onnxruntime"})


@pytest.mark.parametrize("name", HABITS)
def test_habits_of_exporters(name, tmp_path) -> None:
    onnx.save(HABITS[name].proto(), tmp_path / "m.onnx")
    feeds = feeds_of(session_of(tmp_path / "m.onnx"), HABITS[name])
    engine = compare(tmp_path / "m.onnx", feeds)
    assert OP_TYPE not in on_onnxruntime(engine) or name == "sequences"


@pytest.mark.parametrize("name", MICROSOFT)
def test_operators_of_onnxruntime(name, tmp_path) -> None:
    habit = MICROSOFT[name]
    proto = habit.proto()
    if "com.microsoft" not in habit.domains:
        proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(proto, tmp_path / "m.onnx")
    engine = compare(tmp_path / "m.onnx", feeds_of(session_of(tmp_path / "m.onnx"), habit))
    standing = {"fused convolutions": [], "quantized operators": [],
                "a layer of bert": ["Attention", "EmbedLayerNormalization"],
                "weights of four bits": ["MatMulNBits"],
                "quantized on the way": ["DynamicQuantizeMatMul"]}  # fmt: skip
    if name in standing:
        assert on_onnxruntime(engine) == standing[name]


def test_external_data(tmp_path) -> None:
    proto = HABITS["pytorch of opset 7"].proto()
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    feeds = feeds_of(session_of(tmp_path / "m.onnx"), HABITS["pytorch of opset 7"])
    compare(tmp_path / "m.onnx", feeds)


@pytest.mark.parametrize("name", ["pytorch of opset 7", "tf2onnx", "loop", "lstm"])
def test_files_of_onnxruntimes_optimizer(name, tmp_path) -> None:
    onnx.save(HABITS[name].proto(), tmp_path / "m.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(tmp_path / "m.onnx", options)
    path = tmp_path / "optimized.onnx"
    compare(path, feeds_of(session_of(path), HABITS[name]))


def test_an_open_batch(tmp_path) -> None:
    onnx.save(HABITS["pytorch of opset 7"].proto(), tmp_path / "m.onnx")
    ends = [(n, 3, 8, 8) for n in (1, 2, 5)]
    engine = build(tmp_path / "m.onnx", shapes={"x": tuple(ends)}, tuning_effort=0)
    session = session_of(tmp_path / "m.onnx")
    with Session(engine) as own:
        for n in (1, 3, 5):
            feeds = {"x": np.random.default_rng(n).normal(size=(n, 3, 8, 8)).astype(np.float32)}
            (got,), (want,) = own.run(feeds).values(), session.run(None, feeds)
            assert cosine(got, want) >= 0.9999


def test_random_numbers_stay_random(tmp_path) -> None:
    body = "(float[2,6] x) => (float[2,6] y) { r = RandomNormalLike (x) m = MatMul (x, k) y = Add"
    habit = Habit(body + " (r, m) }", 17, {"k": np.eye(6, dtype=np.float32)})
    engine = build(habit.proto(), tuning_effort=0)
    with Session(engine) as own:
        first, second = (own.run({"x": np.ones((2, 6), np.float32)})["y"] for _ in range(2))
    assert not np.array_equal(first, second)


# Files of ../shared/data/onnx: exporter, opsets 9 to 15. Names of what has no kernel, by file.
FILES = {
    "basic_pitch_nmp": [],
    "dtln_2": [],
    "fastestdet": [],
    "har_cnn": [],
    "mlperftiny_ad01": [],
    "mlperftiny_resnet8": [],
    "openseeface_detection": [],
    "ppocr_mobile_v2_cls": [],
    "ppocrv2_det": [],
    "silero_vad_16k_op15": None,
    "ultraface_rfb_320_simplified": [],
    "ultraface_slim_320": [],
}


def feeds_for(path: Path, shapes: dict[str, list[int]]) -> Arrays:
    """Random inputs, of a page of text for the one that looks for it."""
    random, feeds = np.random.RandomState(0), {}
    for name, shape in shapes.items():
        feeds[name] = random.standard_normal(shape).astype(np.float32)
        if name == "sr":
            feeds[name] = np.array(16000)
    if path.stem == "ppocrv2_det":  # noise holds no text: ONNX Runtime rounds such results to 0
        page = np.full((320, 320), 2.2, np.float32)
        for row in range(40, 280, 48):
            for column in range(30, 290, 10):
                letter = np.kron(random.random_sample((6, 4)) < 0.5, np.ones((3, 2), bool))
                page[row : row + 18, column : column + 8][letter] = -2
        feeds["x"] = np.tile(page, (1, 3, 1, 1))
    return feeds


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_files_of_others(name, data_folder) -> None:
    path = data_folder / "onnx" / f"{name}.onnx"
    index = json.loads((data_folder / "onnx_index.json").read_text())
    shapes = index[f"onnx/{path.name}"]["random_run"]["feeds"]
    found = on_onnxruntime(compare(path, feeds_for(path, shapes)))
    assert OP_TYPE not in found
    if FILES[name] is not None:
        assert found == FILES[name]


@pytest.mark.slow
def test_speech_in_chunks_with_state(data_folder) -> None:
    """What one run leaves behind is the next one's input."""
    path = data_folder / "onnx" / "silero_vad_16k_op15.onnx"
    sound = np.frombuffer((data_folder / "real_inputs" / "speech_16k_20s.wav").read_bytes()[44:],
                          np.int16).astype(np.float32) / 32768  # fmt: skip
    feeds = {"input": np.zeros((1, 576), np.float32), "state": np.zeros((2, 1, 128), np.float32),
             "sr": np.array(16000)}  # fmt: skip
    engine = build(path, shapes={k: v.shape for k, v in feeds.items()}, tuning_effort=0)
    session, states, ends = session_of(path), [feeds["state"]] * 2, []
    with Session(engine) as own:
        for start in range(0, 100 * 512, 512):
            feeds["input"] = sound[start : start + 576][None]
            got = own.run(feeds | {"state": states[0]})
            want = session.run(None, feeds | {"state": states[1]})
            states = [got["stateN"], want[1]]
            ends.append((float(got["output"][0, 0]), float(want[0][0, 0])))
    ours, theirs = np.array(ends).T
    assert theirs.max() > 0.5 > theirs.min()
    assert np.abs(ours - theirs).max() <= 1e-3
