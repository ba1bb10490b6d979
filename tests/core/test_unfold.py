from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

from twofour.core.unfold import Windows, pieces, same_pads, unfold

CASES = [
    Windows((3,), (1,), (1,), (1, 1)),
    Windows((4,), (3,), (2,), (0, 5)),
    Windows((3, 3), (1, 1), (1, 1), (1, 1, 1, 1)),
    Windows((1, 1), (2, 2), (1, 1), (0, 0, 0, 0)),
    Windows((2, 3), (2, 1), (1, 2), (1, 0, 2, 3)),
    Windows((2, 1, 3), (1, 2, 1), (2, 1, 1), (0, 1, 1, 1, 0, 2)),
]


def ort_conv(x: np.ndarray, w: np.ndarray, attributes: str) -> np.ndarray:
    """x [B, C, ...], w [N, C, ...]."""
    dims = ",".join(map(str, x.shape))
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["": 17]> g (float[{dims}] x) => (float y) '
        f"{{ y = Conv <{attributes}> (x, w) }}"
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def by_patches(x: np.ndarray, w: np.ndarray, windows: Windows) -> np.ndarray:
    found = unfold(np.moveaxis(x, 1, -1), windows)
    flat = np.moveaxis(w, 1, -1).reshape(len(w), -1)
    y = found.reshape(*found.shape[:-2], -1) @ flat.T
    return np.moveaxis(y, -1, 1)


def arrays(axes: int) -> tuple[np.random.Generator, np.ndarray]:
    random = np.random.default_rng(0)
    return random, random.standard_normal((2, 4, *(9, 8, 7)[:axes])).astype(np.float32)


@pytest.mark.parametrize("windows", CASES)
def test_patches_times_filter_is_the_convolution(windows: Windows) -> None:
    random, x = arrays(len(windows.kernel))
    w = random.standard_normal((5, 4, *windows.kernel)).astype(np.float32)
    names = ("strides", "dilations", "pads")
    text = ", ".join(f"{name} = {list(getattr(windows, name))}" for name in names)
    want = ort_conv(x, w, text)
    assert np.allclose(by_patches(x, w, windows), want, atol=1e-4)
    assert windows.output(x.shape[2:]) == want.shape[2:]


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("kernel", [(3,), (4, 3), (2, 5)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_auto_pad(mode: str, kernel: tuple[int, ...], stride: int) -> None:
    random, x = arrays(len(kernel))
    w = random.standard_normal((5, 4, *kernel)).astype(np.float32)
    windows = Windows(kernel, (stride,) * len(kernel), (1,) * len(kernel), (0,) * 2 * len(kernel))
    pads = same_pads(windows, x.shape[2:], lower=mode == "SAME_LOWER")
    want = ort_conv(x, w, f'auto_pad = "{mode}", strides = {list(windows.strides)}')
    got = by_patches(x, w, Windows(kernel, windows.strides, windows.dilations, pads))
    assert np.allclose(got, want, atol=1e-4)


def test_the_padding_has_its_value_and_bytes_stay_bytes() -> None:
    x = np.ones((1, 2, 2, 3), np.uint8)
    found = unfold(x, Windows((2, 2), (1, 1), (1, 1), (1, 1, 0, 0)), fill=7)
    assert found.dtype == np.uint8
    assert found.shape == (1, 2, 2, 4, 3)
    for (i, j), tap in itertools.product(np.ndindex(2, 2), range(4)):
        outside = i + tap // 2 == 0 or j + tap % 2 == 0
        assert (found[0, i, j, tap] == (7 if outside else 1)).all()


def test_a_window_that_does_not_fit_has_no_patches() -> None:
    found = unfold(np.ones((2, 2, 1), np.float32), Windows((3,), (1,), (1,), (0, 0)))
    assert found.shape == (2, 0, 3, 1)


@pytest.mark.parametrize("windows", CASES)
@pytest.mark.parametrize("most_bytes", [0, 700, 3000, 20000, 2**30])
def test_pieces_are_all_patches_in_order(windows: Windows, most_bytes: int) -> None:
    _, x = arrays(len(windows.kernel))
    x = np.moveaxis(np.concatenate([x, x + 1]), 1, -1)
    whole = unfold(x, windows)
    found = list(pieces(x, windows, most_bytes))
    assert np.array_equal(np.concatenate(found), whole.reshape(-1, *whole.shape[-2:]))
    row = whole[0, 0].nbytes
    assert max(piece.nbytes for piece in found) <= max(most_bytes, row)
    assert len(found) == 1 or most_bytes < whole.nbytes
