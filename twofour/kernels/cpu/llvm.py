"""The one home of code generation: LLVM IR text to object code, object code to callable addresses.

Kernels write LLVM IR as text through `Function`, a builder of straight code and counted loops. Text
is what LLVM parses anyway, it is several times quicker to produce than an object graph, and a dump
of it is what people read.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import llvmlite
import llvmlite.binding as binding

from twofour.core.target import Target

LLVM_VERSION = ".".join(map(str, binding.llvm_version_info))
TOOLS = f"llvmlite {llvmlite.__version__}, LLVM {LLVM_VERSION}"

# LLVM's names: (CPU, features) of each architecture's instruction sets.
_LLVM_CPU = {
    ("x86_64", "avx512vnni"): ("x86-64-v4", "+avx512vnni,-prefer-256-bit"),
    ("x86_64", "avx2"): ("x86-64-v3", ""),
    ("x86_64", "vector"): ("x86-64", ""),
    ("aarch64", "dotprod"): ("generic", "+neon,+dotprod"),
    ("aarch64", "vector"): ("generic", "+neon"),
}
_ORDERED_FOR = {"avx512vnni": "znver4"}
_TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}
_COMPILE_LOCK = threading.Lock()

# What code for AVX-512 VNNI may use: all that every CPU with it has, and nothing of later ones.
_AVX512_BASE = frozenset(
    "64bit cmov crc32 cx8 cx16 fxsr mmx sahf sse sse2 sse3 ssse3 sse4.1 sse4.2 popcnt avx f16c bmi"
    " bmi2 lzcnt movbe xsave avx512cd evex512".split()
)

# Without "no-builtins" LLVM turns copy loops into calls of memcpy: the object would need a library,
# and a table for its address that the memory manager of `runtime.cpu.Code` does not provide for.
_ATTRIBUTES = 'nounwind "no-builtins"'

Value = str
Carried = Sequence[tuple[str, Value]]


@dataclass
class Function:
    """One function being written.

    Attributes:
        name: its symbol.
        args: (type, name) pairs; the values are "%name".
        linkage: "" or "internal".
        returns: its return type.
    """

    name: str
    args: Sequence[tuple[str, str]]
    linkage: str = ""
    returns: str = "void"
    lines: list[str] = field(default_factory=lambda: ["entry:"])
    declares: set[str] = field(default_factory=set)
    _count: int = 0
    _block: str = "entry"

    def let(self, text: str) -> Value:
        """A new value defined by one instruction."""
        self._count += 1
        self.lines.append(f"  %v{self._count} = {text}")
        return f"%v{self._count}"

    def do(self, text: str) -> None:
        """An instruction without a value."""
        self.lines.append(f"  {text}")

    def call(self, returns: str, name: str, *args: tuple[str, Value]) -> Value:
        """Calls an intrinsic or external function, declaring it; `args` are (type, value)."""
        self.declares.add(f"declare {returns} @{name}({', '.join(t for t, _ in args)})")
        text = f"call {returns} @{name}({', '.join(f'{t} {v}' for t, v in args)})"
        if returns == "void":
            self.do(text)
            return ""
        return self.let(text)

    def constant(self, kind: str, values: Sequence[str]) -> Value:
        """A pointer to a constant array of the module; equal ones are one."""
        items = ", ".join(f"{kind} {value}" for value in values)
        name = f"table.{hashlib.sha256(items.encode()).hexdigest()[:16]}"
        array = f"[{len(values)} x {kind}] [{items}]"
        self.declares.add(f"@{name} = private unnamed_addr constant {array}")
        return f"@{name}"

    def at(self, pointer: Value, offset: int | Value) -> Value:
        """`pointer` moved by `offset` bytes (a constant or an i64 value)."""
        if offset == 0:
            return pointer
        return self.let(f"getelementptr i8, ptr {pointer}, i64 {offset}")

    def load(self, kind: str, pointer: Value, offset: int | Value = 0, align: int = 1) -> Value:
        """A value of type `kind` at `pointer + offset` bytes."""
        return self.let(f"load {kind}, ptr {self.at(pointer, offset)}, align {align}")

    def store(
        self, kind: str, value: Value, pointer: Value, offset: int | Value = 0, align: int = 1
    ) -> None:
        """Stores `value` at `pointer + offset` bytes."""
        self.do(f"store {kind} {value}, ptr {self.at(pointer, offset)}, align {align}")

    def int_op(self, op: str, a: Value | int, b: Value | int, kind: str = "i64") -> Value:
        """Integer arithmetic, `op` as LLVM spells it (add, mul, sub, udiv, urem, ...)."""
        return self.let(f"{op} {kind} {a}, {b}")

    def in_order(self) -> None:
        """Loads and stores written before stay before those written after.

        LLVM would begin all loads of a long block at once, and spill what does not fit. The fence
        emits no instruction.
        """
        self.do('fence syncscope("singlethread") seq_cst')

    def splat(self, kind: str, value: Value, lanes: int = 16) -> Value:
        """[value] * lanes."""
        vector = f"<{lanes} x {kind}>"
        first = self.let(f"insertelement {vector} poison, {kind} {value}, i32 0")
        return self.let(
            f"shufflevector {vector} {first}, {vector} poison, <{lanes} x i32> zeroinitializer"
        )

    def block(self, name: str) -> None:
        """Starts a basic block; the one before must have ended with a branch."""
        self._block = name
        self.lines.append(f"{name}:")

    def label(self, stem: str) -> str:
        """A fresh block name."""
        self._count += 1
        return f"{stem}{self._count}"

    def loop(
        self,
        begin: Value | int,
        end: Value | int,
        carried: Carried,
        body: Callable[[Value, list[Value]], Sequence[Value]],
        step: int = 1,
    ) -> list[Value]:
        """For i in range(begin, end, step): carried = body(i, carried); returns the last `carried`.

        Runs zero times if begin >= end.

        Args:
            begin: i64 value or constant.
            end: i64 value or constant.
            carried: (type, initial value) pairs.
            body: emits one turn; gets the index and the carried values, returns the new ones.
            step: constant > 0.
        """
        head, inside, done = self.label("head"), self.label("body"), self.label("done")
        before = self._block
        self.do(f"br label %{head}")
        self.block(head)
        index = self.label("%i")
        names = [self.label("%c") for _ in carried]
        slot = len(self.lines)  # the phi nodes go here once the loop's last block is known
        more = self.let(f"icmp slt i64 {index}, {end}")
        self.do(f"br i1 {more}, label %{inside}, label %{done}")
        self.block(inside)
        values = list(body(index, names))
        following = self.int_op("add", index, step)
        last = self._block
        self.do(f"br label %{head}")
        phis = [f"  {index} = phi i64 [ {begin}, %{before} ], [ {following}, %{last} ]"]
        phis += [
            f"  {name} = phi {kind} [ {start}, %{before} ], [ {value}, %{last} ]"
            for name, (kind, start), value in zip(names, carried, values, strict=True)
        ]
        self.lines[slot:slot] = phis
        self.block(done)
        return names

    def repeat(self, begin: Value | int, end: Value | int, body: Callable[[Value], None]) -> None:
        """Emits a loop that carries no values: for i in range(begin, end): body(i)."""

        def turn(index: Value, _: list[Value]) -> list[Value]:
            body(index)
            return []

        self.loop(begin, end, [], turn)

    def when(
        self,
        condition: Value,
        body: Callable[[], None],
        otherwise: Callable[[], None] | None = None,
    ) -> None:
        """If condition: body() else: otherwise(); no values leave it."""
        yes, no, after = self.label("yes"), self.label("no"), self.label("after")
        self.do(f"br i1 {condition}, label %{yes}, label %{no}")
        self.block(yes)
        body()
        self.do(f"br label %{after}")
        self.block(no)
        if otherwise is not None:
            otherwise()
        self.do(f"br label %{after}")
        self.block(after)

    def text(self, attributes: str = _ATTRIBUTES) -> str:
        """The function as LLVM IR."""
        args = ", ".join(f"{kind} %{name}" for kind, name in self.args)
        head = f"define {self.linkage} {self.returns} @{self.name}({args}) {attributes} {{"
        end = "  ret void" if self.returns == "void" else ""
        return "\n".join([head, *self.lines, end, "}"])


def module_text(functions: Sequence[Function]) -> str:
    """A module of `functions`, with what they call declared."""
    own = {f.name for f in functions}
    declares = {
        d for f in functions for d in f.declares if d.split("@")[1].split("(")[0] not in own
    }
    return "\n".join([*sorted(declares), *(f.text() for f in functions)])


def renamed(text: str, symbol: str) -> str:
    """A module whose function `kernel`, and those named after it, have another name."""
    return text.replace("@kernel", f"@{symbol}")


@cache
def _initialize() -> None:
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()


def target_machine(target: Target) -> Any:
    """LLVM's code generator for `target`."""
    _initialize()
    triple = binding.get_process_triple()
    if not triple.startswith(target.arch):
        triple = _TRIPLES[target.arch]
    if target.isa == "avx512vnni" and not target.cpu:
        # No instruction that another CPU with AVX-512 VNNI may lack: an engine moves between
        # machines. And in the order for Zen 4 on all of them: in those that LLVM has for Cascade
        # Lake and Ice Lake the widest tiles spill their sums, 58 of 123 instructions more.
        cpu, allowed = _ORDERED_FOR[target.isa], _AVX512_BASE.union(target.features)
        known = binding.get_host_cpu_features()
        features = ",".join(
            f"{'+' if known[f] and f in allowed else '-'}{f}" for f in sorted(known)
        )
    else:
        cpu, features = _LLVM_CPU.get((target.arch, target.isa), ("", ""))
        features += ",+avx512bf16" * target.bf16
    return binding.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="pic", codemodel="small", jit=True
    )


@dataclass(frozen=True)
class Source:
    """LLVM IR of one module.

    Attributes:
        text: the IR.
        vectorize: run LLVM's whole pipeline, for kernels written as scalar loops. Tuned kernels go
            straight to code generation: their order and unrolling is what their configuration says.
    """

    text: str
    vectorize: bool = False


def compile_object(sources: Sequence[Source], target: Target) -> bytes:
    """The modules as one object.

    Sections of several objects could not be loaded into one mapping.
    """
    with _COMPILE_LOCK:
        machine = target_machine(target)
        whole = _module(Source(""), machine)
        for source in sources:
            whole.link_in(_module(_tuned(source, target), machine))
        return bytes(machine.emit_object(whole))


def assembly(text: str, target: Target) -> str:
    """What LLVM makes of a module, as assembly (AT&T syntax on x86)."""
    with _COMPILE_LOCK:
        machine = target_machine(target)
        return str(machine.emit_assembly(_module(_tuned(Source(text), target), machine)))


def _tuned(source: Source, target: Target) -> Source:
    """Code for another machine in the order that keeps a tile's sums in registers.

    LLVM orders instructions for a CPU. On AVX-512 the order for most of them, also for a CPU in
    general, begins all shuffles of a step before its products, and spills.
    """
    if not target.cpu or target.isa not in _ORDERED_FOR:
        return source
    tuned = f'{_ATTRIBUTES} "tune-cpu"="{_ORDERED_FOR[target.isa]}"'
    return replace(source, text=source.text.replace(_ATTRIBUTES, tuned))


def _module(source: Source, machine: Any) -> Any:
    """Parsed, checked and, where asked for, optimised."""
    module = binding.parse_assembly(source.text)
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    module.verify()
    if source.vectorize:
        options = binding.create_pipeline_tuning_options(speed_level=3)
        options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = True
        builder = binding.create_pass_builder(machine, options)
        builder.getModulePassManager().run(module, builder)
    return module
