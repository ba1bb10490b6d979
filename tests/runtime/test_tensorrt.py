"""Sessions on engines of TensorRT, by a TensorRT and a CUDA that are made up: no GPU is here."""

from __future__ import annotations

import numpy as np
import pytest

from tests.fake_tensorrt import plant
from twofour.core.errors import EngineError, InputError, UnsupportedError
from twofour.core.sizes import Symbol, symbol_size
from twofour.core.target import Target, missing_features
from twofour.core.tensorrt import TensorRT
from twofour.engine import Engine, Layer, Plan, Profile, Step, TensorInfo
from twofour.runtime.session import Session

VERSION = "10.9.0.34"
X = np.arange(24, dtype=np.float32).reshape(2, 12)


def engine(
    gpu: str = "sm89",
    version: str = VERSION,
    content: bytes = b"engine",
    more: tuple[TensorInfo, ...] = (),
) -> Engine:
    """x [batch, 12] -> y, batch of 1 to 4 or of 5 to 9: two profiles of one network."""
    profiles = []
    for symbol in (Symbol("batch", 1, 2, 4), Symbol("batch", 5, 8, 9)):
        dims = (symbol_size([symbol], 0), 12)
        ends = [TensorInfo.of(name, "float32", dims) for name in "xy"]
        names = tuple(info.name for info in (ends[0], *more))
        step = Step("tensorrt", "tensorrt", names, ("y",), (0,))
        profiles.append(Profile((ends[0], *more), (ends[1],), (), (step,), 8, (), (symbol,)))
    target = Target("tensorrt", "x86_64", "A GPU", tensorrt=TensorRT(gpu, "tensorrt", version))
    layers = (Layer("all", "Myelin", "tensorrt"),)
    plan = Plan(target, "0.1.0", "", tuple(profiles), layers, 1, ("tensorrt",))
    data = {"tensorrt": np.frombuffer(content, np.uint8)}
    return Engine(plan, np.zeros(0, np.uint8), data, {})


def test_a_run_goes_to_the_gpu_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module, cuda = plant(monkeypatch, VERSION)
    with Session(engine()) as session:
        assert (session.run({"x": X})["y"] == 2 * X).all()
        small = session.run({"x": X[:1]})["y"]
        assert small.shape == (1, 12)
        assert (small == 2 * X[:1]).all()
        many = np.ones((6, 12), np.float32)
        assert (session.run({"x": many})["y"] == 2).all()
        assert (session.run({"x": X})["y"] == 2 * X).all()
        assert module.told["entered"] == [1, 0]
        assert len(cuda.memory) == 2, "one block for each tensor"
    assert not cuda.memory
    assert not cuda.streams
    with pytest.raises(InputError, match="closed"):
        session.run({"x": X})


def test_results_are_read_only_after_the_stream_was_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, cuda = plant(monkeypatch, VERSION)
    with Session(engine()) as session:
        cuda.calls.clear()
        session.run({"x": X})
        work = [name for name in cuda.calls if not name.startswith("cuCtx")]
        assert work[-1] == "cuStreamSynchronize"
        assert work.count("cuMemcpyHtoDAsync") == work.count("cuMemcpyDtoHAsync") == 1


def test_integers_that_tensorrt_lacks_are_converted_if_they_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch, VERSION)
    more = (TensorInfo("ids", "int64", (3,)), TensorInfo("count", "int64", (1,)))
    feeds = {"x": X, "ids": np.array([1, 2, 3]), "count": np.array([4])}
    with Session(engine(more=more)) as session:
        assert (session.run(feeds)["y"] == 2 * X).all()
        with pytest.raises(InputError, match="values that TensorRT cannot take"):
            session.run({**feeds, "ids": np.array([1, 2, 1 << 40])})


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ({"version": "10.8.0.1"}, "TensorRT 10.8.0.1 .here is 10.9.0.34"),
        ({"gpu": "sm80"}, "GPU for sm80 .here is sm89"),
    ],
)
def test_another_version_or_gpu_is_refused_before_anything_is_loaded(
    which: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cuda = plant(monkeypatch, VERSION)
    made = engine(**which)
    with pytest.raises(UnsupportedError, match=message) as caught:
        Session(made)
    assert "twofour build MODEL.onnx -o E.engine --target tensorrt" in caught.value.fix
    assert missing_features(made.plan.target)
    assert cuda.calls == []


def test_an_engine_for_all_from_ampere_on_runs_on_a_newer_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch, VERSION)
    with Session(engine("ampere+")) as session:
        assert session.run({"x": X})["y"].shape == X.shape


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, VERSION, gpu=None)
    with pytest.raises(UnsupportedError, match="missing: GPU for sm89"):
        Session(engine())


def test_what_tensorrt_refuses_is_an_error_and_frees_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, cuda = plant(monkeypatch, VERSION)
    with pytest.raises(EngineError, match=r"TensorRT 10.9.0.34 refuses the engine"):
        Session(engine(content=b"broken"))
    assert not cuda.streams
    with Session(engine()) as session:
        module.told["fails"] = True
        with pytest.raises(EngineError, match="did not run"):
            session.run({"x": X})
        module.told["fails"] = False
        module.told["open"] = True
        with pytest.raises(UnsupportedError, match="depends on the data"):
            session.run({"x": X})
        module.told["open"] = False
        with pytest.raises(EngineError, match=r"does not take 'x' of shape \[9, 12\]"):
            session.run({"x": np.ones((9, 12), np.float32)})
        assert (session.run({"x": X})["y"] == 2 * X).all()


def test_an_error_of_cuda_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    _, cuda = plant(monkeypatch, VERSION)
    with Session(engine()) as session:
        cuda.fails["cuMemAlloc"] = 2
        with pytest.raises(UnsupportedError, match="no room for memory on A GPU") as caught:
            session.run({"x": X})
        assert "CUDA_ERROR_OUT_OF_MEMORY (2): out of memory" in str(caught.value)
        cuda.fails.clear()
        assert (session.run({"x": X})["y"] == 2 * X).all()


def test_the_layers_of_a_network_are_not_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, VERSION)
    with Session(engine()) as session:
        with pytest.raises(UnsupportedError, match="layer by layer"):
            list(session.walk({"x": X}))
        with pytest.raises(UnsupportedError, match="clock"):
            session.timeline({"x": X})
        assert len(session.step_times_us({"x": X}, 3)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensorrt": None}, "contradicts"),
        ({"isa": "vector"}, "contradicts"),
        ({"tensorrt": TensorRT("sm89", "tensorrt", "")}, "which TensorRT and which GPU"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(
    change: dict[str, object], message: str, tmp_path
) -> None:
    made = engine()
    object.__setattr__(made.plan, "target", Target(**(vars(made.plan.target) | change)))
    with pytest.raises(EngineError, match=message):
        Engine.load(made.save(tmp_path / "e.engine"))


def test_the_file_keeps_version_and_gpu(tmp_path) -> None:
    made = engine()
    loaded = Engine.load(made.save(tmp_path / "e.engine"))
    assert loaded.plan == made.plan
    assert loaded.plan.target.tensorrt == TensorRT("sm89", "tensorrt", VERSION)
    assert loaded.code["tensorrt"].tobytes() == b"engine"
