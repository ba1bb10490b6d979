"""Forms for a GPU, and that a forecast without its GPU is refused: it is made of times."""

from __future__ import annotations

import pytest

from tests.predict.test_forecast import network
from twofour.compiler.build import BuildOptions
from twofour.compiler.forms import FP8, FP16, GPU_PRECISIONS, INT8, Form, Forms
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.gpus import read_capabilities
from twofour.core.target import parse_target
from twofour.predict.forecast import forecast

SM90 = parse_target("cuda:sm90")
UNTIMED = BuildOptions(tuning_effort=0)


def forms() -> Forms:
    """Of a small network, for a GPU that need not be here."""
    return Forms.of(network(), {}, GPU_PRECISIONS, SM90)


def test_each_precision_of_a_gpu_is_there_dense_and_pruned() -> None:
    found = forms().list(("2:4", "2:4/pair"))
    assert found == tuple(Form(p, pattern) for p in GPU_PRECISIONS for pattern in ("", "2:4"))
    assert str(Form(FP8, "2:4")) == "float8 2:4"


@pytest.mark.parametrize(
    ("precision", "holds"),
    [("f32", "float32"), (FP16, "float16"), ("bf16", "bfloat16"), (INT8, "int8"),
     (FP8, "float8e4m3fn")],
)  # fmt: skip
def test_a_form_is_built_in_its_precision(precision: str, holds: str) -> None:
    engine = forms().build(Form(precision, "2:4"), UNTIMED)
    assert str(engine.plan.target) == "cuda:sm90"
    products = [layer for layer in engine.plan.layers if layer.pattern]
    assert {layer.precision for layer in products} == {holds}
    assert "2:4" in {layer.pattern for layer in products}


def test_what_is_not_here_is_not_forecast() -> None:
    with pytest.raises(InputError, match="nothing can be forecast for"):
        forecast(network(), target="cpu:neoverse-n1")
    with pytest.raises(InputError, match="unknown precision 'fp16'"):
        forecast(network(), precisions=["fp16"])
    if not read_capabilities():
        with pytest.raises(UnsupportedError, match="cannot run on this machine"):
            forecast(network(), target="cuda")
