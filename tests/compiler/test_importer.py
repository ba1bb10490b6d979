"""Import: static shapes, one form of everything, and errors a user can act on."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.graphs import graph, op_types, run
from twofour.compiler import importer
from twofour.compiler.importer import import_graph
from twofour.core.errors import InputError, UnsupportedError
from twofour.onnx_tools.upgrade import UPGRADE_TO


def model(body, opset=18, functions="", domains="", ir_version=10):
    text = f'<ir_version: {ir_version}, opset_import: ["": {opset}{domains}]> g {body} {functions}'
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


def shapes(imported):
    return {
        value.name: tuple(value.shape)
        for value in [*imported.graph.inputs, *(v for n in imported.graph for v in n.outputs)]
    }


# Dimensions

TWO = """(float[n,3,h,w] x, float[n,3] z) => (float[n,3,a,b] y, float[c,3] v)
    <float[3,3,1,1] k = {1,0,0,0,1,0,0,0,1}> {
    y = Conv <strides = [2, 2]> (x, k)
    v = Neg (z) }"""


def test_symbolic_dimensions_become_one_and_are_recorded():
    imported = import_graph(model(TWO))
    assert shapes(imported) == {"x": (1, 3, 1, 1), "z": (1, 3), "y": (1, 3, 1, 1), "v": (1, 3)}
    assumed = json.loads(imported.metadata_props[importer.ASSUMED_KEY])
    assert assumed == {"x[0]": 1, "x[2]": 1, "x[3]": 1, "z[0]": 1}


def test_given_shapes_bind_their_symbols_everywhere():
    imported = import_graph(model(TWO), {"x": (5, 3, 8, 7)})
    assert shapes(imported) == {"x": (5, 3, 8, 7), "z": (5, 3), "y": (5, 3, 4, 4), "v": (5, 3)}
    assert json.loads(imported.metadata_props[importer.ASSUMED_KEY]) == {}


@pytest.mark.parametrize(
    ("given", "what", "reasons"),
    [
        (
            {"X": (1, 3, 8, 8)},
            "no input named 'X' in the model",
            ("expected one of: x, z", "got: X"),
        ),
        (
            {"x": (1, 3, 8)},
            "input 'x' cannot have the shape 1x3x8",
            ("expected 4 dimensions: nx3xhxw",),
        ),
        (
            {"x": (1, 4, 8, 8)},
            "input 'x' cannot have the shape 1x4x8x8",
            ("dimension 1: the model fixes it to 3, got 4",),
        ),
        (
            {"x": (0, 3, -1, 8)},
            "input 'x' cannot have the shape 0x3x-1x8",
            (
                "dimension 0: expected at least 1, got 0",
                "dimension 2: expected at least 1, got -1",
            ),
        ),
        (
            {"x": (2, 3, 8, 8), "z": (4, 3)},
            "input 'z' cannot have the shape 4x3",
            ("dimension 0: n is 2 in x[0], got 4",),
        ),
    ],
)
def test_shapes_that_do_not_fit(given, what, reasons):
    with pytest.raises(InputError) as error:
        import_graph(model(TWO), given)
    assert error.value.what == what
    assert error.value.reasons == reasons
    assert error.value.fix


def test_an_input_without_a_shape_needs_one():
    source = model("(float[2] x) => (float[2] y) { y = Neg (x) }")
    source.graph.inputs[0].shape = None
    with pytest.raises(InputError, match="input 'x' has no shape in the model"):
        import_graph(source)
    assert shapes(import_graph(source, {"x": (2,)})) == {"x": (2,), "y": (2,)}


def test_unnamed_dimensions_become_one():
    source = model("(float[2] x) => (float[2] y) { y = Neg (x) }")
    source.graph.inputs[0].shape = ir.Shape([None, 3])
    assert shapes(import_graph(source))["x"] == (1, 3)


def test_shapes_at_which_the_model_cannot_run_are_an_input_error():
    source = model("""(float[n,4] x, float[m,4] z) => (float[n,4] y) { y = Add (x, z) }""")
    with pytest.raises(UnsupportedError, match="the model is not valid ONNX") as error:
        import_graph(source, {"x": (3, 4), "z": (2, 4)})
    assert "shapes given" in error.value.fix


def test_a_model_with_contradicting_types_is_an_input_error(data_folder):
    source = ir.load(data_folder / "onnx" / "BROKEN_mlperftiny_kws.onnx")
    with pytest.raises(
        UnsupportedError, match=r"W typestr: T, has unsupported type: tensor\(int8\)"
    ):
        import_graph(source)


# One form


@pytest.mark.parametrize(
    ("size", "attributes", "fits"),
    [
        (1, "kernel_shape = [2, 2], strides = [2, 2]", False),
        (2, "kernel_shape = [2, 2], strides = [2, 2]", True),
        (1, "kernel_shape = [2, 2], pads = [0, 0, 1, 1]", True),
        (1, "kernel_shape = [2, 2], pads = [0, 0, 1, 0]", False),
        (3, "kernel_shape = [2, 2], dilations = [3, 1]", False),
        (1, 'kernel_shape = [2, 2], auto_pad = "SAME_UPPER"', True),
    ],
)
def test_windows_that_do_not_fit_are_an_input_error(size, attributes, fits):
    text = f"float[1,4,{size},{size}] x) => (float[a,b,c,d] y) {{ y = MaxPool <{attributes}> (x) }}"
    model = graph(f"({text}")
    if fits:
        assert op_types(import_graph(model)) == ["MaxPool"]
        return
    with pytest.raises(InputError, match=r"MaxPool .* has nothing to compute") as caught:
        import_graph(model)
    assert "its window is" in str(caught.value)


def test_a_kernel_larger_than_its_input_is_an_input_error():
    model = graph(
        "(float[1,4,2,2] x) => (float[a,b,c,d] y) <float[4,4,3,3] w> { y = Conv (x, w) }",
        w=np.ones((4, 4, 3, 3), np.float32),
    )
    with pytest.raises(InputError, match="its window is 3x3, its input with padding 2x2"):
        import_graph(model)


def test_constants_are_lifted_and_identities_dropped():
    imported = import_graph(
        model("""(float[n,3] x) => (float[n,3] y) {
        c = Constant <value_floats = [1.0, 2.0, 3.0]> ()
        i = Identity (x)
        d = Dropout (i)
        a = Add (d, c)
        y = Identity (a) }""")
    )
    assert op_types(imported) == ["Add"]
    assert list(imported.graph.initializers) == ["c"]
    assert imported.graph.outputs[0].name == "y"


def test_an_identity_between_input_and_output_stays():
    imported = import_graph(
        model("""(float[3] x) => (float[3] y, float[3] z, float[3] a) {
        y = Identity (x)
        a = Neg (x)
        z = Identity (a) }""")
    )
    assert sorted(op_types(imported)) == ["Identity", "Identity", "Neg"]
    assert [value.name for value in imported.graph.outputs] == ["y", "z", "a"]
    y, z, a = run(imported)
    assert np.array_equal(z, a)
    assert np.array_equal(y, -a)


def test_initializers_are_no_inputs():
    source = model("(float[3] x, float[3] w) => (float[3] y) { y = Add (x, w) }", ir_version=3)
    source.graph.inputs[1].const_value = ir.tensor(np.ones(3, np.float32), name="w")
    source.graph.register_initializer(source.graph.inputs[1])
    imported = import_graph(source)
    assert [value.name for value in imported.graph.inputs] == ["x"]


def test_functions_are_inlined():
    imported = import_graph(
        model(
            "(float[3] x) => (float[3] y) { y = local.twice (x) }",
            domains=', "local": 1',
            functions="""<domain: "local", opset_import: ["": 18]> twice (a) => (b) {
            b = Add (a, a) }""",
        )
    )
    assert op_types(imported) == ["Add"]
    assert not imported.functions
    assert set(imported.graph.opset_imports) == {""}


def test_constants_are_folded_but_quantizers_are_kept():
    imported = import_graph(
        model("""(float[2] x) => (float[2] y)
        <int8[2] q = {1, 2}, float s = {0.5}, float[2] w = {3, 4}> {
        d = DequantizeLinear (q, s)
        n = Neg (w)
        a = Add (x, d)
        y = Add (a, n) }""")
    )
    assert op_types(imported) == ["DequantizeLinear", "Add", "Add"]


def test_shapes_computed_in_the_graph_are_folded():
    imported = import_graph(
        model("""(float[n,2,3] x) => (float[n,6] y) <int64[1] zero = {0}, int64[1] rest = {-1}> {
        s = Shape (x)
        n = Gather (s, zero)
        t = Concat <axis = 0> (n, rest)
        y = Reshape (x, t) }"""),
        {"x": (4, 2, 3)},
    )
    assert op_types(imported) == ["Reshape"]
    assert shapes(imported)["y"] == (4, 6)


def test_equal_nodes_become_one():
    imported = import_graph(
        model("""(float[2] x) => (float[2] y)
        <float s = {0.5}, int8 z = {0}, float s2 = {0.5}, int8 z2 = {0}> {
        a = QuantizeLinear (x, s, z)
        b = QuantizeLinear (x, s2, z2)
        c = DequantizeLinear (a, s, z)
        d = DequantizeLinear (b, s2, z2)
        y = Add (c, d) }""")
    )
    assert op_types(imported) == ["QuantizeLinear", "DequantizeLinear", "Add"]


@pytest.mark.parametrize("opset", [9, 11, 13, 16])
def test_old_opsets_are_upgraded(opset):
    source = model("(float[2,3] x) => (float[2,3] y) { y = Softmax <axis = 1> (x) }", opset)
    imported = import_graph(source)
    assert imported.graph.opset_imports[""] == UPGRADE_TO
    assert np.allclose(run(imported)[0].sum(1), 1)


def test_new_opsets_stay():
    source = model("(float[2] x) => (float[2] y) { y = Neg (x) }", 21)
    assert import_graph(source).graph.opset_imports[""] == 21


def test_an_opset_that_cannot_be_upgraded_is_said():
    source = model(
        """(float[1,2,2,2] x) => (float[1,2,2,2] y) <float[2] s = {1, 1}> {
        y = BatchNormalization <is_test = 0> (x, s, s, s, s) }""",
        6,
    )
    with pytest.raises(UnsupportedError, match="cannot be converted from opset 6 to 17") as error:
        import_graph(source)
    assert error.value.reasons == ("Attribute is_test must not have value 0",)
    assert error.value.fix == "export it again with opset 17 or newer"


def test_outputs_that_nothing_infers_keep_their_declared_rank():
    """What the file says of their sizes may hold for some inputs only, or be wrong."""
    source = model(
        "(float[2] x) => (float[2] y) { a = com.acme.Magic (x)\n y = Neg (a) }",
        domains=', "com.acme": 1',
    )
    imported = import_graph(source)
    assert imported.graph.outputs[0].shape == ir.Shape([None])
    assert imported.graph[0].outputs[0].shape is None


# Names


def test_nodes_are_named_after_their_weights_or_outputs():
    source = model("""(float[1,1,2,2] x) => (float[1,1,2,2] y)
        <float[1,1,1,1] "a.conv.weight" = {1}, float[1,1,1,1] w = {2}> {
        ["own name"] a = Conv (x, "a.conv.weight")
        ["node_Conv_7"] b = Conv (a, "a.conv.weight")
        c = Conv (b, "a.conv.weight")
        ["node_relu"] d = Relu (c)
        y = Conv (d, w) }""")
    names = [node.name for node in import_graph(source).graph]
    assert names == ["own name", "a.conv", "a.conv:c", "node_relu", "Conv:y"]


def test_a_quantized_weight_gives_its_name_too():
    source = model("""(float[1,1,2,2] x) => (float[1,1,2,2] y)
        <int8[1,1,1,1] "conv.weight_quantized" = {1}, float s = {1}> {
        w = DequantizeLinear ("conv.weight_quantized", s)
        ["node_3"] y = Conv (x, w) }""")
    assert [node.name for node in import_graph(source).graph][1] == "conv"


def test_a_computed_weight_gives_no_name():
    source = model("""(float[1,1,2,2] x, float[1,1,1,1] k) => (float[1,1,2,2] y) {
        w = Neg (k)
        ["node_conv"] y = Conv (x, w) }""")
    assert [node.name for node in import_graph(source).graph][1] == "node_conv"


def test_notes_of_the_exporter_are_dropped():
    source = model("(float[2] x) => (float[2] y) { y = Neg (x) }")
    source.graph[0].metadata_props["pkg.torch.onnx.stack_trace"] = "/home/someone/model.py"
    assert not import_graph(source).graph[0].metadata_props


# The given model


def test_the_given_model_is_not_changed():
    source = model(TWO, opset=13)
    before = ir.serde.serialize_model(source).SerializeToString(deterministic=True)
    import_graph(source, {"x": (2, 3, 4, 4)})
    after = ir.serde.serialize_model(source).SerializeToString(deterministic=True)
    assert before == after


def test_external_weights_are_loaded(tmp_path):
    source = model("(float[64] x) => (float[64] y) <float[64] w> { y = Add (x, w) }")
    w = ir.val("w", const_value=ir.tensor(np.arange(64, dtype=np.float32), name="w"))
    source.graph[0].replace_input_with(1, w)
    source.graph.register_initializer(w)
    ir.save(source, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    imported = import_graph(ir.load(tmp_path / "m.onnx"))
    (tmp_path / "m.data").unlink()
    assert run(imported)[0].shape == (64,)


# Real files

FILES = [
    "basic_pitch_nmp",
    "dtln_2",
    "fastestdet",
    "har_cnn",
    "mlperftiny_ad01",
    "mlperftiny_resnet8",
    "ppocr_mobile_v2_cls",
    "ultraface_slim_320",
]


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_exporters(data_folder, name):
    source = ir.load(data_folder / "onnx" / f"{name}.onnx")
    given = {"x": (1, 3, 48, 192)} if name.startswith("ppocr") else {}
    imported = import_graph(source, given)
    for value in (v for node in imported.graph for v in node.outputs):
        assert value.shape is not None, value.name
        assert value.shape.is_static(), value.name
    assert not {"Identity", "Constant", "Dropout", "Shape"} & set(op_types(imported))
    if not given:  # the file itself fixes all but the batch, which is 1 in both
        for value in source.graph.inputs:
            value.shape = ir.Shape([d if isinstance(d, int) else 1 for d in value.shape])
    else:
        source.graph.inputs[0].shape = ir.Shape(given["x"])
    source.ir_version = max(source.ir_version, 4)
    for want, got in zip(run(source), run(imported), strict=True):
        # Folding constants rounds them as ONNX Runtime does, up to one step.
        assert np.abs(want - got).max() <= 2.0**-20 * max(1.0, np.abs(want).max())
