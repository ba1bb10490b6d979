"""cuBLASLt and cuSPARSELt on a GPU: every type and epilogue, every algorithm, graphs, recipes.

Numbers are small integers, so that sums are exact in every type. `-s` prints what the libraries
have. A case that a library may refuse is skipped, with the library's words.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

import numpy as np  # noqa: E402

from tests.gpu import launch  # noqa: E402
from tests.kernels.cuda.interpret import tensor_of, values_of  # noqa: E402
from tests.kernels.cuda.test_products import (  # noqa: E402
    PADDED,
    QUANTIZED,
    REAL,
    arrays_of,
    problem_of,
)
from twofour.compiler.cuda import libraries as compiler_libraries  # noqa: E402
from twofour.compiler.cuda.libraries import library_of, library_recipes, missing  # noqa: E402
from twofour.compiler.cuda.race import racer  # noqa: E402
from twofour.core.cuda_products import (  # noqa: E402
    CUBLASLT,
    CUSPARSELT,
    RESULTS,
    Product,
    read_product,
)
from twofour.core.errors import UnsupportedError  # noqa: E402
from twofour.kernels.cuda.kernel import LibraryKernel, Recipe  # noqa: E402
from twofour.kernels.cuda.problem import ConvProblem, Finish, View  # noqa: E402
from twofour.kernels.cuda.products import bias_type  # noqa: E402
from twofour.kernels.cuda.reference import conv_reference  # noqa: E402
from twofour.runtime.cuda import cublaslt, cusparselt  # noqa: E402
from twofour.runtime.cuda.device import Device, open_device  # noqa: E402
from twofour.runtime.cuda.libraries import versions  # noqa: E402
from twofour.runtime.cuda.prepared import LIBRARIES  # noqa: E402

pytestmark = pytest.mark.gpu
FP8 = "float8e4m3fn"
M, N, K = 48, 96, 256
LAST = {"float32": 1e-4, "float16": 2.0**-9, "bfloat16": 2.0**-6, FP8: 2.0**-3, "int32": 0}


@functools.cache
def device() -> Device:
    torch.zeros(1, device="cuda")
    return open_device(0)


def asked(library: str, x: str, y: str, **more: Any) -> Product:
    product = Product(M, N, K, x, y, K, N)
    return replace(product, **more)


def operands_of(product: Product, library: str) -> tuple[dict[str, Any], Any]:
    """Tensors of the GPU by role, and what y should be, float64."""
    p = product
    rng = np.random.default_rng(p.k + p.n)
    x = rng.integers(-4, 5, (p.m, p.x_row)).astype(np.float32)
    w = rng.integers(-4, 5, (p.n, p.k)).astype(np.float32)
    w.reshape(p.n, -1, 4)[:, :, [1, 2]] = 0
    values = {
        "x": (x, p.x),
        "r": (rng.integers(-9, 10, (p.m, p.r_row or p.n)).astype(np.float32), p.r),
        "scale": (rng.integers(1, 9, p.n).astype(np.float32) / 64, "float32"),
        "row_scale": (rng.integers(1, 9, p.m).astype(np.float32) / 8, "float32"),
        "r_scale": (rng.integers(1, 9, p.n).astype(np.float32) / 8, "float32"),
        "bias": (rng.integers(-20, 21, p.n).astype(np.float32), p.bias or "float32"),
        "y_scale": (np.array([0.5], np.float32), "float32"),
        "y": (np.full((p.m, p.y_row), 7, np.float32), p.y),
    }
    held = {role: plain(array, dtype).cuda() for role, (array, dtype) in values.items()}
    held["workspace"] = torch.zeros(max(16, p.workspace_bytes), dtype=torch.uint8, device="cuda")
    bits = plain(w, p.x)
    held["w"] = bits.cuda()
    if library == CUSPARSELT:
        raw = bits.view(torch.int16).numpy() if bits.element_size() == 2 else bits.numpy()
        with device().current():
            stream = device().stream()
            packed = cusparselt.compress(replace(p, algorithm="", version=0), raw, device(), stream)
        held["w"] = torch.from_numpy(packed).cuda()
    v = p.alpha * (x[:, : p.k].astype(np.float64) @ w.T.astype(np.float64))
    v *= values["scale"][0] if p.by_channel else 1
    v *= values["row_scale"][0][:, None] if p.by_row else 1
    beta = values["r_scale"][0] if p.r_by_channel else p.beta
    v += beta * values["r"][0][:, : p.n] if p.beta else 0
    v += values["bias"][0] if p.bias else 0
    return held, v


def plain(values: Any, dtype: str) -> Any:
    """A tensor of that type; float8 as bytes."""
    whole = values.astype(np.int32) if dtype in ("int8", "int32") else values
    found = tensor_of(whole, dtype)
    return found.view(torch.uint8) if dtype == FP8 else found


def finished(product: Product, v: Any, gelu: str = "GeluTanh") -> Any:
    if product.activation == "Relu":
        v = np.maximum(v, 0)
        v = np.minimum(v, product.upper) if product.upper else v
    if product.activation == "GeluTanh":
        kind = "tanh" if gelu == "GeluTanh" else "none"
        v = torch.nn.functional.gelu(torch.from_numpy(v), approximate=kind).numpy()
    v = v * 0.5 if product.scaled_result else v
    if product.y == "int8":
        return np.clip(np.rint(v), -128, 127)
    return np.clip(v, -448, 448) if product.y == FP8 else v


def run(product: Product, library: str, held: dict[str, Any]) -> Any:
    """y as the GPU has it."""
    with device().current():
        ready = LIBRARIES[library](product.to_json(), launch.capability(), 0)
        if ready.workspace_bytes > held["workspace"].nbytes:
            held["workspace"] = torch.zeros(ready.workspace_bytes, dtype=torch.uint8, device="cuda")
        roles = ready.product.roles
        for role, size in zip(roles, ready.sizes, strict=True):
            assert held[role].nbytes >= size, f"{role}: {held[role].nbytes} of {size} bytes"
        torch.cuda.synchronize()
        stream = torch.cuda.current_stream().cuda_stream
        ready.run(stream, tuple(held[role].data_ptr() for role in roles))
        torch.cuda.synchronize()
        ready.close()
    y = held["y"].cpu()
    y = y.view(torch.float8_e4m3fn) if product.y == FP8 else y
    return values_of(y).astype(np.float64)


def close(product: Product, found: Any, expected: Any) -> None:
    gaps = found[:, product.n :]
    assert (gaps == 7).all(), "wrote between the rows"
    found = found[:, : product.n]
    away = np.abs(found - expected)
    worst = np.unravel_index(np.argmax(away), away.shape)
    told = f"{product.to_json()}: at {worst} {found[worst]} for {expected[worst]}"
    told += f", {np.mean(away > 0):.2%} differ; {found[0, :6]} for {expected[0, :6]}"
    if product.y == "int8":
        assert away.max() <= 1, told
        assert (away > 0).mean() < 0.02, told
    else:
        assert (away <= LAST[product.y] * (np.abs(expected) + 1)).all(), told


def check(product: Product, library: str, may_refuse: bool = False) -> None:
    assert not list(product.wrong(library))
    try:
        held, v = operands_of(product, library)
        found = run(product, library, held)
    except UnsupportedError as error:
        if may_refuse:
            pytest.skip(f"refused: {error}")
        raise
    close(product, found, finished(product, v))


def test_the_libraries_are_here() -> None:
    print("libraries:", versions())
    assert missing() == {}


TYPES = [(lib, x, y) for lib in RESULTS for x in RESULTS[lib] for y in RESULTS[lib][x]]


@pytest.mark.parametrize(("library", "x", "y"), TYPES)
def test_types(library: str, x: str, y: str) -> None:
    product = asked(library, x, y, y_row=N + 32, alpha=1.0 if y == "int32" else 0.25)
    if x == "float32" and library == CUSPARSELT:
        pytest.skip("1:2, not 2:4")
    check(product, library)


EPILOGUES: dict[str, dict[str, Any]] = {
    "bias": {"bias": "?"},
    "relu": {"activation": "Relu"},
    "bias relu": {"bias": "?", "activation": "Relu"},
    "residual": {"beta": 0.5, "r_row": N, "bias": "?", "activation": "Relu"},
}


@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize(
    ("library", "x", "y"), [each for each in TYPES if each[2] != "int32" and each[1] != "float32"]
)
def test_epilogues(library: str, x: str, y: str, name: str) -> None:
    settings = dict(EPILOGUES[name])
    if "bias" in settings:
        settings["bias"] = bias_type(asked(library, x, y), library)
    if y == FP8 and name == "residual" and library == CUSPARSELT:
        pytest.skip("a residual of bfloat16 has other rows")
    check(asked(library, x, y, alpha=0.25, **settings), library, may_refuse=x in ("int8", FP8))


@pytest.mark.parametrize("library", [CUBLASLT, CUSPARSELT])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("y", ["int8", "float16", "bfloat16"])
def test_scales_of_channels(library: str, y: str, residual: bool) -> None:
    if y not in RESULTS[library]["int8"]:
        pytest.skip("no such result")
    more: dict[str, Any] = {"beta": 0.5, "r_row": N} if residual else {}
    product = asked(library, "int8", y, by_channel=True, activation="Relu", **more)
    product = replace(product, bias=bias_type(product, library))
    product = replace(product, r_by_channel=residual and library == CUSPARSELT)
    check(product, library, may_refuse=library == CUBLASLT)


@pytest.mark.parametrize("y", RESULTS[CUBLASLT][FP8])
@pytest.mark.parametrize("fast", [False, True])
def test_fp8_scales_of_rows_and_channels(y: str, fast: bool) -> None:
    product = asked(CUBLASLT, FP8, y, by_channel=True, by_row=True, fast=fast)
    product = replace(product, bias=bias_type(product, CUBLASLT))
    check(product, CUBLASLT, may_refuse=True)


def test_fp8_result_is_scaled_behind_gelu() -> None:
    product = asked(CUBLASLT, FP8, FP8, bias="bfloat16", activation="GeluTanh", alpha=0.01)
    check(replace(product, scaled_result=True), CUBLASLT, may_refuse=True)


@pytest.mark.parametrize("x", ["float16", "bfloat16"])
def test_gelu_is_that_by_tanh(x: str) -> None:
    product = asked(CUBLASLT, x, x, activation="GeluTanh", alpha=1 / 64)
    held, v = operands_of(product, CUBLASLT)
    found = run(product, CUBLASLT, held)[:, :N]
    ways = ("GeluTanh", "Gelu")
    away = {way: float(np.abs(found - finished(product, v, way)).max()) for way in ways}
    print(x, "gelu, largest difference:", away)
    assert away["GeluTanh"] <= LAST[x] * 5


def test_relu_has_an_upper_bound() -> None:
    for x in ("int8", "float16"):
        check(asked(CUSPARSELT, x, x, alpha=0.25, activation="Relu", upper=6.0), CUSPARSELT)


@pytest.mark.parametrize("x", ["int8", "float16", "bfloat16", FP8])
@pytest.mark.parametrize("library", [CUBLASLT, CUSPARSELT])
def test_every_algorithm(library: str, x: str) -> None:
    y = {"int8": "int8", FP8: "bfloat16"}.get(x, x)
    k = 4096
    product = asked(library, x, y, k=k, x_row=k, alpha=1 / 64)
    product = replace(product, bias=bias_type(product, library))
    list_all = cublaslt.algorithms if library == CUBLASLT else cusparselt.algorithms
    begin = time.perf_counter()
    with device().current():
        products = list_all(product, launch.capability(), 200)
    took_ms = (time.perf_counter() - begin) * 1e3
    sizes = sorted({each.workspace_bytes for each in products})
    told = f"{len(products)} algorithms in {took_ms:.0f} ms"
    print(f"{library} {x}: {told}, workspace {sizes[:1]} to {sizes[-1:]}")
    assert products
    held, v = operands_of(product, library)
    wrong = []
    results = racer(device().gpu.uuid).race(products, library, 1)
    broken = [each for each in results if each.us == math.inf]
    print(f"{library} {x}: broken {[(b.product.algorithm[:9], b.error[:90]) for b in broken]}")
    for each in [result.product for result in results if result.us < math.inf]:
        try:
            close(each, run(each, library, held), finished(each, v))
        except (AssertionError, UnsupportedError) as error:
            wrong.append(f"{each.algorithm[:40]}: {error}"[:600])
    assert not wrong, f"{len(wrong)} of {len(products)}:\n" + "\n".join(wrong[:6])


@pytest.mark.parametrize("library", [CUBLASLT, CUSPARSELT])
def test_a_graph_records_it(library: str) -> None:
    product = asked(library, "float16", "float16", bias="float16")
    held, v = operands_of(product, library)
    with device().current():
        ready = LIBRARIES[library](product.to_json(), launch.capability(), 0)
        held["workspace"] = torch.zeros(
            max(16, ready.workspace_bytes), dtype=torch.uint8, device="cuda"
        )
        addresses = tuple(held[role].data_ptr() for role in ready.product.roles)
        stream = device().stream()
        torch.cuda.synchronize()
        ready.run(stream, addresses)
        device().wait(stream)
        graph = device().capture(stream, lambda: ready.run(stream, addresses))
        held["y"].fill_(7)
        torch.cuda.synchronize()
        device().replay(graph, stream)
        device().wait(stream)
    close(product, values_of(held["y"]).astype(np.float64), finished(product, v))


def test_algorithms_that_break_harm_nobody_else() -> None:
    product = Product(512, 512, 512, "float16", "float16", 512, 512)
    with device().current():
        products = cusparselt.algorithms(product, launch.capability(), 200)
    results = racer(device().gpu.uuid).race(products, CUSPARSELT, 3)
    for each in results:
        print(each.product.algorithm, f"{each.us:.1f} us", each.error)
    assert results[0].us < math.inf
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()


def prepared(recipe: Recipe, tensors: dict[str, Any]) -> Any:
    """Starts the calls of a recipe on tensors by role."""
    place, call = library_of(recipe)
    before = replace(recipe, calls=recipe.calls[:place])
    after = replace(recipe, calls=recipe.calls[place + 1 :])
    held = dict(tensors) | {
        role: torch.from_numpy(np.array(array)).cuda() for role, array in recipe.constants.items()
    }
    held |= {
        role: torch.full((size,), 85, dtype=torch.uint8, device="cuda")
        for role, size in recipe.scratch.items()
    }
    plain_recipe = {"constants": {}, "scratch": {}}
    capability = launch.capability()
    first = launch.prepared(replace(before, **plain_recipe), held, capability)
    last = launch.prepared(replace(after, **plain_recipe), held, capability)
    ready = LIBRARIES[call.library](call.settings, capability, 0)
    addresses = tuple(held[role].data_ptr() for role in call.roles)
    stream = torch.cuda.current_stream().cuda_stream

    def start() -> None:
        first()
        ready.run(stream, addresses)
        last()

    return start


def conv_problem(dtype: str) -> ConvProblem:
    finish = replace(QUANTIZED, y_factor=3.0) if dtype == "int8" else replace(REAL, low=0.0)
    x, y = View.dense(dtype, 14, 14, 64), View.dense(dtype, 7, 7, 32)
    return ConvProblem(2, 14, 14, 64, 32, x, y, PADDED, finish=finish, pattern="2:4")


PROBLEMS = {
    "int8": problem_of("int8", "int8", QUANTIZED, rows=64),
    "int8 residual": problem_of(
        "int8", "int8", Finish(residual_scale=0.3, y_factor=5.0, low=0.0), rows=64, r="int8"
    ),
    "int8 to float16": problem_of("int8", "float16", Finish(), rows=64),
    "int8 odd rows": problem_of("int8", "int8", QUANTIZED, rows=7),
    "float16": problem_of("float16", "float16", replace(REAL, low=0.0), rows=64, r="float16"),
    "bfloat16": problem_of("bfloat16", "bfloat16", REAL, rows=64),
    "fp8": problem_of(FP8, FP8, replace(QUANTIZED, y_factor=1.0), rows=64),
    "fp8 to bfloat16": problem_of(FP8, "bfloat16", Finish(), rows=64),
    "int8 windows": conv_problem("int8"),
    "float16 windows": conv_problem("float16"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_recipes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_libraries, "_WORTH_MACS", 0)
    problem = PROBLEMS[name]
    arrays = arrays_of(problem)
    begin = time.perf_counter()
    recipes = library_recipes(problem, arrays, device(), effort=2)
    took_ms = (time.perf_counter() - begin) * 1e3
    print(f"{name}, {took_ms:.0f} ms:", [f"{each.tactic}: {each.config}" for each in recipes])
    assert {recipe.tactic for recipe in recipes} >= {"2:4 cusparselt"}
    tensors = {"x": tensor_of(arrays["x"], problem.x.dtype).cuda()}
    if problem.r is not None:
        tensors["r"] = tensor_of(arrays["r"], problem.r.dtype).cuda()
    expected = conv_reference(problem, arrays).astype(np.float64).reshape(-1)
    wrong = []
    for recipe in recipes:
        filled = np.full(expected.size, 7, np.float32)
        tensors["y"] = tensor_of(filled, problem.y.dtype).cuda()
        with device().current():
            prepared(recipe, tensors)()
            torch.cuda.synchronize()
        found = values_of(tensors["y"]).astype(np.float64).reshape(-1)
        away = np.abs(found - expected)
        bound = 1 if problem.y.dtype == "int8" else LAST[problem.y.dtype] * (np.abs(expected) + 1)
        many = problem.y.dtype == "int8" and (away > 0).mean() > 0.02
        if (away > bound).any() or many:
            worst = int(np.argmax(away))
            call = library_of(recipe)[1]
            wrong.append(
                f"{recipe.tactic} {recipe.config}: {found[worst]} for {expected[worst]}, "
                f"{np.mean(away > 0):.1%} differ; {call.settings[:400]}"
            )
    assert not wrong, "\n".join(wrong)


def test_memory_of_y_is_all_that_a_recipe_writes() -> None:
    """Sums and columns have guards behind them, at the sizes that the recipe asks for."""
    problem = PROBLEMS["int8 windows"]
    arrays = arrays_of(problem)
    for recipe in library_recipes(problem, arrays, device(), effort=0):
        call = library_of(recipe)[1]
        assert isinstance(call, LibraryKernel)
        product = read_product(call.settings, call.library)
        ready = LIBRARIES[call.library](call.settings, launch.capability(), 0)
        sizes = dict(zip(call.roles, ready.sizes, strict=True))
        for role, size in recipe.scratch.items():
            assert sizes.get(role, 0) <= size, (role, sizes, product)
        assert recipe.constants["w"].nbytes == sizes["w"]
