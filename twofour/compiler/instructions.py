"""What a loop of generated code consists of, and how many cycles a CPU takes for a turn of it.

The code is what LLVM makes of a kernel for the CPU, as assembly; its instructions are put into the
classes of `core.cpus.Cpu`. A turn takes as long as what is fullest: the front end, the loads, the
stores, or some set of pipes with all that only these can take.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import combinations

from twofour.core.cpus import Cpu

LOAD, STORE, SCALAR = "load", "store", "scalar"
"""Classes beside those of `Cpu.pipes`: memory, and what takes no vector pipe."""
_LABEL = re.compile(r"(\.LBB\S+):")
_JUMP = re.compile(r"\t(?:b\.?\w*|cbn?z|tbn?z|j\w+)\s.*?(\.LBB\w+)$")
_X86_SIZE = {"zmm": 64, "ymm": 32, "xmm": 16}
_X86 = (
    ("dot", r"v?pdp(bus|w)s?d|v?pmadd(wd|ubsw)|vdpbf16ps"),
    ("multiply", r"v?pmul\w+"),
    ("shift", r"v?ps[lr][lav]\w+"),
    ("pick", r"v?(pshuf|perm|punpck|unpck|pack|shuf|pbroadcast|broadcast|insert|extract)\w*"
             r"|v?p(insr|extr|mov|align|blendv|blendm)\w+|vp(expand|compress)\w+"),
    ("convert", r"v?cvt\w+"),
    ("float", r"v?f?n?m?(add|sub|mul|div|max|min|madd|msub|nmadd)\d*[ps][sd]|vfn?m\w+"),
)  # fmt: skip
_ARM = (
    ("dot", r"[su]dot"),
    ("multiply", r"(s|u)?m(ul|la|ls|ull|lal)2?|sqdmulh"),
    ("shift", r"(s|u)?(shl|shr|shll|sra)2?|xtn2?|sq?xtu?n2?|uqxtn2?|sli|sri"),
    ("pick", r"tb[lx]|zip[12]|uzp[12]|trn[12]|ext|dup|ins|rev\d+|umov|smov"),
    ("convert", r"fcvt\w+|scvtf|ucvtf|frint\w"),
    ("float", r"f\w+"),
)


@dataclass(frozen=True)
class Instruction:
    """One instruction as the model sees it.

    Attributes:
        kinds: what it takes: classes of pipes, `LOAD`, `STORE`; `SCALAR` for none of these.
        size_bytes: of its vectors.
        copies: another register's value and nothing else: some CPUs take no pipe for it.
    """

    kinds: tuple[str, ...]
    size_bytes: int
    copies: bool = False


def inner_loop(assembly: str) -> list[str]:
    """The lines of the longest loop that holds no other, from its label to its last jump."""
    lines = assembly.splitlines()
    places = {m[1]: i for i, line in enumerate(lines) if (m := _LABEL.match(line))}
    loops = [
        (places[m[1]], i)
        for i, line in enumerate(lines)
        if (m := _JUMP.match(line)) and places.get(m[1], i) < i
    ]
    inner = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in loops)]
    first, last = max(inner, key=lambda loop: loop[1] - loop[0])
    return lines[first : last + 1]


def instructions(lines: list[str], arch: str) -> list[Instruction]:
    """Those of some lines of assembly; labels and directives are none."""
    read = _arm if arch == "aarch64" else _x86
    return [read(line) for line in lines if re.match(r"\t[a-z]", line)]


def counted(found: list[Instruction]) -> Counter[str]:
    """How many of each class there are; one that loads and multiplies counts as both."""
    return Counter(kind for each in found for kind in each.kinds)


def cycles(found: list[Instruction], cpu: Cpu) -> float:
    """Of one turn of a loop, as if its next turns were free to begin."""
    turns: Counter[str] = Counter()
    memory: Counter[str] = Counter()
    for each in found:
        for kind in each.kinds:
            if kind in (LOAD, STORE):
                memory[kind] += max(1, math.ceil(each.size_bytes / cpu.load_bytes))
            elif kind != SCALAR and not each.copies:
                pipes = cpu.pipes.get(kind, cpu.pipes["vector"])
                once = "".join(sorted(set(pipes)))
                again = len(pipes) // len(once)
                turns[once] += again * math.ceil(each.size_bytes / cpu.pipe_bytes)
    begun = len(found) / cpu.width
    return max(begun, memory[LOAD] / cpu.loads, memory[STORE] / cpu.stores, _pipe_cycles(turns))


def _pipe_cycles(turns: Counter[str]) -> float:
    """Of the fullest set of pipes: all that can run only there, over their number."""
    every = sorted(set("".join(turns)))
    sets = (set(some) for n in range(1, len(every) + 1) for some in combinations(every, n))
    return max(
        (sum(n for p, n in turns.items() if some.issuperset(p)) / len(some) for some in sets),
        default=0.0,
    )


def _x86(line: str) -> Instruction:
    name, _, rest = line.strip().partition("\t")
    operands = rest.split("#")[0].strip()
    sizes = [size for kind, size in _X86_SIZE.items() if f"%{kind}" in operands]
    in_memory = "(" in operands
    if not sizes:
        return Instruction((LOAD,) if in_memory and not name.startswith("lea") else (SCALAR,), 0)
    # AT&T syntax: the destination comes last, a mask behind it.
    stores = re.search(r"\)(\s*\{%k\d\})?$", operands) is not None
    moves = re.fullmatch(r"v?mov(dq[au]\d*|[au]p[sd]|ap[sd]|[dq]|s[sd])", name) is not None
    if moves or (in_memory and re.fullmatch(r"v?p?broadcast\w+", name)):
        kind = STORE if stores else LOAD if in_memory else "vector"
        whole = moves and "broadcast" not in name
        return Instruction((kind,), max(sizes) if whole else 4, kind == "vector")
    kind = _kind(name, _X86)
    if not in_memory:
        return Instruction((kind,), max(sizes))
    return Instruction((kind, STORE if stores else LOAD), max(sizes))


def _arm(line: str) -> Instruction:
    name, _, operands = line.strip().partition("\t")
    operands = operands.split("//")[0].strip()
    vector = re.match(r"\{?\s*[vqds]\d", operands) is not None
    if name.startswith(("ld", "st")):
        kind = LOAD if name.startswith("ld") else STORE
        count = len(re.findall(r"\b[vqdsxw]\d+", operands.split("[")[0]))
        if name.startswith("ld1r"):
            return Instruction((LOAD, "vector"), 16)
        return Instruction((kind,) * count, 16 if vector else 8)
    if not vector:
        return Instruction(("pick",) if name in ("umov", "smov", "fmov") else (SCALAR,), 8)
    return Instruction((_kind(name, _ARM),), 16)


def _kind(name: str, table: tuple[tuple[str, str], ...]) -> str:
    return next((kind for kind, names in table if re.fullmatch(names, name)), "vector")
