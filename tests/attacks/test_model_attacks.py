"""Hostile models: a few bytes that ask for too much, or contradict themselves; one error each.

All run in processes with limits on memory and time (tests/fuzz/worker.py), so that a bound that
does not hold is a failure here and not the end of the test run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from typer.testing import CliRunner

from tests.fuzz.judge import Judge, judging
from twofour.cli import app
from twofour.core.errors import InputError
from twofour.onnx_tools.load import load_model

HEAD = '<ir_version: 9, opset_import: ["" : {opset}, "l" : 1]>'
SUM = " r = ReduceSum <keepdims = 0> (c) y = Add (x, r) }"
LOOP = """(float[2,4] x) => (float[a,b] y) {{ y{more} = Loop (n, t, x) <
    body = step (int64 i, bool go, float[2,4] v) => (bool on, float[2,4] u{stack}) {{
        on = Identity (go) u = Add (v, v) {fill} }}> }}"""


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    """How a model ends."""
    with judging() as ask:
        yield ask


def model(body: str, opset: int = 17, functions: str = "", **constants: object) -> onnx.ModelProto:
    """A model from text; constants are arrays or what numpy makes one of."""
    body = body if body.startswith("(") else f"(float[2,4] x) => (float[a,b] y) {{ {body}"
    proto = parser.parse_model(f"{HEAD.format(opset=opset)} g {body} {functions}")
    for name, value in constants.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    for node in proto.graph.node:
        node.name = f"node_{node.output[0]}"
    return proto


def calls(depth: int) -> str:
    """Functions that call the next one twice."""
    text = '<domain: "l", opset_import: ["" : 17, "l" : 1]> '
    bodies = [text + "f0 (p) => (q) { t = Relu (p) q = Relu (t) }"]
    for i in range(1, depth):
        bodies.append(text + f"f{i} (p) => (q) {{ t = l.f{i - 1} (p) q = l.f{i - 1} (t) }}")
    return "\n".join(bodies)


def chain(count: int) -> str:
    """Large constants, each the sum of the one before with itself."""
    adds = [f"c{i + 1} = Add (c{i}, c{i})" for i in range(count)]
    sums = [f"r{i} = ReduceSum <keepdims = 0> (c{i})" for i in range(1, count)]
    reads = ", ".join(f"r{i}" for i in range(1, count))
    return f"c0 = Expand (o, s) {' '.join(adds + sums)} y = Sum (x, {reads}) }}"


def sparse(dims: list[int], index: int = 0) -> onnx.ModelProto:
    proto = model("y = Add (x, w) }")
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    places = helper.make_tensor("", TensorProto.INT64, [1], [index])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, dims))
    return proto


def sparse_constant(dims: list[int], index: int = 0) -> onnx.ModelProto:
    proto = model("w = Constant <value_float = 1.0> () y = Add (x, w) }")
    held = sparse(dims, index).graph.sparse_initializer[0]
    proto.graph.node[0].attribute[0].CopyFrom(helper.make_attribute("sparse_value", held))
    return proto


def behind(first: str, then: str = "", functions: str = "", **constants: object) -> onnx.ModelProto:
    """`first` makes c of an image x; s = Slice (c), then what else there is, and y."""
    text = f"(float[1,4,h,w] x) => (float[a,b,c,d] y) {{ {first} "
    text += then or "s = Slice (c, b, e) y = Relu (s) }"
    kernel = np.ones((4, 4, 5, 5), np.float32)
    given = {"k": kernel, "b": [0, 0, 0, 0], "e": [1, 1, 1, 1], **constants}
    used = {name: value for name, value in given.items() if re.search(rf"[(,] ?{name}\b", text)}
    return model(text, functions=functions, **used)


def sized(proto: onnx.ModelProto, size: int) -> onnx.ModelProto:
    """The model for images of one size."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    for axis in (2, 3):
        fixed.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size
    return fixed


def stored(**changes: object) -> onnx.ModelProto:
    """A model whose weight says other things than it holds."""
    proto = model("y = MatMul (x, w) }", w=np.ones((4, 4), np.float32))
    for key, value in changes.items():
        if key == "dims":
            proto.graph.initializer[0].dims[:] = value  # type: ignore[assignment]
        else:
            setattr(proto.graph.initializer[0], key, value)
    return proto


def declared(**changes: object) -> onnx.ModelProto:
    proto = model("y = Relu (x) }")
    shape = proto.graph.input[0].type.tensor_type.shape
    for axis, size in enumerate(changes["dims"]):  # type: ignore[arg-type]
        shape.dim[axis].dim_value = size
    return proto


ONE, HUGE = np.float32(1), 2**18
BOMBS = {
    "ConstantOfShape": (model("c = ConstantOfShape (s)" + SUM, s=[2**20, 2**20]), "node_c"),
    "Expand": (model("c = Expand (o, s)" + SUM, o=ONE, s=[HUGE, HUGE]), "node_c"),
    "Tile": (model("c = Tile (o, s)" + SUM, o=[ONE], s=[2**40]), "node_c"),
    "Range": (model("c = Range (a, b, d) f = Cast <to = 1> (c)"
                    + SUM.replace("(c)", "(f)"), a=0, b=2**40, d=1), "node_c"),
    "Pad": (model("c = Pad (x, p)" + SUM, p=[0, 0, 2**30, 2**30]), "node_c"),
    "Resize": (model("c = Resize (x, , s)" + SUM, s=np.float32([1e5, 1e6])), "node_c"),
    "broadcast": (model("c = Add (v, w)" + SUM, v=np.ones((HUGE, 1), np.float32),
                        w=np.ones((1, HUGE), np.float32)), "node_c"),
    "outer": (model("c = MatMul (v, w)" + SUM, v=np.ones((HUGE, 1), np.float32),
                    w=np.ones((1, HUGE), np.float32)), "node_c"),
    "OneHot": (model("c = OneHot (i, d, v)" + SUM, i=np.arange(100), d=2**31,
                     v=np.float32([0, 1])), "node_c"),
    "Einsum": (model('c = Einsum <equation = "ab,cd->abcd"> (v, v)' + SUM,
                     v=np.ones((600, 600), np.float32)), "node_c"),
    "stacked": (model(LOOP.format(more=", z", stack=", float[2,4] s", fill="s = Add (v, v)"),
                      n=10**12, t=True), "node_y"),
    "pads": (model("(float[1,4,2,2] x) => (float[a,b,c,d] y) "
                   "{ y = Conv <pads = [99999,99999,99999,99999]> (x, w) }",
                   w=np.ones((64, 4, 1, 1), np.float32)), "node_y"),
    "input": (declared(dims=[2**40, 2**20]), "input 'x'"),
    "overflow": (declared(dims=[2**62, 2**62]), "input 'x'"),
    "sparse": (sparse([2**20, 2**20]), "sparse initializer 'w'"),
    "outputs": (model("y = Split <num_outputs = 1099511627776> (x) }", opset=18), "node_y"),
    "functions": (model("y = l.f39 (x) }", functions=calls(40)), "50000 operators"),
}  # fmt: skip

SHRUNK = {
    "Conv": behind("c = Conv (x, k)"),
    "pool": behind("c = MaxPool <kernel_shape = [5,5]> (x)"),
    "Pad": behind("c = Pad (x, p)", p=[0, 0, -3, 0, 0, 0, 0, 0]),
    "two": behind("c = Conv (x, z)", "s = Slice (c, b, e) t = Conv (s, k) "
                  "u = Slice (t, b, e) y = Relu (u) }",
                  z=np.ones((4, 4, 1, 1), np.float32), e=[1, 4, 7, 7]),
    "GatherND": behind("c = Conv (x, k)", "t = Transpose <perm = [0,1,3,2]> (c) i = Cast <to = 7> "
                       "(t) s = GatherND (x, i) y = Relu (s) }"),
    "If": behind("c = Conv (x, k)", "m = ReduceMax <keepdims = 0> (x) g = Cast <to = 9> (m) "
                 "y = If (g) < then_branch = yes () => (float[q,r,s,t] p) { p = Slice (c, b, e) }, "
                 "else_branch = no () => (float[u,v,w,z] q) { q = Relu (c) }> }"),
    "inside": behind("", "m = ReduceMax <keepdims = 0> (x) g = Cast <to = 9> (m) "
                     "y = If (g) < then_branch = yes () => (float[q,r,s,t] p) "
                     "{ c = Conv (x, k) p = Slice (c, b, e) }, "
                     "else_branch = no () => (float[u,v,w,z] q) { q = Relu (x) }> }"),
    "function": behind("c = Relu (x)", "y = l.shrink (c, k, b, e) }",
                       '<domain: "l", opset_import: ["" : 17]> shrink (p, k, b, e) => (q) '
                       "{ c = Conv (p, k) s = Slice (c, b, e) q = Relu (s) }"),
}  # fmt: skip
CRASHES = {
    "axis": (model("y, m = LayerNormalization <axis = 2147483648> (x, g) }",
                   g=np.ones(4, np.float32)), "axis is 2147483648"),
    "axis of a function": (
        model("y = l.norm <k = 2147483648> (x, g) }", g=np.ones(4, np.float32),
              functions='<domain: "l", opset_import: ["" : 17]> norm <k> (p, s) => (q) '
              "{ q, m = LayerNormalization <axis: int = @k> (p, s) }"), "k is 2147483648"),
    "batches": (model("y = GatherND <batch_dims = -3> (x, i) }", i=[[0]]), "batch_dims is -3"),
    "outputs": (model("y = Split <num_outputs = -1099511627776> (x) }", opset=18), "num_outputs"),
    "dimensions": (model("(float[2,4] x, int64[1099511627776] s) => (float[a,b] y) "
                         "{ y = Expand (x, s) }"), "too many dimensions"),
}  # fmt: skip

CONTRADICTIONS = {
    "no value": (model("c = Constant () y = Add (x, c) }"), "Constant 'node_c': expected one"),
    "negative result": (model("p = Pad (x, a) y = Slice (p, b, e) }",
                              a=[0, -9, 0, 0], b=[0, 0], e=[1, 1]), "'p' has a negative"),
    "cycle": (model("a = Add (x, b) b = Relu (a) y = Relu (b) }"), "node_a"),
    "dangling": (model("y = Add (x, nowhere) }"), "node_y"),
    "twice": (model("y = Relu (x) y = Relu (x) }"), "'y' has been used"),
    "unknown operator": (model("y = Frobnicate (x) }"), "Frobnicate"),
    "recursion": (model("y = l.f0 (x) }", functions=calls(1).replace("Relu (p)", "l.f0 (p)")),
                  "f0"),
    "no output": (model("z = Relu (x) }"), "'y'"),
    "shapes": (model("y = MatMul (x, w) }", w=np.ones((5, 3), np.float32)), "node_y"),
    "types": (model("y = MatMul (x, w) }", w=np.ones((4, 4), np.int8)), "node_y"),
    "strides": (model("(float[1,4,2,2] x) => (float[a,b,c,d] y) "
                      "{ y = Conv <strides = [0,0]> (x, w) }",
                      w=np.ones((4, 4, 1, 1), np.float32)), "node_y"),
    "short data": (stored(raw_data=b"1234"), "tensor 'w'"),
    "long dims": (stored(dims=[2**31, 4]), "tensor 'w'"),
    "negative dims": (stored(dims=[-4, 4]), "tensor 'w'"),
    "type of a tensor": (stored(data_type=99), "tensor 'w'"),
    "texts as bytes": (stored(data_type=TensorProto.STRING), "tensor 'w'"),
    "negative input": (declared(dims=[-3]), "'x' has a negative dimension"),
    "sparse index": (sparse([2, 4], 8), "sparse initializer 'w'"),
    "sparse dims": (sparse([-2, 4]), "sparse initializer 'w'"),
    "sparse value": (sparse_constant([2, 4], 8), "the sparse value of Constant 'node_w'"),
}  # fmt: skip

HARMLESS = {
    "NaN": model("y = MatMul (x, w) }", w=np.full((4, 4), np.nan, np.float32)),
    "infinite": model("y = MatMul (x, w) }", w=np.full((4, 4), np.inf, np.float32)),
    "nothing": declared(dims=[0]),
    "names": model("y = Relu (x) }"),
    "symbol": model("(float[n,4] x) => (float[a,b] y) { y = Relu (x) }"),
    "long": model(" ".join(f"t{i + 1} = Relu (t{i})" for i in range(500)).replace("t0)", "x)")
                  + " y = Relu (t500) }"),
    "deep": model(" ".join(f"t{i + 1} = Transpose (t{i})" for i in range(1200))
                  + " y = MatMul (x, t1200) }", t0=np.ones((4, 4), np.float32)),
    "no shape": model("y = Relu (x) }"),
    "large constants, one after the other": model(chain(8), o=ONE, s=[2**12, 2**13]),
}  # fmt: skip
HARMLESS["symbol"].graph.input[0].type.tensor_type.shape.dim[0].dim_param = "9**9**9**9"
HARMLESS["no shape"].graph.output[0].type.tensor_type.ClearField("shape")
HARMLESS["names"].graph.node[0].name = "\x1b[2J../../etc/\x07"


def ended(judge, proto, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    assert path.stat().st_size < 3_000_000
    return judge(path)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_go_off(name, judge, tmp_path):
    proto, where = BOMBS[name]
    found = ended(judge, proto, tmp_path)
    assert found["end"] == "refused", found
    assert found["stage"] in ("load", "build"), found
    assert where in found["text"]


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused_by_name(name, judge, tmp_path):
    proto, where = CONTRADICTIONS[name]
    found = ended(judge, proto, tmp_path)
    assert found["end"] == "refused", found
    assert found["stage"] in ("load", "build"), found
    assert where in found["text"]


@pytest.mark.parametrize("name", SHRUNK)
@pytest.mark.parametrize("size", [None, 2], ids=["open", "declared"])
def test_what_shrinks_to_nothing_before_a_slice_is_named(name, size, judge, tmp_path):
    """Open height and width become 1; onnx's inference would end the process."""
    proto = SHRUNK[name] if size is None else sized(SHRUNK[name], size)
    found = ended(judge, proto, tmp_path)
    assert found["end"] == "refused", found
    assert "nothing to compute at these shapes" in found["text"]
    assert "--shapes" in found["text"]


@pytest.mark.parametrize("name", sorted(set(SHRUNK) - {"GatherND"}))
def test_what_does_not_shrink_to_nothing_runs(name, judge, tmp_path):
    found = ended(judge, sized(SHRUNK[name], 9), tmp_path)
    assert found["end"] == "passed", found


@pytest.mark.parametrize("name", CRASHES)
def test_what_crashes_inference_is_refused_before(name, judge, tmp_path):
    proto, where = CRASHES[name]
    found = ended(judge, proto, tmp_path)
    assert (found["end"], found["stage"]) == ("refused", "load"), found
    assert where in found["text"]


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_looks_odd_runs(name, judge, tmp_path):
    found = ended(judge, HARMLESS[name], tmp_path)
    assert found["end"] == "passed", found


def test_a_loop_that_never_ends_is_built_and_ends(judge, tmp_path):
    proto = model(LOOP.format(more="", stack="", fill=""), n=10**12, t=True)
    found = ended(judge, proto, tmp_path)
    assert (found["end"], found["stage"]) == ("refused", "run")
    assert "terminate flag" in found["text"]


def test_devices_and_pipes_are_no_models(tmp_path):
    os.mkfifo(tmp_path / "m.onnx")
    for path in (tmp_path / "m.onnx", "/dev/zero"):
        with pytest.raises(InputError, match="is a device or a pipe"):
            load_model(path)


def test_messages_and_tables_hold_no_control_characters(tmp_path):
    evil = "\x1b]0;evil\x07"
    for body in ("y = Add (x, nowhere) }", "y = Cos (x) }"):
        proto = model(body)
        proto.graph.node[0].name = evil
        (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
        result = CliRunner().invoke(app, ["inspect", str(tmp_path / "m.onnx"), "--all"])
        assert result.exit_code in (0, 2)
        assert "evil" in result.output
        assert not {"\x1b", "\x07"} & set(result.output)
