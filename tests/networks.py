"""Residual networks of torch as ONNX, and inputs for them."""

from __future__ import annotations

import io
import logging
import warnings

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxruntime.quantization import CalibrationDataReader
from torch import nn
from torch.nn import functional

CIFAR = (3, 32, 32)


class Block(nn.Module):
    """The basic block of ResNet-18, with a 1x1 convolution in the shortcut where it must."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.down = nn.Identity()
        if stride != 1:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.down = nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.down(x))


class ResNet18(nn.Module):
    """ResNet-18's shape, an eighth as wide, one block a stage."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2), Block(16, 32, 2))
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = self.layers(self.pool(functional.relu(self.bn(self.stem(x)))))
        return self.fc(torch.flatten(self.mean(x), 1))


class FakeQuantized(nn.Module):
    """Conv, BatchNorm, ReLU, mean, Linear as quantization-aware training leaves them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    @staticmethod
    def weight(w):
        """Rounded to int8 per output channel."""
        scale = w.detach().abs().amax(tuple(range(1, w.ndim))) / 127
        zero = torch.zeros(w.shape[0], dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(w, scale, zero, 0, -128, 127)

    @staticmethod
    def activation(x):
        """Rounded to int8 per tensor."""
        return torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127)

    def forward(self, x):
        w = self.weight(self.conv.weight)
        y = functional.conv2d(self.activation(x), w, self.conv.bias, 1, 1)
        y = self.activation(functional.relu(self.bn(y))).mean((2, 3))
        return functional.linear(self.activation(y), self.weight(self.fc.weight), self.fc.bias)


def with_statistics(model, seed=0):
    """The model in eval mode, its normalizations as after some training."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return model.eval()


def export(model, dynamo, training=False, dynamic=True, size=CIFAR):
    """The model as ONNX, input x [batch, 3, 32, 32], or of batch 2 where it is not dynamic."""
    buffer, x = io.BytesIO(), torch.zeros(2, *size)
    options = {"input_names": ["x"], "output_names": ["y"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            batch = ({0: torch.export.Dim("batch")},) if dynamic else None
            program = torch.onnx.export(
                model, (x,), dynamo=True, dynamic_shapes=batch, verbose=False, **options
            )
            return ir.from_proto(program.model_proto)
        axes = {"x": {0: "batch"}} if dynamic else None
        # Training mode keeps BatchNormalization nodes in the file.
        mode = torch.onnx.TrainingMode.PRESERVE if training else torch.onnx.TrainingMode.EVAL
        torch.onnx.export(
            model,
            (x,),
            buffer,
            dynamo=False,
            dynamic_axes=axes,
            opset_version=13,
            training=mode,
            do_constant_folding=not training,
            **options,
        )
    return ir.from_proto(onnx.load_from_string(buffer.getvalue()))


def images(count=4, seed=0):
    """Random inputs."""
    random = np.random.default_rng(seed)
    return [{"x": random.normal(size=(1, *CIFAR)).astype(np.float32)} for _ in range(count)]


class Reader(CalibrationDataReader):
    """The images, for ONNX Runtime's calibration."""

    def __init__(self):
        self.images = iter(images())

    def get_next(self):
        return next(self.images, None)
