"""Masks of tensors are those of arrays, bit for bit, on every device there is."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.weights import NAMES, weights_with_pattern
from twofour.core import criteria
from twofour.core import masks as core_masks
from twofour.core.errors import InputError
from twofour.core.patterns import Pattern
from twofour.core.tiles import search_of
from twofour.train import masks
from twofour.train.masks import mask_of

DEVICES = ("cpu", *(["cuda"] if torch.cuda.is_available() else []))


def by_kernels(energy, name, search=None):
    """As on a device that is no CPU."""
    pattern = Pattern.parse(name)
    return masks._by_kernels(energy, pattern, search_of(pattern, search))


def assert_same(energy, name, search=None):
    expected = core_masks.mask_of(energy, name, search)
    for device in DEVICES:
        tensor = torch.from_numpy(energy).to(device)
        for found in (mask_of(tensor, name, search), by_kernels(tensor, name, search)):
            assert found.dtype == torch.bool
            assert found.device.type == device
            assert found.is_contiguous()
            np.testing.assert_array_equal(found.cpu().numpy(), expected)


@given(
    weights_with_pattern((*NAMES, "2:5/2d", "16:32")),
    st.sampled_from((np.float32, np.float64)),
    st.sampled_from((None, "greedy")),
)
@settings(max_examples=150, deadline=None)
def test_equal_to_arrays_bit_for_bit(case, dtype, search):
    w, name = case
    assert_same(np.square(w.astype(dtype)), name, search)


@pytest.mark.parametrize("name", ["2:4", "2:4/pair", "2:4/2d"])
@pytest.mark.parametrize("scale", [1e-25, 1e-19, 1e17, 1e19])
def test_equal_at_the_ends_of_the_range(name, scale):
    """Where squares are subnormal or zero, and where sums of them overflow."""
    w = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32) / 2 * scale
    with np.errstate(over="ignore"):
        energy = w * w
    energy[~np.isfinite(energy)] = np.finfo(np.float32).max
    assert_same(energy, name)
    if name == "2:4/2d":
        assert_same(energy, name, "greedy")


@pytest.mark.parametrize("search", ["exhaustive", "greedy"])
def test_sums_are_rounded_alike(search):
    """Values whose sums depend on the order of adding decide which tile mask is the best."""
    values = np.array([1, 1 + 2**-23, 2**-24, 3 * 2**-25, 3 * 2**-24, 2, 0.5], np.float32)
    energy = np.random.default_rng(2).choice(values, (256, 64))
    assert_same(energy, "2:4/2d", search)


def test_parts_do_not_show(monkeypatch):
    energy = np.random.default_rng(1).random((64, 64, 3), np.float32)
    monkeypatch.setattr(masks, "_MOST_SUMS", 1000)
    assert_same(energy, "2:4/2d")


def test_masks_of_weights_are_magnitude_masks():
    w = torch.nn.Conv2d(32, 64, 3).weight
    for name in ("2:4", "2:4/pair", "2:4/2d"):
        found = mask_of(criteria.magnitude(w), name)
        assert not found.requires_grad
        expected = core_masks.magnitude_mask(w.detach().numpy(), name)
        np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_ranked_in_float32(dtype):
    energy = torch.rand(64, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    for name in ("2:4", "2:4/pair", "2:4/2d"):
        expected = core_masks.mask_of(energy.float().numpy(), name)
        np.testing.assert_array_equal(mask_of(energy, name).numpy(), expected)


def test_channels_last_memory():
    energy = torch.rand(8, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    turned = energy.to(memory_format=torch.channels_last)
    for name in ("2:4", "4:8", "2:4/2d"):
        found = mask_of(turned, name)
        assert found.is_contiguous()
        assert torch.equal(found, mask_of(energy, name))


@pytest.mark.parametrize("name", ["2:4", "8:16", "2:4/pair", "2:4/2d"])
def test_a_compiler_takes_it(name):
    """1-D masks as one graph: without the check nothing waits for the device."""
    pattern = Pattern.parse(name)

    @torch.compile(fullgraph=not pattern.both, backend="eager")
    def pruned(w, pattern=pattern):
        return w * mask_of(criteria.magnitude(w), pattern, check=False)

    w = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pruned(w), w * mask_of(w * w, name))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (float("nan"), "1 of its values are NaN"),
        (float("inf"), "NaN or infinite"),
        (-1.0, "1 of its energies are negative"),
    ],
)
@pytest.mark.parametrize("name", ["2:4", "2:4/pair", "2:4/2d", "8:16"])
def test_energies_without_rank_are_refused(bad, message, name):
    energy = torch.ones(64, 16)
    energy[33, 2] = bad
    with pytest.raises(InputError, match=message) as on_cpu:
        mask_of(energy, name)
    with pytest.raises(InputError, match=message) as elsewhere:
        masks._require_ranks(energy, Pattern.parse(name))
    assert str(on_cpu.value) == str(elsewhere.value)


def test_other_errors():
    with pytest.raises(InputError, match=r"6 output channels are not a multiple of 4"):
        mask_of(torch.ones(6, 4), "2:4/2d")
    with pytest.raises(InputError, match=r"expected floats; got torch\.int64"):
        mask_of(torch.ones(4, 4, dtype=torch.int64), "2:4", check=False)
    with pytest.raises(InputError, match="use the greedy search"):
        mask_of(torch.ones(8, 8), "4:8/2d", "exhaustive")
