"""The page of quantize: every tensor, safe with any names, whatever the figures are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.report.test_sensitivity_page import Page
from twofour.core.errors import InputError
from twofour.report.histograms import percent
from twofour.report.quantize import quantize_page, write_quantize

HOSTILE = '"><script>alert(1)</script><img src=x onerror="a()">'


def tensor(name: str, sqnr_db: float | None, **more: Any) -> dict[str, Any]:
    plain = {
        "name": name,
        "kind": "activation",
        "node": f"{name}.node",
        "dtype": "int8",
        "scales": 1,
        "scale": 0.01,
        "zero_point": 0,
        "seen": [-3.0, 4.0],
        "kept": [-1.28, 1.27],
        "clipped": 0.0123,
        "sqnr_db": sqnr_db,
        "worst_channel_db": None,
        "values": 1000,
        "bins": {"low": -3.0, "high": 4.0, "counts": [0, 5, 900, 5] * 32},
    }
    return plain | more


def found(*tensors: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A document of `twofour quantize --json --report`."""
    layers = [
        {"layer": f"{each['name']}.node", "op": "Conv", "sqnr_db": 20.0, "cosine": 0.99}
        for each in tensors
    ]
    moved = [
        {"name": each["name"], "values": 640, "own": 3, "own_by_more": 0, "by_one": 7, "by_more": 1}
        for each in tensors
    ]
    return {
        "model": "m.onnx",
        "size_bytes": 12345,
        "method": "mse",
        "activation": "int8",
        "recipe": "fast",
        "steps": [{"name": "bias", "changed": 3, "notes": []}],
        "int8_layers": 3,
        "float_layers": [{"node": "head", "op": "Gemm", "reason": "excluded by name"}],
        "mixed": None,
        "quality": {
            "tensors": list(tensors),
            "layers": layers,
            "layer_samples": 64,
            "moved": moved,
            "moved_samples": 16,
            "notes": ["a note of it"],
        },
    } | more


def test_every_tensor_is_there() -> None:
    names = [f"block.{k}.relu" for k in range(90)]
    text = quantize_page(found(*(tensor(name, 10.0 + k) for k, name in enumerate(names))))
    page = Page(text)
    assert page.open == []
    assert page.links == ["data:,"]  # no icon is asked for
    whole = " ".join(page.texts)
    for name in names:
        assert text.count(f">{name}</td>") == (3 if names.index(name) < 10 else 2)
        assert f"histogram of {name}" in text
        assert f"{name}.node (Conv): 20.0 dB" in whole
    assert page.tags.count("figure") == 90
    assert len(text) < 90 * 8000


def test_what_is_clipped_is_drawn_apart() -> None:
    text = quantize_page(found(tensor("a", 12.0)))
    assert 'class="cost" d="M' in text
    inside = quantize_page(found(tensor("a", 12.0, kept=[-5.0, 5.0], clipped=0.0)))
    assert 'class="cost" d="M' not in inside
    assert "clipped 1.23 %" in text
    assert "clipped" not in inside.split("<figcaption>")[1].split("</figcaption>")[0]


def test_hostile_names_are_escaped() -> None:
    mixed = mixed_part(HOSTILE)
    text = quantize_page(found(tensor(HOSTILE, 3.0), model=HOSTILE, mixed=mixed))
    page = Page(text)
    assert page.open == []
    assert "img" not in page.tags
    assert page.tags.count("script") == 1  # the page's own
    assert HOSTILE not in text


def test_a_very_long_name_does_not_fill_the_page() -> None:
    name = "a" * 3000 + ".last"
    text = quantize_page(found(tensor(name, 3.0)))
    assert text.count(f'title="{name}">...') == 4  # worst, figure, table of all, moved


def mixed_part(name: str) -> dict[str, Any]:
    rows = [("float", True), ("int8", False)]
    return {
        "metric": "top1",
        "unit": "%",
        "samples": 500,
        "dense": 91.2,
        "int8": 43.6,
        "mixed": 91.0,
        "layers": [
            {"layer": f"{name}.{form}", "op": "Conv", "gain": 1.0, "is_float": is_float}
            for form, is_float in rows
        ],
    }


def test_layers_left_float_are_said() -> None:
    whole = " ".join(Page(quantize_page(found(tensor("a", 3.0), mixed=mixed_part("conv")))).texts)
    assert "1 layer left float: conv.float" in whole.replace("\n", " ")
    assert "conv.int8" not in whole


def test_figures_that_are_none() -> None:
    """As the JSON has them: infinite, not looked at, nothing but one value."""
    tensors = (
        tensor("exact", None),
        tensor("unseen", None, seen=None, clipped=None, bins=None, values=0),
        tensor(
            "constant",
            30.0,
            seen=[2.0, 2.0],
            bins={"low": 2.0, "high": 2.0, "counts": [7] + [0] * 127},
        ),
        tensor("weight", 40.0, kind="weight", worst_channel_db=31.25, scales=64),
    )
    document = json.loads(json.dumps(found(*tensors)))
    document["quality"]["layers"][0]["sqnr_db"] = None
    text = quantize_page(document)
    assert Page(text).open == []
    for part in ("exact", "not looked at", "31.2 dB", "(largest of 64)"):
        assert part in text
    assert "nan" not in text.lower().replace("unseen", "")
    assert "inf dB" not in text


def test_nothing_quantized() -> None:
    empty = found()
    assert Page(quantize_page(empty)).open == []


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, ""), (0.0, "0 %"), (1e-9, "<0.0001 %"), (0.0123, "1.23 %"), (1.0, "100 %")],
)
def test_shares(share: float | None, text: str) -> None:
    assert percent(share) == text


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_quantize(found(tensor("a", 3.0)), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(InputError, match="cannot write"):
        write_quantize(found(tensor("a", 3.0)), tmp_path / "none" / "page.html")
