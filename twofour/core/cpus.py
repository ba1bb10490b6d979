"""What is known of CPUs that engines are built for without being there: names and a few facts.

The cost model (compiler/cost.py) counts the instructions of a kernel's code, and turns them into
time by these. Throughputs are those of the vendor's optimization guide or of measurements that are
named; caches are those of the core, and `ghz` is a usual clock: it scales all times alike, so no
choice depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from twofour.core.errors import InputError

Pipes = dict[str, str]
"""Class of instructions -> the pipes that take it, a letter each; all of them twice: two turns."""


@dataclass(frozen=True)
class Cpu:
    """One kind of core.

    Attributes:
        name: as `--target cpu:NAME` has it.
        model: as messages show it.
        isa: the best instruction set of ours that it has.
        arch: machine architecture.
        ghz: a usual clock.
        width: instructions that it begins a cycle.
        pipe_bytes: of a vector that one pipe takes in a cycle; wider ones take several turns.
        pipes: of the classes "vector" (additions, logic and all that is not below), "dot" (integer
            dot products), "float" (multiply, add, fused), "convert" (floats and integers),
            "multiply" (of integers), "pick" (table lookups, byte shuffles) and "shift".
        loads: of a vector register a cycle.
        stores: likewise.
        load_bytes: that one load or store takes at most; wider ones take several turns.
        dot_latency: cycles from one product to the next that adds to the same sum.
        l1_bytes: first-level data cache.
        l2_bytes: second-level cache of a core.
        l2_bytes_per_cycle: read from there.
        far_bytes_per_cycle: read from beyond it, by one core.
        source: of the facts.
    """

    name: str
    model: str
    isa: str
    arch: str
    ghz: float
    width: int
    pipe_bytes: int
    pipes: Pipes
    loads: float
    stores: float
    load_bytes: int
    dot_latency: int
    l1_bytes: int
    l2_bytes: int
    l2_bytes_per_cycle: float
    far_bytes_per_cycle: float
    source: str


_KB, _MB = 1 << 10, 1 << 20
_N1 = {"vector": "01", "dot": "01", "float": "01", "convert": "00", "multiply": "00",
       "pick": "01", "shift": "1"}  # fmt: skip
_ZEN4 = {
    "vector": "0123",
    "dot": "01",
    "float": "01",
    "convert": "23",
    "multiply": "03",
    "pick": "12",
    "shift": "12",
}
_INTEL = {  # of 512 bits: ports 0 and 1 are one
    "vector": "05",
    "dot": "05",
    "float": "05",
    "convert": "05",
    "multiply": "05",
    "pick": "5",
    "shift": "05",
}
_HASWELL = {
    "vector": "015",
    "dot": "0",
    "float": "01",
    "convert": "1",
    "multiply": "0",
    "pick": "5",
    "shift": "0",
}

CPUS = (
    Cpu(
        "neoverse-n1", "Arm Neoverse N1", "dotprod", "aarch64",
        2.6, 4, 16, _N1, 2, 2, 16, 1, 64 * _KB, _MB, 16, 6,
        "Arm Neoverse N1 Software Optimization Guide (PJDOC-466751330-9707) and LLVM's model of "
        "it (AArch64SchedNeoverseN1.td); caches: Arm Neoverse N1 TRM",
    ),
    Cpu(
        "cortex-a76", "Arm Cortex-A76", "dotprod", "aarch64",
        2.4, 4, 16, _N1, 2, 2, 16, 1, 64 * _KB, 512 * _KB, 16, 4,
        "Arm Cortex-A76 Software Optimization Guide (PJDOC-466751330-7215), Arm Cortex-A76 TRM",
    ),
    Cpu(
        "neoverse-v1", "Arm Neoverse V1", "dotprod", "aarch64",
        2.6, 8, 16,
        {"vector": "0123", "dot": "0123", "float": "0123", "convert": "02", "multiply": "02",
         "pick": "01", "shift": "13"},
        3, 2, 16, 1, 64 * _KB, _MB, 32, 8,
        "Arm Neoverse V1 Software Optimization Guide (PJDOC-466751330-9685) and LLVM's model of "
        "it (AArch64SchedNeoverseV1.td)",
    ),
    Cpu(
        "cortex-a72", "Arm Cortex-A72", "vector", "aarch64",
        1.8, 3, 16,
        {"vector": "01", "dot": "0", "float": "01", "convert": "00", "multiply": "00", "pick": "01",
         "shift": "1"},
        1, 1, 16, 5, 32 * _KB, _MB, 8, 2,
        "Arm Cortex-A72 Software Optimization Guide (UAN 0016A)",
    ),
    Cpu(
        "znver4", "AMD Zen 4", "avx512vnni", "x86_64",
        3.7, 6, 32, _ZEN4, 2, 1, 32, 4, 32 * _KB, _MB, 32, 20,
        "measured on an EPYC of this kind (docs/architecture.md); "
        "AMD Software Optimization Guide for Family 19h Models 10h-1Fh (57647)",
    ),
    Cpu(
        "icelake-server", "Intel Xeon (Ice Lake)", "avx512vnni", "x86_64",
        2.9, 5, 64, _INTEL, 2, 1, 64, 5, 48 * _KB, 1280 * _KB, 48, 10,
        "Intel 64 and IA-32 Architectures Optimization Reference Manual (248966), uops.info",
    ),
    Cpu(
        "haswell", "Intel Haswell", "avx2", "x86_64",
        3.0, 4, 32, _HASWELL, 2, 1, 32, 5, 32 * _KB, 256 * _KB, 32, 8,
        "Intel 64 and IA-32 Architectures Optimization Reference Manual (248966), uops.info",
    ),
    Cpu(
        "znver2", "AMD Zen 2", "avx2", "x86_64",
        3.3, 6, 32,
        {"vector": "013", "dot": "0", "float": "01", "convert": "3", "multiply": "0", "pick": "12",
         "shift": "2"},
        2, 1, 32, 3, 32 * _KB, 512 * _KB, 32, 10,
        "AMD Software Optimization Guide for Family 17h Models 30h and Greater (56305), uops.info",
    ),
    Cpu(
        "x86-64", "x86-64 with SSE2", "vector", "x86_64",
        3.0, 4, 16, _HASWELL, 2, 1, 16, 5, 32 * _KB, 256 * _KB, 32, 8,
        "as Haswell, in vectors of 16 bytes",
    ),
)  # fmt: skip
"""The first of an instruction set stands for all that have it."""


def cpu_named(name: str) -> Cpu:
    """The facts of a CPU, or of the first with an instruction set.

    Raises:
        InputError: nothing is known of it.
    """
    if name == "vector":  # of this architecture's many
        return next(cpu for cpu in CPUS if (cpu.isa, cpu.arch) == ("vector", "x86_64"))
    found = next((cpu for cpu in CPUS if name in (cpu.name, cpu.isa)), None)
    if found is None:
        sets = dict.fromkeys(cpu.isa for cpu in CPUS)
        raise InputError(
            f"nothing is known of a CPU {name!r}",
            [
                f"CPUs: {', '.join(cpu.name for cpu in CPUS)}",
                f"instruction sets: {', '.join(sets)}",
            ],
            "take one of these with the same or fewer features, or build on the machine itself",
        )
    return found
