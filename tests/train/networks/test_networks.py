"""Small versions of the networks: exported files compute what the modules do, by the same names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from twofour.core.errors import InputError
from twofour.train import export_onnx
from twofour.train.networks import catalog, mobilenet, resnet, transformer, vit, yolo
from twofour.train.networks.resnet import CifarResNet, ResNet
from twofour.train.networks.seeded import seeded

BERT = transformer.BertConfig(2, 32, 4, 64, vocabulary=50, positions=40)
MOBILE = ((1, 8, 1, 1), (2, 16, 2, 2))


V2 = mobilenet.MobileConfig(MOBILE, stem=8, head=32, classes=5)
V3 = mobilenet.MobileConfig(MOBILE, 8, 32, 5, hard_swish=True, excite=True)
VIT = vit.VitConfig(2, 32, 4, 64, image=32, patch=8, classes=5)
# Name -> what makes the network, and the side of its images.
SMALL = {
    "cifar": (lambda: CifarResNet(8), 32),
    "resnet18": (lambda: ResNet(18, 5), 32),
    "resnet50": (lambda: ResNet(50, 5), 32),
    "mobilenetv2": (lambda: mobilenet.MobileNet(V2), 32),
    "mobilenetv3": (lambda: mobilenet.MobileNet(V3), 32),
    "yolo": (lambda: yolo.Yolo(yolo.YoloConfig(4, 1, 7)), 64),
    "vit": (lambda: vit.Vit(VIT), 32),
}
# As published, or as the common implementations count them.
PARAMETERS = {
    "cifar_resnet20": 269_722,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "minilm": 22_565_376,
    "bert_base": 108_891_648,
    "mobilenetv2": 3_504_872,
    "vit_b16": 86_567_656,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_networks_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = catalog.NETWORKS[name].make()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)


def parameter_names(model: nn.Module) -> set[str]:
    """Weights of convolutions and matrix products, as files have them."""
    kinds = (nn.Conv2d, nn.Linear)
    return {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("name", SMALL)
def test_files_of_image_networks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for depth in (18, 50):
        monkeypatch.setitem(resnet.IMAGENET_DEPTHS, depth, (1, 1, 1, 1))
    make, side = SMALL[name]
    model = seeded(make, (4, 3, side, side))
    outputs = yolo.OUTPUT_NAMES if name == "yolo" else ("y",)
    path = tmp_path / "model.onnx"
    export_onnx(model, torch.zeros(1, 3, side, side), path, output_names=outputs)
    x = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for got, wanted in zip(run(path, {"x": x.numpy()}), expected, strict=True):
        assert got.shape == wanted.shape
        # Some dozen layers of sums of at most 1,000 products of values around 1.
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)
        assert 1e-3 < np.abs(got).max() < 1e3, "values neither vanish nor explode"
    initializers = {i.name for i in onnx.load(path).graph.initializer}
    assert parameter_names(model) <= initializers


def test_seeded_weights_are_the_same_again_and_the_random_state_is_kept() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second = (seeded(lambda: CifarResNet(8), (2, 3, 32, 32)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert not first.training
    assert first.bn1.momentum == 0.1
    assert first.bn1.running_var.std() > 0, "statistics were taken"


@pytest.fixture(scope="module")
def bert() -> transformer.Bert:
    return seeded(lambda: transformer.Bert(BERT))


@pytest.fixture(scope="module")
def bert_file(bert: transformer.Bert, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert") / "bert.onnx"
    example = transformer.example_inputs(BERT, 1, 8)
    names = (transformer.INPUT_NAMES, transformer.OUTPUT_NAMES)
    export_onnx(bert, example, path, *names, dynamic=("batch", "length"))
    return path


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 8), (3, 40)])
def test_a_text_file_takes_any_batch_and_length(
    bert: transformer.Bert, bert_file: Path, batch: int, length: int
) -> None:
    inputs = transformer.example_inputs(BERT, batch, length)
    feeds = {n: x.numpy() for n, x in zip(transformer.INPUT_NAMES, inputs, strict=True)}
    (got,) = run(bert_file, feeds)
    with torch.no_grad():
        np.testing.assert_allclose(got, bert(*inputs), rtol=1e-4, atol=1e-5)


def test_names_of_a_text_file(bert: transformer.Bert, bert_file: Path) -> None:
    graph = onnx.load(bert_file).graph
    assert [i.name for i in graph.input] == list(transformer.INPUT_NAMES)
    sizes = [[d.dim_param for d in i.type.tensor_type.shape.dim] for i in graph.input]
    assert sizes == [["batch", "length"]] * 3
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    assert parameter_names(bert) <= set(weights)
    name = "encoder.layer.1.intermediate.dense.weight"
    np.testing.assert_array_equal(weights[name].T, bert.state_dict()[name])


def test_padding_is_attended_by_nothing(bert: transformer.Bert) -> None:
    ids, mask, types = transformer.example_inputs(BERT, 2, 12)
    padded = ids.clone()
    mask[:, 7:], padded[:, 7:] = 0, 3
    with torch.no_grad():
        short = bert(ids[:, :7], mask[:, :7], types[:, :7])
        torch.testing.assert_close(bert(padded, mask, types)[:, :7], short, rtol=1e-4, atol=1e-5)


def test_one_layer_is_what_the_paper_says(bert: transformer.Bert) -> None:
    """Against torch's own encoder layer, which has the same equations under other names."""
    own = nn.TransformerEncoderLayer(
        32, 4, 64, 0.0, "gelu", layer_norm_eps=BERT.eps, batch_first=True
    )
    held = bert.encoder["layer"][0].state_dict()
    attention = [held[f"attention.self.{part}.weight"] for part in ("query", "key", "value")]
    biases = [held[f"attention.self.{part}.bias"] for part in ("query", "key", "value")]
    renamed = {
        "self_attn.in_proj_weight": torch.cat(attention),
        "self_attn.in_proj_bias": torch.cat(biases),
    }
    pairs = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for theirs, ours in pairs.items():
        for part in ("weight", "bias"):
            renamed[f"{theirs}.{part}"] = held[f"{ours}.{part}"]
    own.load_state_dict(renamed)
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = bert.encoder["layer"][0](x, torch.zeros(2, 1, 1, 6))
        torch.testing.assert_close(got, own.eval()(x), rtol=1e-4, atol=1e-5)


def test_weights_of_a_checkpoint(bert: transformer.Bert, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    held = {f"bert.{name}": tensor for name, tensor in bert.state_dict().items()}
    extra = {
        "bert.embeddings.position_ids": torch.arange(40)[None],
        "bert.pooler.dense.weight": torch.zeros(32, 32),
        "bert.pooler.dense.bias": torch.zeros(32),
    }
    save_file(held | extra, path)
    loaded = transformer.load_bert(BERT, path).eval()
    inputs = transformer.example_inputs(BERT, 1, 5)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), bert(*inputs))
    pooled = transformer.BertConfig(2, 32, 4, 64, 50, 40, pooler=True)
    with torch.no_grad():
        assert transformer.load_bert(pooled, path)(*inputs)[1].shape == (1, 32)


@pytest.mark.parametrize("broken", ["missing", "shape", "no file", "no safetensors"])
def test_weights_that_do_not_fit(bert: transformer.Bert, tmp_path: Path, broken: str) -> None:
    path = tmp_path / "model.safetensors"
    held = dict(bert.state_dict())
    name = "encoder.layer.0.output.dense.bias"
    if broken == "missing":
        del held[name]
    elif broken == "shape":
        held[name] = torch.zeros(31)
    if broken == "no safetensors":
        path.write_bytes(b"nothing")
    elif broken != "no file":
        save_file(held, path)
    with pytest.raises(InputError, match=r"weights") as caught:
        transformer.load_bert(BERT, path)
    if broken in ("missing", "shape"):
        assert name in str(caught.value)


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(InputError, match="do not divide"):
        transformer.BertConfig(1, 30, 4, 64)
    with pytest.raises(InputError, match="do not divide"):
        vit.VitConfig(1, 32, 4, 64, image=30, patch=16)


def test_the_catalog_writes_a_file_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    catalog.write_network("cifar_resnet20", path)
    (got,) = run(path, {"x": np.zeros((2, 3, 32, 32), np.float32)})
    assert got.shape == (2, 10)
    with pytest.raises(InputError, match="no network 'resnet19'"):
        catalog.write_network("resnet19", path)
