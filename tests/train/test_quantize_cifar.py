"""A real network: as accurate fake-quantized in PyTorch as its file quantized without it."""

import importlib.util
import sys

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from twofour.onnx_tools.load import model_bytes
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize
from twofour.train import Quantizer, evaluate, export_onnx

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(folder, name):
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def resnet20(data_folder):
    folder = data_folder / "cifar10"
    model = load(folder, "resnet_cifar").build(20).eval()
    model.load_state_dict(load_file(folder / "resnet20.safetensors"))
    return model


@pytest.fixture(scope="module")
def samples(data_folder):
    """Images to calibrate with, others to test with, and the labels of those."""
    x, y = load(data_folder / "cifar10", "load_cifar10").load("test")
    real = (torch.from_numpy(x[:1256]).float() / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    real = real.permute(0, 3, 1, 2).contiguous()
    return real[1000:], real[:1000], torch.from_numpy(y[:1000].astype(np.int64))


def test_as_accurate_as_the_file(resnet20, samples, tmp_path):
    calibration, x, labels = samples
    path = tmp_path / "m.onnx"
    export_onnx(resnet20, x[:2], path)
    model = quantize(ir.load(path), {"x": calibration.numpy()}, QuantizeOptions())
    (outputs,) = onnxruntime.InferenceSession(model_bytes(model)).run(None, {"x": x.numpy()})
    of_file = float((outputs.argmax(1) == labels.numpy()).mean())
    before = evaluate(resnet20, x, labels)
    Quantizer(resnet20, x[:2]).calibrate(list(calibration.split(64)))
    got = evaluate(resnet20, x, labels)
    # Both round the same tensors to the same steps: what differs lies between two of them.
    assert abs(got - of_file) <= 0.005, (before, of_file, got)
    assert got >= before - 0.01
