"""The target CUDA: its words, and what a machine lacks for an engine."""

from __future__ import annotations

import json
import platform

import pytest

from twofour.core import cuda
from twofour.core.cuda import Cuda, how_to_get, lacks, parse_cuda
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.target import Host, Target, check_runs_here, missing_features, parse_target

OWN = Cuda("sm90", ("cublaslt 13.1.0.3", "cusparselt 0.8.1"), "580.1")


@pytest.fixture
def here(monkeypatch):
    """Makes this machine one with such GPUs and packages."""

    def become(*capabilities: tuple[int, int], modules=("cuda",), packages=("cublaslt",)) -> None:
        monkeypatch.setattr(cuda, "read_capabilities", lambda: capabilities)
        monkeypatch.setattr(cuda, "find_spec", lambda name: name.split(".")[0] in modules or None)
        monkeypatch.setattr(cuda, "installed", lambda name: "1" * (name in packages))

    return become


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cuda", Cuda()),
        ("cuda:sm90", Cuda("sm90")),
        ("cuda:sm_86", Cuda("sm86")),
        ("cpu", None),
        ("tensorrt:sm89", None),
    ],
)
def test_words(text: str, found: Cuda | None) -> None:
    assert parse_cuda(text) == found
    if found is not None:
        target = parse_target(text)
        assert (target.isa, target.cuda, target.arch) == ("cuda", found, platform.machine())
        assert str(target) == text.replace("_", "")


@pytest.mark.parametrize(
    ("text", "message"), [("cuda:h100", "unknown GPU"), ("cuda:", "unknown"), ("cuda:sm75", "old")]
)
def test_a_word_that_is_no_gpu_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_target(text)
    assert caught.value.fix


def test_the_capability_is_that_of_the_name() -> None:
    assert Cuda("sm90").capability == 90
    assert Cuda("sm120").capability == 120
    with pytest.raises(InputError, match="names no GPU"):
        _ = Cuda().capability


def test_code_fits_the_gpu_it_was_timed_on_and_no_other() -> None:
    assert Cuda("sm90").fits((9, 0))
    assert Cuda("sm120").fits((12, 0))
    assert not Cuda("sm80").fits((8, 6))
    assert Cuda().fits((8, 6))


def test_a_target_survives_json() -> None:
    target = Target("cuda", "x86_64", "NVIDIA H200", cuda=OWN)
    assert Target.from_json(json.loads(json.dumps(target.to_json()))) == target
    assert "cuda" not in Target("avx2", "x86_64", "A CPU").to_json()


def test_what_is_missing_is_named(here) -> None:
    here((9, 0), packages=("cublaslt", "cusparselt"))
    assert lacks(OWN) == ()
    here((8, 9), (8, 0), modules=())
    assert lacks(OWN) == (
        "package cuda-bindings",
        "cusparselt 0.8.1 (package nvidia-cusparselt-cu13)",
        "GPU for sm90 (here is sm89, sm80)",
    )
    here(packages=("cublaslt", "cusparselt"))
    assert lacks(OWN) == ("GPU for sm90",)
    assert lacks(Cuda()) == ("GPU",)


def test_an_engine_for_another_gpu_is_refused_with_the_way_out(here) -> None:
    here((8, 9), packages=("cublaslt", "cusparselt"))
    target = Target("cuda", platform.machine(), "NVIDIA H200", cuda=OWN)
    with pytest.raises(UnsupportedError, match=r"cuda:sm90 \(NVIDIA H200\) cannot run") as caught:
        check_runs_here(target)
    assert "GPU for sm90 (here is sm89)" in str(caught.value)
    assert "--target cuda" in how_to_get(OWN)
    assert "pip install 'twofour[cuda]'" in caught.value.fix
    here((9, 0), packages=("cublaslt", "cusparselt"))
    check_runs_here(target)


def test_another_architecture_and_another_host_are_refused(here) -> None:
    here((9, 0))
    assert missing_features(Target("cuda", "riscv", "", cuda=OWN)) == ("architecture riscv",)
    other = Host(platform.machine(), "A CPU", frozenset(), 2)
    assert missing_features(Target("cuda", platform.machine(), "", cuda=OWN), other)


def test_installed_asks_the_packages() -> None:
    assert cuda.installed("triton")
    assert cuda.installed("cuda-bindings")
