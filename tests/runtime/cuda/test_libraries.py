"""What NVIDIA's libraries are asked, by libraries that write it down; and where they are found.

The stand-ins are compiled from fake_libraries.c, whose functions are declared as the headers of
cuBLASLt 13.1 and cuSPARSELt 0.8.0 declare them.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twofour.core.cuda_products import Product
from twofour.core.errors import EngineError, InputError, UnsupportedError
from twofour.runtime.cuda import cublaslt, cusparselt, cusparselt_plan
from twofour.runtime.cuda.libraries import CUBLASLT, CUSPARSELT, Library, Wanted, load, places

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
compiled = pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
INT8 = Product(m=32, n=64, k=128, x="int8", y="int32", x_row=160, y_row=64)
FULL = replace(
    INT8,
    y="int8",
    beta=0.5,
    r_row=64,
    by_channel=True,
    bias="float32",
    activation="Relu",
)


class Fake:
    """The stand-in and what was written down."""

    def __init__(self, path: Path) -> None:
        self.loaded = ctypes.CDLL(str(path))
        self.loaded.fake_written.restype = ctypes.c_char_p
        self.clear()

    def clear(self, refuse: str = "") -> None:
        self.loaded.fake_clear(refuse.encode())

    def lines(self, name: str = "") -> list[str]:
        text = self.loaded.fake_written().decode().splitlines()
        return [line.removeprefix(name).strip() for line in text if line.startswith(name)]

    def get(self, wanted: Wanted) -> Callable[[], Library]:
        library = Library(wanted, "fake.so", self.loaded)
        return lambda: library


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert COMPILER is not None
    target = tmp_path_factory.mktemp("fake") / "libfake.so"
    source = Path(__file__).with_name("fake_libraries.c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", target, source], check=True, timeout=60)
    return target


@pytest.fixture
def fake(built: Path) -> Fake:
    return Fake(built)


@compiled
def test_the_structures_have_the_sizes_of_the_headers(fake: Fake) -> None:
    assert ctypes.sizeof(cublaslt.Heuristic) == fake.loaded.fake_heuristic_bytes() == 96
    assert cusparselt_plan.STRUCT_BYTES >= 512  # cusparseLtHandle_t of 0.8.0; 11024 in 0.4


@compiled
def test_cublaslt_is_asked_for_the_transposed_product(fake: Fake) -> None:
    get = fake.get(CUBLASLT)
    assert get().title == "cuBLASLt 13.1.2"
    made = cublaslt.prepare(INT8.to_json(), 90, get=get)
    assert fake.lines("cublasLtMatmulDescCreate") == ["72 10"]
    assert fake.lines("cublasLtMatrixLayoutCreate") == [
        "3 128 64 128",
        "3 128 32 160",
        "10 64 32 64",
    ]
    assert fake.lines("cublasLtMatmulDescSetAttribute") == [
        "200000001 3 1/4",
        "200000001 4 0/4",
        "200000001 7 1/4",
    ]
    fake.clear()
    made.run(0x70000000A, (0x10000010, 0x20000020, 0x300000030))
    algorithm = "101010101010101"
    assert fake.lines() == [
        "cublasLtMatmul 1 10000010 20000020 300000030 300000030 beta 0 "
        f"algo {algorithm} 0/0 stream 70000000a"
    ]
    made.close()
    assert len(fake.lines("cublasLtMatrixLayoutDestroy")) == 3
    assert fake.lines("cublasLtMatmulDescDestroy") == ["200000001"]


@compiled
def test_cublaslt_is_given_the_epilogue(fake: Fake) -> None:
    made = cublaslt.prepare(FULL.to_json(), 90, get=fake.get(CUBLASLT))
    assert fake.lines("cublasLtMatmulDescCreate") == ["72 0"]
    attributes = fake.lines("cublasLtMatmulDescSetAttribute")
    assert [line.split()[1:] for line in attributes] == [
        ["3", "1/4"],
        ["4", "0/4"],
        ["7", "6/4"],  # RELU_BIAS
        ["26", "0/4"],  # of float32
        ["8", "16/8"],
        ["2", "4/4"],  # ALPHA_DEVICE_VECTOR_BETA_HOST
    ]
    fake.clear()
    made.run(0, (16, 32, 48, 64, 80, 96))
    assert fake.lines()[0].endswith("200000001 8 80/8")
    assert fake.lines("cublasLtMatmul ") == [
        "1 10 20 30 60 beta 0.5 algo 101010101010101 0/0 stream 0"
    ]


@compiled
def test_fp8_has_scales_of_rows_and_channels(fake: Fake) -> None:
    fp8 = replace(INT8, x="float8e4m3fn", y="float8e4m3fn", by_channel=True, by_row=True, fast=True)
    fp8 = replace(fp8, scaled_result=True)
    made = cublaslt.prepare(fp8.to_json(), 90, get=fake.get(CUBLASLT))
    assert fake.lines("cublasLtMatmulDescCreate") == ["68 0"]
    assert [line.split()[1] for line in fake.lines("cublasLtMatmulDescSetAttribute")] == (
        ["3", "4", "7", "31", "32", "17", "18", "20", "25"]
    )
    # y is bfloat16 where it would be read, and not given: there is nothing to add
    assert fake.lines("cublasLtMatrixLayoutCreate")[2:] == ["28 64 32 64", "14 64 32 64"]
    fake.clear()
    made.run(0, (16, 32, 48, 64, 80, 96))
    assert [line.split()[1:] for line in fake.lines("cublasLtMatmulDescSetAttribute")] == [
        ["17", "48/8"],
        ["18", "64/8"],
        ["20", "80/8"],
    ]
    assert fake.lines("cublasLtMatmul ")[0].startswith("1 10 20 0 60 beta 0")
    with pytest.raises(UnsupportedError, match="no products of float8 on a GPU"):
        cublaslt.prepare(fp8.to_json(), 80, get=fake.get(CUBLASLT))


@compiled
def test_cublaslts_algorithms_are_listed_and_taken(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cublaslt, "cublaslt", fake.get(CUBLASLT))
    found = cublaslt.algorithms(INT8, 90, 8)
    assert [each.workspace_bytes for each in found] == [0, 2000]  # the second has a bad state
    assert [each.algorithm for each in found] == ["01" * 64, "03" * 64]
    assert {each.version for each in found} == {130102}
    keys = [line.split()[0] for line in fake.lines("cublasLtMatmulPreferenceSetAttribute")]
    assert keys == ["1", "5", "6", "7", "8"]
    made = cublaslt.prepare(found[1].to_json(), 90, get=fake.get(CUBLASLT))
    assert made.product.roles == ("w", "x", "y", "workspace")
    assert made.sizes == (64 * 128, 31 * 160 + 128, 32 * 64 * 4, 2000)
    made.run(0, (16, 32, 48, 64))
    assert fake.lines("cublasLtMatmul ")[0].endswith("algo 303030303030303 40/2000 stream 0")


@compiled
def test_an_algorithm_of_another_version_is_refused(fake: Fake) -> None:
    other = replace(INT8, algorithm="01" * 64, version=120900)
    with pytest.raises(EngineError, match="of another cuBLASLt") as refused:
        cublaslt.prepare(other.to_json(), 90, get=fake.get(CUBLASLT))
    assert "expected version 120900, this is cuBLASLt 13.1.2" in str(refused.value)
    greedy = replace(INT8, algorithm="09" * 64, version=130102)
    with pytest.raises(EngineError, match="does not know the engine's algorithm"):
        cublaslt.prepare(greedy.to_json(), 90, get=fake.get(CUBLASLT))
    sparse = replace(INT8, algorithm="5", version=800)
    with pytest.raises(EngineError, match="it is number 5 of 5"):
        cusparselt.prepare(sparse.to_json(), 90, get=fake.get(CUSPARSELT))
    assert fake.lines("cublasLtMatmulDescDestroy")
    assert fake.lines("cusparseLtMatDescriptorDestroy")


@compiled
def test_cusparselt_is_asked_for_the_transposed_product(fake: Fake) -> None:
    get = fake.get(CUSPARSELT)
    wanted = replace(FULL, upper=1.0, algorithm="3/-1/0/0", version=800, workspace_bytes=512)
    wanted = replace(wanted, r_by_channel=True)
    made = cusparselt.prepare(wanted.to_json(), 90, get=get)
    assert fake.lines("cusparseLtStructuredDescriptorInit") == ["64 128 128 16 3 2 0"]
    assert fake.lines("cusparseLtDenseDescriptorInit") == ["128 32 160 16 3 1", "64 32 64 16 3 1"]
    assert fake.lines("cusparseLtMatmulDescriptorInit") == ["0 0 3222 0"]
    one = np.float32(1).view(np.int32)
    assert fake.lines("cusparseLtMatmulDescSetAttribute") == [
        "0 1/4",
        f"1 {one}/4",
        "5 1/4",
        "6 1/4",
        "8 16/8",
    ]
    assert fake.lines("cusparseLtMatmulAlgSetAttribute") == ["0 3/4", "3 -1/4"]
    assert fake.lines("cusparseLtMatmulPlanInit") == ["45"]
    assert made.sizes == (2304, 31 * 160 + 128, 2048, 256, 256, 256, 2048, 512)
    fake.clear()
    factors = np.full(64, 0.25, np.float32)  # read by the stand-in, as if it lay on the GPU
    held = np.concatenate([factors, factors])
    begin = held.ctypes.data + -held.ctypes.data % 16
    addresses = (16, 32, 48, 64, begin, 80, 96, 112)
    made.run(0xABCDEF0123, addresses)
    made.run(0xABCDEF0123, addresses)
    line = "16 10 20 30 60 beta 0.25 workspace 70 stream abcdef0123 1"
    assert fake.lines("cusparseLtMatmulPlanInit") == ["45"]  # a plan of its own for this bias
    assert fake.lines("cusparseLtMatmulDescSetAttribute")[-1] == "8 80/8"
    assert fake.lines("cusparseLtMatmul ") == [line, line]
    made.run(0xABCDEF0123, (16, 32, 48, 64, begin, 160, 96, 112))
    assert len(fake.lines("cusparseLtMatmulPlanInit")) == 2
    assert not fake.lines("cusparseLtMatmulPlanDestroy")
    fake.clear()
    made.close()
    assert sorted(fake.lines("cusparseLtMatDescriptorDestroy")) == sorted(["2", "2", "3"] * 3)
    assert fake.lines("cusparseLtMatmulAlgSelectionDestroy") == ["5"] * 3
    assert fake.lines("cusparseLtMatmulPlanDestroy") == ["6"] * 3
    assert fake.lines()[0].startswith("cusparseLtMatmulPlanDestroy")  # what it is made of follows


@compiled
def test_the_types_of_cusparselt(fake: Fake) -> None:
    half = replace(INT8, x="bfloat16", y="bfloat16", activation="Relu")
    cusparselt.prepare(half.to_json(), 80, get=fake.get(CUSPARSELT))
    assert fake.lines("cusparseLtMatmulDescriptorInit") == ["0 0 3222 2"]
    assert fake.lines("cusparseLtMatmulDescSetAttribute") == ["0 1/4"]
    fp8 = replace(INT8, x="float8e4m3fn", y="float8e4m3fn")
    with pytest.raises(UnsupportedError, match="no 2:4 products of float8e4m3fn"):
        cusparselt.prepare(fp8.to_json(), 80, get=fake.get(CUSPARSELT))
    fake.clear()
    cusparselt.prepare(fp8.to_json(), 90, get=fake.get(CUSPARSELT))
    types = [line.split()[4] for line in fake.lines("cusparseLtDenseDescriptorInit")]
    assert types == ["28", "28", "14"]


@compiled
def test_cusparselts_algorithms_are_listed(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparselt, "cusparselt", fake.get(CUSPARSELT))
    found = cusparselt.algorithms(INT8, 90, 3)
    assert [each.algorithm for each in found] == ["0", "1", "2"]
    assert {(each.workspace_bytes, each.version) for each in found} == {(512, 800)}
    long = replace(INT8, k=2048, x_row=2048)
    names = [each.algorithm for each in cusparselt.algorithms(long, 90, 99)]
    assert names[5:] == ["0/-1/0/0", "1/-1/0/0", "2/-1/0/0", "3/-1/0/0", "4/-1/0/0"]
    assert len(cusparselt.algorithms(long, 80, 99)) == 5
    fake.clear("cusparseLtMatmulPlanInit")
    assert cusparselt.algorithms(INT8, 90, 3) == []
    assert cusparselt.algorithms(replace(INT8, n=20, y_row=20), 90, 3) == []


class Gpu:
    """Memory of a GPU that does not compute."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}

    def take(self, size_bytes: int, what: str = "memory") -> int:
        self.held[4096 * (1 + len(self.held))] = size_bytes
        return 4096 * len(self.held)

    def give_back(self, address: int) -> None:
        self.held[address] = 0

    def to_gpu(self, to: int, array: np.ndarray[Any, Any], stream: int) -> None:
        assert array.nbytes <= self.held[to]

    def from_gpu(self, array: np.ndarray[Any, Any], source: int, stream: int) -> None:
        assert array.nbytes <= self.held[source]
        array[:] = 42

    def wait(self, stream: int) -> None:
        assert stream == 9


@compiled
def test_a_weight_is_compressed_on_the_gpu(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparselt, "cusparselt", fake.get(CUSPARSELT))
    gpu: Any = Gpu()
    packed = cusparselt.compress(INT8, np.zeros((64, 128), np.int8), gpu, 9)
    assert (packed == 42).all()
    assert packed.shape == (2304,)
    assert fake.lines("cusparseLtSpMMACompress2") == ["3 1 0 1000 2000 3000 9"]
    assert set(gpu.held.values()) == {0}
    with pytest.raises(InputError, match="does not fit its product"):
        cusparselt.compress(INT8, np.zeros((64, 64), np.int8), gpu, 9)
    fake.clear("cusparseLtSpMMACompress2")
    with pytest.raises(UnsupportedError, match="refuses cusparseLtSpMMACompress2"):
        cusparselt.compress(INT8, np.zeros((64, 128), np.int8), gpu, 9)
    assert set(gpu.held.values()) == {0}


@compiled
def test_wrong_operands_are_refused(fake: Fake) -> None:
    for made in (
        cublaslt.prepare(INT8.to_json(), 90, get=fake.get(CUBLASLT)),
        cusparselt.prepare(
            replace(INT8, workspace_bytes=512).to_json(), 90, get=fake.get(CUSPARSELT)
        ),
    ):
        fake.clear()
        with pytest.raises(EngineError, match="wrong operands"):
            made.run(0, (16, 32))
        with pytest.raises(EngineError, match="wrong operands"):
            made.run(0, (8,) * len(made.product.roles))
        assert fake.lines() == []


@compiled
def test_a_refusal_names_the_call_its_status_and_the_product(fake: Fake) -> None:
    fake.clear("cublasLtMatrixLayoutCreate")
    with pytest.raises(UnsupportedError) as refused:
        cublaslt.prepare(INT8.to_json(), 90, get=fake.get(CUBLASLT))
    text = str(refused.value)
    assert "cuBLASLt 13.1.2 refuses cublasLtMatrixLayoutCreate" in text
    assert "status 7: INVALID_VALUE" in text
    assert '"m":32' in text
    assert fake.lines("cublasLtMatmulDescDestroy")
    fake.clear("cusparseLtMatmulDescriptorInit")
    with pytest.raises(UnsupportedError, match="status 7: INTERNAL"):
        cusparselt.prepare(INT8.to_json(), 90, get=fake.get(CUSPARSELT))
    assert len(fake.lines("cusparseLtMatDescriptorDestroy")) == 3


class Version:
    """A library that tells this version."""

    def __init__(self, *parts: int) -> None:
        self._parts = parts

    def cublasLtGetStatusName(self, status: int) -> bytes:
        return b"OK"

    def cublasLtGetProperty(self, part: int, value: Any) -> int:
        value._obj.value = self._parts[part]
        return 0


def test_wheels_come_before_the_system(tmp_path: Path) -> None:
    for name in ("cu13/lib/libcublasLt.so.13", "cublas/lib/libcublasLt.so.12"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    found = list(places(CUBLASLT, (tmp_path,)))
    assert found == [
        str(tmp_path / "cu13/lib/libcublasLt.so.13"),
        str(tmp_path / "cublas/lib/libcublasLt.so.12"),
        "libcublasLt.so.13",
        "libcublasLt.so.12",
    ]


def test_the_first_library_that_loads_is_taken() -> None:
    def opened(path: str) -> Version:
        if path.endswith("13"):
            raise OSError("no such file")
        return Version(12, 9, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Version, "cublasLtGetStatusName", _Named())
        library = load(CUBLASLT, (), opened)
    assert (library.path, library.version) == ("libcublasLt.so.12", 120901)


class _Named:
    """A function of a library, whose type of result is set."""

    restype: Any = None

    def __call__(self, *arguments: Any) -> bytes:
        return b"OK"


def test_what_cannot_be_loaded_says_why_and_what_to_install() -> None:
    def nothing(path: str) -> Any:
        raise OSError(f"{path}: cannot open shared object file")

    with pytest.raises(UnsupportedError, match="cuSPARSELt cannot be loaded") as refused:
        load(CUSPARSELT, (), nothing)
    assert "libcusparseLt.so.0: cannot open" in str(refused.value)
    assert "pip install nvidia-cusparselt-cu13" in str(refused.value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Version, "cublasLtGetStatusName", _Named())
        with pytest.raises(UnsupportedError, match=r"is cuBLASLt 11\.9\.0; expected 12\.1 or"):
            load(CUBLASLT, (), lambda path: Version(11, 9, 0))
