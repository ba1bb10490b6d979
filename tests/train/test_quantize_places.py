"""A model is quantized in PyTorch where its exported file would be, with the same scales."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional

from twofour.core.errors import InputError
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize_with_report
from twofour.train import Quantizer, QuantizerOptions, export_onnx
from twofour.train.networks.mobilenet import MobileConfig, MobileNet
from twofour.train.networks.resnet import ResNet
from twofour.train.networks.seeded import seeded
from twofour.train.networks.transformer import INPUT_NAMES, Bert, BertConfig, example_inputs
from twofour.train.networks.vit import Vit, VitConfig
from twofour.train.networks.yolo import Yolo, YoloConfig

MOBILE = MobileConfig(
    stages=((1, 8, 1, 1), (4, 12, 2, 2), (4, 16, 2, 2)), stem=8, head=32, classes=10
)
BERT = BertConfig(layers=2, hidden=32, heads=2, intermediate=64, vocabulary=50)


class Block(nn.Module):
    """As torchvision writes it: one ReLU for all, in place, and `+=`."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride > 1:
            conv = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Residual(nn.Module):
    """Two blocks with pooling before and behind."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.layers(self.maxpool(self.relu(self.stem(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Padded(nn.Module):
    """The shortcut without weights: every second pixel, and channels of zeros."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 16, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 5)

    def forward(self, x):
        x = functional.relu(self.stem(x))
        y = self.bn1(self.conv1(x))
        x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.linear(functional.relu(y + x).mean((2, 3)))


class Dense(nn.Module):
    """Every layer reads all before it, joined."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 4, 3, padding=1, bias=False))
            for c in (8, 12, 16)
        )
        self.fc = nn.Linear(20, 5)

    def forward(self, x):
        found = [self.first(x)]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        x = functional.avg_pool2d(functional.relu(torch.cat(found, 1)), 2)
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Branches(nn.Module):
    """Joined, and cut again."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(3, 8, 3, padding=1)
        self.c = nn.Conv2d(16, 8, 3)
        self.d = nn.Conv2d(4, 8, 1)

    def forward(self, x):
        pooled = functional.max_pool2d(functional.relu(self.b(x)), 3, 1, 1)
        y = torch.cat([functional.relu(self.a(x)), pooled], 1)
        p, q = functional.relu(self.c(y)).chunk(2, 1)
        return self.d(p) + self.d(q)


class Crossed(nn.Module):
    """Attention over other tokens, with a mask, and a product with a bare parameter."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.out = nn.Parameter(torch.randn(16, 6) / 4)

    def forward(self, x, y):
        x = x + self.attention(x, y, y, need_weights=False)[0]
        return self.norm(x) @ self.out


def images(side=32, count=4):
    return (torch.randn(count, 3, side, side),)


def network(make, side=32):
    return seeded(make, (8, 3, side, side)), images(side)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **options)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 4))


FAMILIES = {
    "resnet": lambda: network(lambda: ResNet(18, 10), 64),
    "bottleneck": lambda: network(lambda: ResNet(50, 10), 64),
    "torchvision": lambda: network(Residual),
    "option_a": lambda: network(Padded),
    "mobilenet": lambda: network(lambda: MobileNet(MOBILE)),
    "mobilenet_v3": lambda: network(
        lambda: MobileNet(dataclasses.replace(MOBILE, hard_swish=True, excite=True))
    ),
    "yolo": lambda: network(lambda: Yolo(YoloConfig(width=4, outputs=6)), 64),
    "dense": lambda: network(Dense),
    "branches": lambda: network(Branches),
    "sequential": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1800, 5)
        ),
        images(),
    ),
    "vit": lambda: (Vit(VitConfig(2, 32, 2, 64, image=32, patch=8, classes=10)), images()),
    "bert": lambda: (Bert(BERT), example_inputs(BERT, 3, 9)),
    "encoder": lambda: (encoder(), (torch.randn(3, 7, 16),)),
    "encoder_norm_first": lambda: (encoder(norm_first=True), (torch.randn(3, 7, 16),)),
    "crossed": lambda: (Crossed(), (torch.randn(3, 7, 16), torch.randn(3, 5, 16))),
}


def of_file(model, inputs, path, **options):
    """Scales of activations and number of int8 layers, of the exported float file."""
    names = INPUT_NAMES if isinstance(model, Bert) else tuple("xy")[: len(inputs)]
    with torch.no_grad():
        outputs = model(*inputs)
    count = len(outputs) if isinstance(outputs, tuple) else 1
    export_onnx(model, inputs, path, names, [f"y{i}" for i in range(count)])
    data = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    found = quantize_with_report(ir.load(path), data, QuantizeOptions(method="minmax", **options))
    scales = {source: found.schemes[source] for source in found.scale_of.values()}
    weights = [n.inputs[1].producer() for n in found.model.graph if n.op_type in LAYERS]
    count = sum(dq is not None and dq.inputs[0].is_initializer() for dq in weights)
    return [(s.scale, s.zero_point) for s in scales.values()], count


LAYERS = ("Conv", "Gemm", "MatMul")


def of_model(model, inputs, **options):
    quantizer = Quantizer(model, inputs, QuantizerOptions(method="minmax", **options))
    quantizer.calibrate([inputs], lambda model, batch: model(*batch))
    made = [quantizer.quantizers[name] for name in quantizer.quantizers.places.scales]
    scales = [(float(quant.scale), int(quant.zero_point)) for quant in made]
    return scales, len(quantizer.quantizers.places.quantized)


@pytest.mark.parametrize("activation", ["int8", "uint8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_scales_are_those_of_the_exported_file(name, activation, tmp_path):
    torch.manual_seed(0)
    model, inputs = FAMILIES[name]()
    model.eval()
    expected, layers = of_file(model, inputs, tmp_path / "m.onnx", activation=activation)
    got, count = of_model(model, inputs, activation=activation)
    assert count == layers
    assert len(got) == len(expected)
    # The same numbers but for the order of float32 sums, through all layers.
    np.testing.assert_allclose(sorted(got), sorted(expected), rtol=1e-3)


@pytest.mark.parametrize("name", ["torchvision", "mobilenet", "vit"])
def test_options_mean_what_they_mean_for_files(name, tmp_path):
    for options in ({"add_inputs": "both"}, {"attention": False}):
        torch.manual_seed(0)
        model, inputs = FAMILIES[name]()
        model.eval()
        expected, layers = of_file(model, inputs, tmp_path / "m.onnx", **options)
        got, count = of_model(model, inputs, **options)
        assert (count, len(got)) == (layers, len(expected)), options
        np.testing.assert_allclose(sorted(got), sorted(expected), rtol=1e-3)


def test_layers_modules_and_functions_are_left_out_by_name():
    model = Residual().eval()
    x = images()
    options = QuantizerOptions(exclude=("layers.0.conv1", "layers.1.downsample", "layers.1/add"))
    quantizer = Quantizer(model, x, options)
    places = quantizer.quantizers.places
    assert places.stay_float == {
        "layers.0.conv1": "excluded by 'layers.0.conv1'",
        "layers.1.downsample.0": "excluded by 'layers.1.downsample'",
        "layers.1/add": "excluded by 'layers.1/add'",
    }
    assert "layers.0.conv2" in places.quantized
    assert set(places.quantized).isdisjoint(places.stay_float)
    assert "excluded by 'layers.1/add'" in quantizer.table()
    assert all(len(line) <= 100 for line in quantizer.table().splitlines())
    quantizer.remove()
    only = Quantizer(model, x, QuantizerOptions(include=("layers.*",)))
    assert all(name.startswith("layers.") for name in only.quantizers.places.quantized)
    assert only.quantizers.places.stay_float["fc"] == "not matched by include"


def test_what_cannot_be_quantized_is_an_error():
    with pytest.raises(InputError, match="nothing to quantize"):
        Quantizer(nn.ReLU(), torch.randn(2, 3))
    with pytest.raises(InputError, match="computes nothing from its inputs"):
        Quantizer(nn.Identity(), torch.randn(2, 3))
    with pytest.raises(InputError, match="'conv9' of exclude matches nothing"):
        Quantizer(Residual(), images(), QuantizerOptions(exclude=("conv9",)))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "best"},
        {"activation": "int4"},
        {"percentile": float("nan")},
        {"add_inputs": "one_scale"},
        {"include": "conv1"},
    ],
)
def test_options_that_mean_nothing(options):
    with pytest.raises(InputError, match=f"bad quantization option {next(iter(options))}"):
        QuantizerOptions(**options)


def test_a_sequential_with_its_own_forward_is_rounded_as_traced():
    class Skip(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + x

    conv = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)]
    model, (x,) = nn.Sequential(conv[0], Skip(nn.ReLU(), conv[1]), conv[2]), images(8)
    quantizer = Quantizer(model, x).calibrate([x])
    assert "1/add" in map(str, quantizer.quantizers.places.reads)
    seen = []
    handle = quantizer.quantizers.get("0_conv2d").register_forward_hook(
        lambda quant, given, y: seen.append(y)
    )
    model(x)
    handle.remove()
    assert seen
