"""Residual networks as users bring them: from both exporters of torch, with and without Q/DQ."""

from __future__ import annotations

import importlib.util
import logging

import onnx_ir as ir
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_static

from tests.networks import Reader, ResNet18, export, with_statistics


@pytest.fixture(scope="session")
def resnet20(data_folder):
    """Exporter name -> the CIFAR ResNet-20 of the data folder with random weights."""
    path = data_folder / "cifar10" / "resnet_cifar.py"
    spec = importlib.util.spec_from_file_location("resnet_cifar", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model = with_statistics(module.build(20))
    return {"torchscript": export(model, False), "dynamo": export(model, True)}


@pytest.fixture(scope="session")
def resnet18():
    """Exporter name -> the small ResNet-18; "unfolded" still has its BatchNormalization nodes."""
    torch.manual_seed(1)
    model = with_statistics(ResNet18())
    return {
        "torchscript": export(model, False),
        "unfolded": export(model, False, training=True),
    }


@pytest.fixture(scope="session")
def quantize_onnxruntime(tmp_path_factory):
    """Quantizes a model with ONNX Runtime's own tool: int8, or uint8 activations (and weights)."""

    def quantize(model, activations="QInt8", weights="QInt8", per_channel=True):
        folder = tmp_path_factory.mktemp("quantize")
        ir.save(model, folder / "float.onnx")
        logging.getLogger().setLevel(logging.ERROR)
        quantize_static(
            folder / "float.onnx",
            folder / "int8.onnx",
            Reader(),
            per_channel=per_channel,
            activation_type=QuantType[activations],
            weight_type=QuantType[weights],
        )
        return ir.load(folder / "int8.onnx")

    return quantize


@pytest.fixture(scope="session")
def timing_cache(tmp_path_factory):
    """One file of measured times for all tests that build: each kernel is timed once."""
    return tmp_path_factory.mktemp("times") / "times.json"
