"""Targets: chosen from what the host reports, refused with what it lacks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from twofour.core import target
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.target import (
    ISAS,
    Host,
    Target,
    check_runs_here,
    host_target,
    missing_features,
    why_no_bf16,
)

AVX2 = {"avx2", "fma"}
VNNI = {*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"}


@pytest.fixture
def host(monkeypatch):
    """Makes this machine one with the given features."""

    def become(*features: str, arch: str = "x86_64") -> None:
        here = Host(arch, "Test CPU", frozenset(features), 2)
        monkeypatch.setattr(target, "detect_host", lambda: here)

    return become


@pytest.mark.parametrize(
    ("features", "isa"),
    [
        (VNNI, "avx512vnni"),
        (VNNI - {"avx512vnni"}, "avx2"),
        (VNNI - {"avx512vl"}, "avx2"),
        (AVX2, "avx2"),
        ({"avx2"}, "vector"),
        (set(), "vector"),
    ],
)
def test_the_best_instruction_set_the_host_has_in_full(host, features, isa) -> None:
    host(*features)
    assert host_target() == Target(isa, "x86_64", "Test CPU")
    assert missing_features(host_target()) == ()


def test_another_architecture_is_the_portable_path(host) -> None:
    host("asimd", "neon", arch="aarch64")
    assert host_target() == Target("vector", "aarch64", "Test CPU")


def test_a_forced_one_is_refused_with_what_is_missing(host) -> None:
    host(*AVX2)
    assert host_target("avx2").isa == "avx2"
    assert host_target("vector").isa == "vector"
    with pytest.raises(UnsupportedError) as caught:
        host_target("avx512vnni")
    for name in VNNI - AVX2:
        assert name in caught.value.reasons[-1]
    assert "avx2" not in caught.value.reasons[-1]
    assert "--target cpu:avx2" in caught.value.fix
    assert "Test CPU" in str(caught.value)


def test_code_for_another_architecture_is_refused(host) -> None:
    host("asimd", arch="aarch64")
    foreign = Target("vector", "x86_64", "Test CPU")
    assert missing_features(foreign) == ("architecture x86_64",)
    with pytest.raises(UnsupportedError, match="x86_64") as caught:
        check_runs_here(foreign)
    assert "rebuild" in caught.value.fix


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError) as caught:
        host_target("avx9")
    assert all(name in str(caught.value) for name in ISAS)
    with pytest.raises(InputError, match="avx9"):
        Target.from_json({"isa": "avx9", "arch": "x86_64", "model": "x"})


def test_plain_data_and_back(host) -> None:
    host(*VNNI)
    for isa in ISAS[1:]:  # the first one is of another architecture
        one = host_target(isa)
        assert Target.from_json(one.to_json()) == one
        assert str(one) == f"cpu:{isa}"


def test_equal_features_of_another_model_run(host) -> None:
    host(*VNNI, "avx512vbmi")
    check_runs_here(replace(host_target(), model="Another CPU"))


def test_this_machine() -> None:
    here = target.detect_host()
    assert here.cores >= 1
    assert here.model
    for isa in ISAS[ISAS.index(host_target().isa) :]:
        check_runs_here(host_target(isa))


def test_bfloat16_is_a_feature_of_its_own(host) -> None:
    """Part of a target only if it is asked for: code without it runs where it is lacking."""
    host(*VNNI, "avx512bf16")
    plain, bf16 = host_target(), replace(host_target(), bf16=True)
    assert not plain.bf16
    assert why_no_bf16(plain) == ""
    assert set(bf16.features) - set(plain.features) == {"avx512bf16"}
    assert str(bf16) == "cpu:avx512vnni+bf16"
    assert Target.from_json(bf16.to_json()) == bf16
    host(*VNNI)
    check_runs_here(plain)
    assert "Test CPU lacks" in why_no_bf16(plain)
    with pytest.raises(UnsupportedError, match="avx512bf16"):
        check_runs_here(bf16)
    host(*AVX2, "avx512bf16")
    assert "for cpu:avx2" in why_no_bf16(host_target())
