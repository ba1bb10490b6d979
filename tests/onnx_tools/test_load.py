"""Files in and out: real files, every kind of damage, and nothing left behind."""

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.sample_models import conv_model
from twofour.core.errors import InputError, UnsupportedError
from twofour.onnx_tools import load
from twofour.onnx_tools.load import load_model, save_model


@pytest.fixture
def path(tmp_path):
    return conv_model(tmp_path / "m.onnx")


def refused(*parts, error=InputError):
    return pytest.raises(error, match="(?s)" + ".*".join(parts))


def test_files_of_many_exporters_load(data_folder):
    files = [f for f in sorted((data_folder / "onnx").glob("*.onnx")) if "BROKEN" not in f.name]
    assert len(files) >= 12
    for file in files:
        model = load_model(file)
        assert model.graph.num_nodes() > 0
        assert not {v.name for v in model.graph.inputs} & set(model.graph.initializers)
        assert all(node.name for node in model.graph.all_nodes())


def test_float_conv_with_int8_weights_is_refused(data_folder):
    with refused(
        "BROKEN_mlperftiny_kws.onnx gives operators types",
        "Conv '.*functional_1/conv2d/Conv2D1': input W .* is tensor.int8., expected",
        "fix: convert the model again; int8 weights need a DequantizeLinear",
    ) as caught:
        load_model(data_folder / "onnx" / "BROKEN_mlperftiny_kws.onnx")
    assert len(caught.value.reasons) == 5


def test_missing_file(tmp_path):
    with refused("no model at .*absent.onnx", "there is no such file"):
        load_model(tmp_path / "absent.onnx")


def test_directory(tmp_path):
    with refused("is a directory"):
        load_model(tmp_path)


def test_text_file(tmp_path):
    (tmp_path / "m.onnx").write_text("hello, I am\nnot a model")
    with refused("m.onnx is a text file", "got 'hello, I am'"):
        load_model(tmp_path / "m.onnx")


def test_git_lfs_pointer(tmp_path):
    (tmp_path / "m.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with refused("Git LFS pointer", "git lfs pull"):
        load_model(tmp_path / "m.onnx")


@pytest.mark.parametrize("content", [b"", b"\n", bytes(1000), bytes(range(256)) * 4, b"\x7fELF"])
def test_bytes_that_are_no_model(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(InputError):
        load_model(tmp_path / "m.onnx")


def test_too_large(path, monkeypatch):
    monkeypatch.setattr(load, "MAX_MODEL_BYTES", 500)
    with refused("is too large", "at most", error=UnsupportedError):
        load_model(path)


def test_every_truncation_is_refused(path):
    whole = path.read_bytes()
    for size in range(0, len(whole), 13):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            load_model(path)


def test_altered_bytes_never_crash(path):
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    outcomes = {"refused": 0, "loaded": 0}
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            model = load_model(path)
        except (InputError, UnsupportedError):
            outcomes["refused"] += 1
        else:
            outcomes["loaded"] += 1
            ir.to_proto(model).SerializeToString()
            for value in model.graph.initializers.values():
                value.const_value.numpy()
    assert min(outcomes.values()) > 10


def write(path, nodes, inputs=(), outputs=(), initializers=(), **options):
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 4]) for n in inputs],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, None]) for n in outputs],
        list(initializers),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], **options)
    path.write_bytes(model.SerializeToString())
    return path


def test_invalid_graph(tmp_path):
    nodes = [helper.make_node("Relu", ["nowhere"], ["y"], name="act")]
    with refused("not a valid ONNX model", "nowhere"):
        load_model(write(tmp_path / "m.onnx", nodes, ["x"], ["y"]))


def test_unknown_operator(tmp_path):
    nodes = [helper.make_node("Frobnicate", ["x"], ["y"])]
    with refused("not a valid ONNX model", "Frobnicate"):
        load_model(write(tmp_path / "m.onnx", nodes, ["x"], ["y"]))


@pytest.mark.parametrize(
    ("op_type", "weight", "expected"),
    [
        (
            "Gemm",
            np.ones((4, 3), np.int8),
            r"Gemm 'layer': input B 'w' is tensor\(int8\), expected",
        ),
        ("MatMul", np.ones((4, 3), np.int32), r"input B 'w' is tensor\(int32\), but input A is"),
        (
            "MatMul",
            np.ones((4, 3), np.float64),
            r"tensor\(double\), but input A is tensor\(float\)",
        ),
        ("Concat", np.ones((2, 4), np.int64), r"Concat 'layer': input inputs 'w' is tensor\(int64"),
    ],
)
def test_types_that_do_not_meet(tmp_path, op_type, weight, expected):
    attributes = {"axis": 0} if op_type == "Concat" else {}
    node = helper.make_node(op_type, ["x", "w"], ["y"], name="layer", **attributes)
    file = write(tmp_path / "m.onnx", [node], ["x"], ["y"], [numpy_helper.from_array(weight, "w")])
    onnx.checker.check_model(str(file))
    with refused("gives operators types that they do not take", expected):
        load_model(file)


def test_other_domains_are_taken_as_they_are(tmp_path):
    node = helper.make_node("Anything", ["x"], ["y"], domain="my.company", name="mine")
    file = write(tmp_path / "m.onnx", [node], ["x"], ["y"])
    model = onnx.load(str(file))
    model.opset_import.append(helper.make_opsetid("my.company", 1))
    onnx.save(model, str(file))
    assert [n.op_type for n in load_model(file).graph] == ["Anything"]


def test_initializers_among_the_inputs_are_taken_off(tmp_path):
    node = helper.make_node("Add", ["x", "w"], ["y"])
    weight = numpy_helper.from_array(np.ones((2, 4), np.float32), "w")
    file = write(tmp_path / "m.onnx", [node], ["x", "w"], ["y"], [weight])
    assert [value.name for value in load_model(file).graph.inputs] == ["x"]


def test_nodes_without_a_name_get_one(tmp_path):
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    names = [node.name for node in load_model(write(tmp_path / "m.onnx", nodes, "x", "y")).graph]
    assert all(names)
    assert len(set(names)) == 2


@pytest.fixture
def external(tmp_path):
    """A model with its weight in w.bin, and a function that edits where that is."""
    weight = np.arange(8, dtype=np.float32).reshape(2, 4)
    (tmp_path / "w.bin").write_bytes(bytes(16) + weight.tobytes())
    file = tmp_path / "m.onnx"

    def make(dims=(2, 4), **where):
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in ({"location": "w.bin", "offset": 16, "length": 32} | where).items():
            if value is not None:
                tensor.external_data.add(key=key, value=str(value))
        node = helper.make_node("Add", ["x", "w"], ["y"], name="add")
        return write(file, [node], ["x"], ["y"], [tensor])

    return make


@pytest.mark.parametrize("where", [{}, {"length": None}])
def test_external_data_is_read_into_memory(external, tmp_path, where):
    model = load_model(external(**where))
    (tmp_path / "w.bin").unlink()
    saved = load_model(save_model(model, tmp_path / "copy.onnx"))
    assert np.array_equal(
        saved.graph.initializers["w"].const_value.numpy(), np.arange(8).reshape(2, 4)
    )


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ({"location": "absent.bin"}, "there is no file .*absent.bin"),
        ({"location": "../w.bin"}, "expected a file inside"),
        ({"location": "/etc/passwd"}, "expected a file inside"),
        ({"location": ""}, "expected a file inside"),
        ({"offset": 17}, "expected 49 bytes in .*w.bin, got 48"),
        ({"offset": -16}, "offset.*-16"),
        ({"offset": 10**18}, "expected 10{16}32 bytes"),
        ({"length": 31}, "expected 32 bytes, got offset 16 and length 31"),
        ({"length": -1}, "length.*-1"),
        ({"offset": "many"}, "many"),
        ({"dims": (2, 5), "length": 40}, "expected 56 bytes"),
        ({"dims": (10**9, 10**9), "length": None}, "expected 4000000000000000016 bytes"),
        ({"dims": (-2, 4), "length": None}, "got offset"),
    ],
)
def test_external_data_that_is_not_there(external, where, reason):
    with refused("external data of .*m.onnx cannot be read", "tensor 'w': ", reason):
        load_model(external(**where))


def test_a_link_out_of_the_folder_is_refused(external, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "w.bin").symlink_to(tmp_path / "w.bin")
    moved = folder / "m.onnx"
    os.replace(external(), moved)
    with refused("expected a file inside"):
        load_model(moved)


def test_save_then_load_gives_the_same_model(path, tmp_path):
    model = load_model(path)
    copy = load_model(save_model(model, tmp_path / "copy.onnx"))
    assert ir.to_proto(copy) == ir.to_proto(model)


def test_saving_replaces_the_file_and_leaves_no_other(path, tmp_path):
    model = load_model(path)
    path.write_text("old")
    save_model(model, path)
    load_model(path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_a_saved_file_is_as_readable_as_any(path, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    save_model(load_model(path), tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").stat().st_mode == plain.stat().st_mode


def test_saving_where_one_cannot(path, tmp_path):
    model = load_model(path)
    with refused("cannot write", "choose an existing, writable folder"):
        save_model(model, tmp_path / "nowhere" / "m.onnx")
    (tmp_path / "folder").mkdir()
    with refused("cannot write"):
        save_model(model, tmp_path / "folder")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "m.onnx"]


def test_saving_what_is_too_large_leaves_nothing(path, tmp_path, monkeypatch):
    model = load_model(path)
    monkeypatch.setattr(load, "MAX_MODEL_BYTES", 500)
    with refused("is too large", error=UnsupportedError):
        save_model(model, tmp_path / "copy.onnx")
    assert [file.name for file in Path(tmp_path).iterdir()] == ["m.onnx"]
