"""The functions that the recipes name: they fit together, real models and real samples."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from twofour.bench.suite.text import text_model
from twofour.core.data import load_data
from twofour.pipeline.own_module import with_own_module
from twofour.pipeline.recipe import recipe_of
from twofour.pipeline.yaml_lines import read_document
from twofour.train.user_code import build_model, example_inputs, train_batches

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NAMES = ("digits", "cifar10_resnet", "minilm_stsb")


@pytest.fixture
def beside(monkeypatch):
    """Modules are found as the pipeline finds them."""
    monkeypatch.syspath_prepend(str(RECIPES))
    yield
    for name in ("digits", "cifar10", "minilm"):
        sys.modules.pop(name, None)


def recipe(name):
    """As the pipeline reads it."""
    path = RECIPES / f"{name}.yaml"
    return recipe_of(read_document(path.read_bytes(), str(path)))


def needed(name, request):
    """Skips, visibly, where the real data or weights are not there."""
    if name != "digits":
        request.getfixturevalue("data_folder")
    if name.startswith("minilm") and text_model() is None:
        pytest.skip("the weights of MiniLM are not installed")


@pytest.mark.parametrize("name", NAMES)
def test_functions_fit_the_recipe(name, request, beside):
    needed(name, request)
    made = recipe(name)
    model = build_model(made.model.torch, 0, weights_follow=True).eval()
    example = example_inputs(made.model.example, model, 0)
    tensors = [example] if isinstance(example, torch.Tensor) else list(example.values())
    assert len(tensors) == len(made.model.inputs)
    for data in (made.data.calibrate, made.data.evaluate):
        batch = next(load_data(data, made.model.inputs).batches(2))
        for input_name, tensor in zip(made.model.inputs, tensors, strict=True):
            array = batch.inputs[input_name]
            assert array.shape[1:] == tensor.shape[1:]
            assert array.dtype == tensor.numpy().dtype
        assert (batch.labels is None) == (data == made.data.calibrate)


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_is_its_own_and_the_same_again(name, request, beside):
    needed(name, request)
    batches = train_batches(recipe(name).data.train, 0)
    first, again, other = (torch.cat(tensors_in(next(iter(batches(e))))) for e in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(batches(0)) > 10


def tensors_in(batch):
    found = batch.values() if isinstance(batch, dict) else batch
    return [each.flatten().double() for each in found]


def test_the_published_network_reads_its_images(request, beside):
    needed("cifar10_resnet", request)
    model = build_model("cifar10:resnet20", 0).eval()
    batch = next(load_data("cifar10:evaluate", ["x"]).batches(500))
    with torch.no_grad():
        found = model(torch.from_numpy(batch.inputs["x"])).argmax(1).numpy()
    assert (found == batch.labels).mean() > 0.89
    assert build_model("cifar10:resnet56", 0, weights_follow=True).get_submodule("layer3.8")


def test_similarity_ranks_pairs_that_follow_each_other(beside):
    similarity = importlib.import_module("minilm").similarity
    angles = np.linspace(0.1, 3, 20)
    ends = np.stack([3 * np.cos(angles), 3 * np.sin(angles)], 1)
    pairs = np.stack([np.broadcast_to([1.0, 0.0], ends.shape), ends], 1).reshape(40, 2)
    labels = np.repeat(np.float32(5 - angles), 2)
    assert similarity({"y": np.float32(pairs)}, labels) == pytest.approx(100)
    assert similarity({"y": np.float32(pairs)}, labels[::-1].copy()) == pytest.approx(-100)


def test_digits_and_cifar_differ_in_one_line():
    """And in the name."""
    digits, cifar = (
        [line for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if line[:1] != "#"]
        for name in ("digits", "cifar10_resnet")
    )
    changed = [(a, b) for a, b in zip(digits, cifar, strict=True) if a != b]
    assert [a.split(":")[0].strip() for a, _ in changed] == ["name", "torch"]
    assert recipe("digits").model_dump()["data"]["train"] == "digits:train"
    assert recipe("cifar10_resnet").model_dump()["data"]["train"] == "cifar10:train"


@pytest.mark.parametrize(
    ("plain", "found"),
    [
        ({"metric": ":m", "model": {"torch": "a.b:net"}}, "a.b:m"),
        ({"metric": "top1", "model": {"torch": "a.b:net"}}, "top1"),
        ({"metric": ":m", "model": {"onnx": "a.onnx"}}, ":m"),
        ({"metric": ":m", "model": {"torch": ":net"}}, ":m"),
        ({"metric": ":m", "model": 3}, ":m"),
    ],
)
def test_own_module(plain, found):
    before = str(plain)
    assert with_own_module(plain)["metric"] == found
    assert str(plain) == before
