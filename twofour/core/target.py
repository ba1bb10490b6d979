"""Target: what a device can do. Part of every cache key and of every engine.

A CPU target names an instruction set the kernels know how to use, not a whole CPU: code for
`avx512vnni` runs on every CPU that has its features. `vector` is the portable path: whatever vector
unit LLVM finds for the architecture. `dotprod` is AArch64 with the dot products of Armv8.2.

A target may be another machine than the one that builds. Nothing is run or timed for it then: the
kernels are chosen by a cost model from what is known of a CPU (core/cpus.py), which it names.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twofour.core import cuda as cudas
from twofour.core.cpus import CPUS, cpu_named
from twofour.core.cuda import Cuda, parse_cuda
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.machine import usable_cores
from twofour.core.tensorrt import TensorRT, how_to_get, lacks, parse_tensorrt

# Instruction set -> the features (spelled as Linux and LLVM do) its kernels use; the best first.
_REQUIRED = {
    "dotprod": ("asimd", "asimddp"),
    "avx512vnni": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx2", "fma"),
    "avx2": ("avx2", "fma"),
    "vector": (),
}
ISAS = tuple(_REQUIRED)
TENSORRT = "tensorrt"
"""Stands for an instruction set where TensorRT brings the code."""
CUDA = "cuda"
"""Stands for an instruction set where the code is a GPU's."""
_WORD = "cpu:"
# (implementer, part) -> name, as Arm's reference manuals have them (MIDR_EL1).
_ARM_CORES = {
    ("0x41", "0xd08"): "Arm Cortex-A72",
    ("0x41", "0xd0b"): "Arm Cortex-A76",
    ("0x41", "0xd0c"): "Arm Neoverse N1",
    ("0x41", "0xd40"): "Arm Neoverse V1",
    ("0x41", "0xd49"): "Arm Neoverse N2",
    ("0x41", "0xd4f"): "Arm Neoverse V2",
}
_BF16_ISA, _BF16 = "avx512vnni", "avx512bf16"


@dataclass(frozen=True)
class Target:
    """A CPU to build for, or a GPU.

    Attributes:
        isa: "dotprod", "avx512vnni", "avx2" or "vector" (the portable path); "tensorrt" or
            "cuda" for a GPU.
        arch: machine architecture, for example "x86_64".
        model: the CPU's or GPU's name as it gives it; informative, timings are only true there.
        bf16: code may use the instructions for bfloat16, which not every CPU of the set has.
        tensorrt: of a GPU that TensorRT builds for, what builds for it and runs it; else None.
        cpu: name of the facts (core/cpus.py) that kernels are chosen by, where nothing is timed;
            "" for the machine that builds.
        cuda: of a GPU that is built for without TensorRT, which it is; else None.
    """

    isa: str
    arch: str
    model: str
    bf16: bool = False
    tensorrt: TensorRT | None = None
    cpu: str = ""
    cuda: Cuda | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether its code runs on a GPU."""
        return self.tensorrt is not None or self.cuda is not None

    @property
    def features(self) -> tuple[str, ...]:
        """CPU features without which code for this target must not run."""
        needed = _REQUIRED.get(self.isa, ())
        return (*needed, _BF16) if self.bf16 else needed

    def __str__(self) -> str:
        """As messages show it: cpu:ISA, cpu:ISA+bf16, tensorrt:sm89 or cuda:sm90."""
        gpu = self.tensorrt or self.cuda
        if gpu is not None:
            return str(gpu)
        return f"cpu:{self.isa}{'+bf16' * self.bf16}"

    def to_json(self) -> dict[str, Any]:
        """Plain data, as keys of caches have it."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Target:
        """The inverse of `to_json`.

        Raises:
            InputError: the instruction set is not one this version knows.
        """
        if data["isa"] not in (*_REQUIRED, TENSORRT, CUDA):
            raise InputError(
                f"unknown instruction set {data['isa']!r}", [f"expected one of {', '.join(ISAS)}"]
            )
        gpu = TensorRT(**data["tensorrt"]) if "tensorrt" in data else None
        own = data.get("cuda")
        cuda = None if own is None else Cuda(own["gpu"], tuple(own["libraries"]), own["driver"])
        more = data.get("bf16", False), gpu, data.get("cpu", ""), cuda
        return Target(data["isa"], data["arch"], data["model"], *more)


@dataclass(frozen=True)
class Host:
    """This machine as the system reports it.

    Attributes:
        arch: machine architecture.
        model: CPU name.
        features: feature names as Linux spells them, without underscores.
        cores: cores this process may use.
    """

    arch: str
    model: str
    features: frozenset[str]
    cores: int


def detect_host() -> Host:
    """Reads the CPU's name and features; without /proc they are unknown, so none."""
    info = Path("/proc/cpuinfo")
    model, flags = parse_cpuinfo(info.read_text(errors="replace") if info.exists() else "")
    model = model or platform.processor() or platform.machine()
    return Host(platform.machine(), model, flags, usable_cores())


def parse_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    """The name and features of the first CPU of a /proc/cpuinfo; "" and none where it lacks them.

    On ARM it has numbers for a name.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    flags = found.get("flags") or found.get("Features") or ""
    model = found.get("model name", "")
    if not model and "CPU part" in found:
        part = (found.get("CPU implementer", ""), found["CPU part"])
        model = _ARM_CORES.get(part, f"ARM core {':'.join(part)}")
    return model, frozenset(name.replace("_", "") for name in flags.split())


def host_target(isa: str | None = None) -> Target:
    """The target for this machine.

    Args:
        isa: force an instruction set instead of the best one.

    Raises:
        InputError: an unknown name.
        UnsupportedError: this CPU lacks a feature of the forced one.
    """
    host = detect_host()
    if isa is not None:
        if isa not in _REQUIRED:
            raise InputError(
                f"unknown instruction set {isa!r}", [f"expected one of {', '.join(ISAS)}"]
            )
        check_runs_here(Target(isa, host.arch, host.model))
        return Target(isa, host.arch, host.model)
    best = next(name for name, needs in _REQUIRED.items() if host.features.issuperset(needs))
    return Target(best, host.arch, host.model)


def why_no_bf16(target: Target) -> str:
    """Why code for `target` cannot use bfloat16 on this machine; "" if it can."""
    if target.cpu:
        return "bfloat16 is used where it is timed, not for another machine"
    if target.isa != _BF16_ISA:
        return f"bfloat16 needs AVX-512 with BF16, and the code is for {target}"
    host = detect_host()
    return "" if _BF16 in host.features else f"bfloat16 needs {_BF16}, which {host.model} lacks"


def missing_features(target: Target, host: Host | None = None) -> tuple[str, ...]:
    """What a machine, by default this one, lacks to run code for `target`; empty when it can."""
    if target.on_gpu and target.arch != platform.machine():
        return (f"architecture {target.arch}",)
    if target.tensorrt is not None:
        return lacks(target.tensorrt) if host is None else ("TensorRT, as far as is known",)
    if target.cuda is not None:
        return cudas.lacks(target.cuda) if host is None else ("GPU, as far as is known",)
    host = detect_host() if host is None else host
    if host.arch != target.arch:
        return (f"architecture {target.arch}",)
    return tuple(name for name in target.features if name not in host.features)


def check_runs_here(target: Target) -> None:
    """Refuses a target this machine cannot run.

    Raises:
        UnsupportedError: names what is missing.
    """
    lacking = missing_features(target)
    if lacking and target.tensorrt is not None:
        raise UnsupportedError(
            f"an engine of {target.tensorrt.title} for {target} cannot run on this machine",
            [f"missing: {', '.join(lacking)}"],
            how_to_get(target.tensorrt),
        )
    if lacking and target.cuda is not None:
        raise UnsupportedError(
            f"an engine for {target}{f' ({target.model})' if target.model else ''} cannot run on "
            "this machine",
            [f"missing: {', '.join(lacking)}"],
            cudas.how_to_get(target.cuda),
        )
    if lacking:
        host = detect_host()
        raise UnsupportedError(
            f"code for {target} cannot run on this machine",
            [
                f"needs {', '.join(target.features) or target.arch}",
                f"missing on {host.model} ({host.arch}): {', '.join(lacking)}",
            ],
            "rebuild the engine on this machine: twofour build MODEL.onnx -o E.engine, "
            f"or for it elsewhere: --target {_WORD}{_words_of(host)}",
        )


def _words_of(host: Host) -> str:
    """What `parse_target` takes for such a machine."""
    best = next(name for name, needs in _REQUIRED.items() if host.features.issuperset(needs))
    if best == "vector" and host.arch != "x86_64":
        return next((cpu.name for cpu in CPUS if (cpu.isa, cpu.arch) == (best, host.arch)), best)
    return best


def parse_target(text: str) -> Target:
    """The target of a word: "cpu", "cpu:NAME", "cuda", "cuda:sm90", "tensorrt", "tensorrt:sm89".

    `cpu` is this machine, `cpu:NAME` another one, for which nothing is timed. NAME is one of a CPU
    (core/cpus.py), or an instruction set: then the first CPU that has it stands for all.

    Raises:
        InputError: an unknown word or name.
    """
    if (gpu := parse_tensorrt(text)) is not None:
        return Target(TENSORRT, platform.machine(), "", tensorrt=gpu)
    if (own := parse_cuda(text)) is not None:
        return Target(CUDA, platform.machine(), "", cuda=own)
    if text == "cpu":
        return host_target()
    if not text.startswith(_WORD):
        raise InputError(
            f"unknown target {text!r}",
            ["expected cpu, cpu:NAME, cuda, cuda:sm90, tensorrt or tensorrt:sm89"],
            f"name one of {', '.join(_WORD + cpu.name for cpu in CPUS)}",
        )
    cpu = cpu_named(text.removeprefix(_WORD))
    return Target(cpu.isa, cpu.arch, cpu.model, cpu=cpu.name)
