"""Which weights of a model are found, under which names, and why others never are."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from twofour.core.errors import InputError
from twofour.train import Sparsifier
from twofour.train.layers import NeverPruned, WeightRef, find_weights, survey


class Adapted(nn.Linear):
    """A linear layer with a low-rank addition, as LoRA has it."""

    def __init__(self, c, n):
        super().__init__(c, n)
        self.lora_a = nn.Parameter(torch.randn(2, c))
        self.lora_b = nn.Parameter(torch.zeros(n, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_a.T @ self.lora_b.T


class Own(nn.Module):
    """Multiplies with a matrix of its own, input channels first."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))
        self.scale = nn.Parameter(torch.ones(8))


def found_in(layer):
    """(name, shape, groups) of what can be pruned in it, named `it`."""
    return [(w.name, w.shape, w.groups) for w in find_weights(nn.ModuleDict({"it": layer}))]


def reasons_of(layer):
    entries = survey(nn.ModuleDict({"it": layer}))
    return {e.name: e.reason for e in entries if isinstance(e, NeverPruned)}


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(8, 4), [("it", (4, 8), 1)]),
        (nn.Conv1d(8, 4, 3), [("it", (4, 8, 3), 1)]),
        (nn.Conv2d(16, 6, 3, groups=2), [("it", (6, 8, 3, 3), 2)]),
        (nn.Conv3d(8, 4, 1), [("it", (4, 8, 1, 1, 1), 1)]),
        (Adapted(8, 4), [("it", (4, 8), 1)]),
        (
            nn.MultiheadAttention(8, 2),
            [("it.in_proj_weight", (24, 8), 1), ("it.out_proj", (8, 8), 1)],
        ),
        (
            nn.MultiheadAttention(8, 2, kdim=4, vdim=12, add_bias_kv=True),
            [
                ("it.q_proj_weight", (8, 8), 1),
                ("it.k_proj_weight", (8, 4), 1),
                ("it.v_proj_weight", (8, 12), 1),
                ("it.out_proj", (8, 8), 1),
            ],
        ),
    ],
)
def test_what_can_be_pruned(layer, expected):
    assert found_in(layer) == expected


@pytest.mark.parametrize(
    "layer", [nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=4)]
)
def test_attention_is_pruned_and_reads_its_pruned_weights(layer):
    model = nn.ModuleDict({"it": layer})
    sparsifier = Sparsifier(model).prune()
    for weight in sparsifier.weights:
        assert (weight.parameter == 0).float().mean() == 0.5
    assert "it.out_proj.weight_mask" in model.state_dict()
    names = {w.attribute: w.mask_name for w in sparsifier.weights if w.attribute != "weight"}
    assert all(f"it.{mask}" in model.state_dict() for mask in names.values())
    sparsifier.verify()
    x = torch.randn(3, 2, 8)
    key = torch.randn(3, 2, layer.kdim)
    value = torch.randn(3, 2, layer.vdim)
    y = layer(x, key, value)[0]
    with torch.no_grad():
        for weight in sparsifier.weights:
            weight.parameter[weight.mask] += 1.0
    assert not torch.allclose(y, layer(x, key, value)[0])


@pytest.mark.parametrize(
    ("layer", "name", "reason"),
    [
        (nn.Embedding(8, 4), "it", "a table of rows"),
        (nn.EmbeddingBag(8, 4), "it", "a table of rows"),
        (nn.ConvTranspose2d(8, 8, 3), "it", "input channels on axis 0"),
        (nn.LSTM(8, 8), "it.weight_hh_l0", "recurrent layers have no sparse kernels"),
        (nn.GRUCell(8, 8), "it.weight_ih", "recurrent layers have no sparse kernels"),
        (nn.Bilinear(4, 4, 4), "it", "Bilinear is no linear layer"),
        (Own(), "it", "Own is no linear layer"),
        (Adapted(8, 4), "it.lora_a", "lora_a is not the weight of its layer"),
        (parametrizations.weight_norm(nn.Linear(8, 4)), "it", "remove_parametrizations"),
        (parametrizations.spectral_norm(nn.Conv2d(8, 4, 1)), "it", "remove_parametrizations"),
        (prune.identity(nn.Linear(8, 4), "weight"), "it", "computed from others"),
        (nn.Linear(8, 4, device="meta"), "it", "on the meta device"),
        (nn.Linear(8, 4, dtype=torch.complex64), "it", "its dtype is torch.complex64"),
        (nn.LazyLinear(4), "it", "it has no shape yet"),
    ],
)
def test_what_is_never_pruned_says_why(layer, name, reason):
    assert reason in reasons_of(layer)[name]
    if not isinstance(layer, Adapted):
        assert found_in(layer) == []


def test_what_computes_a_weight_is_not_listed_beside_it():
    assert list(reasons_of(parametrizations.weight_norm(nn.Linear(8, 4)))) == ["it"]
    assert list(reasons_of(nn.utils.weight_norm(nn.Linear(8, 4)))) == ["it"]


def test_a_quantized_layer_says_so():
    linear = nn.Sequential(nn.Linear(8, 4))
    quantized = torch.ao.quantization.quantize_dynamic(linear, {nn.Linear})
    assert reasons_of(quantized) == {"it.0": "it is quantized already"}


def test_a_lazy_layer_is_found_once_it_has_a_shape():
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(InputError, match="0: it has no shape yet: run one batch"):
        Sparsifier(model).prune()
    model(torch.randn(2, 8))
    Sparsifier(model).prune().verify()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.again = self.first
        self.lm_head = nn.Linear(8, 12, bias=False)
        self.lm_head.weight = self.embed.weight


def test_shared_weights_are_pruned_once_and_all_their_names_listed():
    model = Tied()
    (weight,) = find_weights(model)
    assert (weight.name, weight.shared) == ("first", ("second", "again"))
    sparsifier = Sparsifier(model).prune()
    assert [name for name in model.state_dict() if "mask" in name] == [
        "first.weight_mask",
        "again.weight_mask",  # the same module, twice in the state
    ]
    assert (model.second.weight == 0).float().mean() == 0.5
    entry = sparsifier.report()[1]
    assert (entry.name, entry.shared, entry.pruned) == ("first", ("second", "again"), True)
    assert "shared by second, again" in sparsifier.table()
    other = Sparsifier(Tied()).restore(model.state_dict())
    other.verify()
    assert torch.equal(other.model.second.weight, model.first.weight)
    excluded = Sparsifier(Tied(), include=["first"], exclude=["second"])
    assert excluded.weights == []


def test_a_weight_tied_to_an_embedding_stays_dense():
    model = Tied()
    report = {entry.name: entry for entry in Sparsifier(model).prune().report()}
    assert report["embed"].shared == ("lm_head",)
    assert report["embed"].reason.startswith("shared by embed and lm_head: an embedding is")
    assert (model.lm_head.weight != 0).all()


def wrap_data_parallel(model):
    return nn.DataParallel(model)


@pytest.mark.parametrize(
    "wrap",
    [
        wrap_data_parallel,
        torch.optim.swa_utils.AveragedModel,
        torch.compile,
        lambda model: torch.compile(wrap_data_parallel(model)),
        lambda model: wrap_data_parallel(torch.compile(model)),
    ],
)
def test_wrapped_models_have_the_names_of_the_model_inside(wrap):
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    )
    names = [weight.name for weight in find_weights(model)]
    assert names == ["0", "1.0", "1.1.in_proj_weight", "1.1.out_proj"]
    assert [weight.name for weight in find_weights(wrap(model))] == names


def test_a_compiled_layer_has_its_own_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0] = torch.compile(model[0])
    assert [weight.name for weight in find_weights(model)] == ["0", "1"]


def test_a_model_that_is_one_layer():
    layer = nn.Linear(8, 8)
    (weight,) = find_weights(layer)
    assert isinstance(weight, WeightRef)
    assert weight.name == "weight"
    Sparsifier(layer).prune().verify()
    assert "weight_mask" in layer.state_dict()


def test_a_mask_of_the_users_own_is_not_overwritten():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].register_buffer("weight_mask", torch.full((8, 8), 0.5))
    sparsifier = Sparsifier(model).prune()
    assert [weight.name for weight in sparsifier.weights] == ["1"]
    assert (model[0].weight_mask == 0.5).all()
    assert "its module has another weight_mask" in sparsifier.report()[0].reason
