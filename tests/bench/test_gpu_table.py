"""The table of networks on a GPU: processes that take turns or end, figures and their goals."""

import json

import numpy as np
import pytest

from benchmarks import cuda_accuracy, cuda_networks
from benchmarks.cuda import page
from benchmarks.cuda.cases import WORKS, pruned_model
from benchmarks.cuda.started import started
from benchmarks.cuda.turns import Lost, Process
from benchmarks.document import about
from tests.bench.fake_side import Fake
from tests.cuda_engines import COUNT, KEPT, MIDDLE, W, X, Y, cuda_engine, launch, mixed_engine
from tests.fake_cuda import H200, plant_driver
from twofour.core.cuda_program import CudaProgram, Transfer
from twofour.core.patterns import is_pattern
from twofour.runtime.session import Session

NAMES = {
    "int8 2:4": 80.0,
    "int8 dense": 100.0,
    "torch eager f32": 500.0,
    "torch compile fp16": 120.0,
}


@pytest.mark.parametrize("in_place", [False, True])
def test_a_session_is_timed_without_the_copies_of_the_host(monkeypatch, in_place):
    fake = plant_driver(monkeypatch, (H200,))
    after = X if in_place else MIDDLE
    turns = [launch("double", 0, X, after), launch("add", 1, after, KEPT, Y)]
    program = CudaProgram.of(turns, (Transfer("x", X),), (Transfer("y", Y),))
    x = np.linspace(-1, 1, COUNT, dtype=np.float32)
    with Session(cuda_engine(program)) as session:
        session.run({"x": x})
        run = started(session, {"x": x})
        at = session._gpu.arena + Y.offset
        for _ in range(3):
            session._gpu.device.fill(at, 0, Y.size_bytes, session._gpu.stream)
            run.wait()
            fake.calls.clear()
            run.launch()
            run.wait()
            got = np.empty_like(x)
            session._gpu.device.from_gpu(got, at, session._gpu.stream)
            run.wait()
            assert (got == 2 * x + W).all(), "the input was not what it was"
        moved = x.nbytes if in_place else 0
        assert run.memory_bytes == session.engine.weights.nbytes + 768 + moved
        assert run.note == ("1 inputs copied within the GPU in each run" if in_place else "")


def test_a_session_that_is_partly_on_the_host_says_so(monkeypatch):
    plant_driver(monkeypatch, (H200,))
    x = np.linspace(-1, 1, COUNT, dtype=np.float32)
    with Session(mixed_engine()) as session:
        session.run({"x": x})
        run = started(session, {"x": x})
        run.launch()
        assert run.note == "3 steps, not all of them on the GPU: timed with all copies"


@pytest.fixture
def process(tmp_path):
    made = Process(Fake, "the fake", tmp_path / "log.txt")
    yield made
    made.end()


def test_a_contestant_is_opened_timed_and_read(process, tmp_path):
    (opened,) = process.ask("open", "n", 4, "good", timeout_s=60)
    assert opened["name"] == "good"
    assert opened["memory_bytes"] == 12
    assert process.ask("turn", "good", 0.02, timeout_s=60) > 1000
    assert process.ask("latency", "good", timeout_s=60) > 1000
    process.ask("outputs", "good", tmp_path / "o.npz", timeout_s=60)
    (found,) = page.read_outputs(tmp_path / "o.npz")
    assert found.tolist() == [[4.0] * 3] * 2
    process.ask("close", timeout_s=60)
    assert isinstance(process.ask("turn", "good", 0.02, timeout_s=60), Lost)
    assert "turn good" in (tmp_path / "log.txt").read_text()


def test_what_goes_wrong_is_a_reason_and_the_next_one_goes_on(process):
    reasons = [process.ask("open", "n", 1, kind, timeout_s=60) for kind in ("fails", "ends")]
    reasons.append(process.ask("open", "n", 1, "hangs", timeout_s=0.3))
    assert [each.reason for each in reasons] == [
        "ValueError: it cannot be opened",
        "the process of the fake ended with code 3",
        "not done within 0 s",
    ]
    assert process.ask("open", "n", 1, "good", timeout_s=60)[0]["name"] == "good"


def row(network="resnet34", batch=32):
    contestants = [
        {"name": n if "torch" in n else f"twofour {n}", "us": us, "latency_us": 2 * us}
        for n, us in NAMES.items()
    ]
    contestants[0] |= {"memory_bytes": 40, "joules": 1.0}
    contestants[2] |= {"memory_bytes": 100, "joules": 2.0}
    made = {"network": network, "batch": batch, "contestants": contestants}
    rounds = {each["name"]: [each["us"], each["us"] * 1.5] for each in contestants}
    return {**made, "figures": page.judged(made, rounds)}


def test_figures_stand_beside_their_goals_reached_or_not():
    found = row()
    assert found["figures"] == {
        "eager": 6.25,
        "latency": 6.25,
        "memory": 60.0,
        "joules": 2.0,
        "compiled": 1.5,
        "dense": 1.25,
        "sparse_int8": 1.25,
    }
    text = "\n".join(page.verdicts(found))
    assert "6.25 times as fast as PyTorch f32 eager (goal 4.3: reached)" in text
    assert "2.00 times fewer joules than PyTorch f32 eager (goal 3: MISSED)" in text
    assert "INT8 2:4 over INT8 dense" in text
    assert "INT8 2:4 over INT8 dense" not in "\n".join(page.verdicts(row("bert")))
    assert "torch.compile" not in "\n".join(page.verdicts(row(batch=1)))
    del found["contestants"][0]["us"]
    assert page.judged(found, {}) == {}


def test_closeness_tells_directions_classes_and_shapes():
    wanted = [np.array([[1.0, 0.0], [0.0, 1.0]])]
    assert page.closeness(wanted, wanted, True) == {"cosine": pytest.approx(1.0), "top1": 1.0}
    turned = [np.array([[0.0, 1.0], [0.0, 1.0]])]
    assert page.closeness(turned, wanted, True) == {"cosine": pytest.approx(0.5), "top1": 0.5}
    assert "top1" not in page.closeness(wanted, wanted, False)
    assert "wrong" in page.closeness([wanted[0][:1]], wanted, True)


def test_everybody_runs_the_same_sparse_weights():
    first, second = (pruned_model(WORKS["small_mlp"]) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert np.array_equal(a.detach().numpy(), b.detach().numpy())
        assert is_pattern(a.detach().numpy(), "2:4")


@pytest.mark.slow
def test_a_small_table_on_the_cpu_and_rows_that_are_kept(tmp_path, capsys):
    words = ["--output", str(tmp_path), "--device", "cpu", "--effort", "0", "--rounds", "3"]
    words += ["--networks", "small_mlp", "--energy-seconds", "0", "--kinds", "2:4"]
    words += ["--plans", str(tmp_path / "plans")]
    for batch in ("4", "2"):
        assert cuda_networks.main([*words, "--batches", batch]) == 0
    document = json.loads((tmp_path / "cuda_networks.json").read_text())
    assert [each["batch"] for each in document["rows"]] == [2, 4]
    for each in document["rows"]:
        found = {one["name"]: one for one in each["contestants"]}
        assert set(found) == {"torch eager f32", "twofour int8 2:4", "twofour f32 2:4"}
        assert all(one["us"] > 0 for one in found.values())
        assert found["twofour f32 2:4"]["cosine"] > 0.99999
        assert found["twofour int8 2:4"]["cosine"] > 0.99
        assert {"eager", "latency"} <= set(each["figures"])
    plan = json.loads((tmp_path / "plans" / "small_mlp-twofour-int8-24-4.json").read_text())
    assert {layer["tactic"] for layer in plan["layers"]} > {"pointwise"}
    text = (tmp_path / "cuda_networks.md").read_text()
    assert "## small_mlp, batch 4 (tokens)" in text
    assert "goal 4.3" in capsys.readouterr().out


def test_the_page_of_accuracy_has_what_was_refused():
    rows = [{"kind": "int8", "top1": 0.9, "cosine": 0.99}, {"kind": "fp8", "reason": "no | such"}]
    document = about("Accuracy", "cuda_accuracy", [], ["a GPU"], ["numpy"])
    text = cuda_accuracy.page({**document, "networks": {"net": rows}})
    assert "| net | int8 | 90.00 % | 0.990000 |  |  |" in text
    assert "| net | fp8 |  |  |  | no / such |" in text


def test_a_network_that_cannot_be_judged_says_why(tmp_path):
    words = ["--output", str(tmp_path / "out"), "--data", str(tmp_path), "--device", "cpu"]
    for seconds, reason in (("60", "FileNotFoundError"), ("4", "no time was left")):
        assert cuda_accuracy.main([*words, "--only", "resnet8", "--seconds", seconds]) == 0
        document = json.loads((tmp_path / "out" / "cuda_accuracy.json").read_text())
        (row,) = document["networks"]["resnet8"]
        assert reason in row["reason"]


def test_tables_of_several_gpus_are_joined(tmp_path):
    head = {"title": "T", "command": "python", "version": "0", "device": ["A"], "tools": {}}
    parts = {"a": [row("bert"), row("bert", 1)], "b": [row("resnet50"), row("bert", 1)]}
    parts["b"][1]["seconds"] = 7.0
    for name, rows in parts.items():
        (tmp_path / name).write_text(json.dumps({**head, "rows": rows}))
    words = ["--output", str(tmp_path / "out"), "--add", str(tmp_path / "a"), str(tmp_path / "b")]
    assert cuda_networks.main(words) == 0
    rows = json.loads((tmp_path / "out" / "cuda_networks.json").read_text())["rows"]
    assert [(each["network"], each["batch"]) for each in rows] == [
        ("bert", 1),
        ("bert", 32),
        ("resnet50", 32),
    ]
    assert rows[0]["seconds"] == 7.0
    text = (tmp_path / "out" / "cuda_networks.md").read_text()
    assert "| bert | 1 | int8 2:4 | 80 | 6.25x | 1.50x | 1.25x | 60 % | 2.00x |  |" in text
