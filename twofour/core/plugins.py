"""Plugins: operators that a package of its own adds, without a change to this one.

A plugin is an `Operator`: an ONNX domain and name, its meaning, its shape rule and its tactics. The
package names it as an entry point of the group `twofour.operators`; the value is one `Operator`, or
several:

    [project.entry-points."twofour.operators"]
    swish = "my_package:SWISH"

The meaning is the definition: every kernel is compared with it before it is timed, and where no
tactic takes a node, the meaning itself runs. An engine never imports what its file names: it asks
the installed packages for an operator of that domain and name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.core.errors import UnsupportedError
from twofour.core.target import Target

GROUP = "twofour.operators"
"""The group of entry points that operators are found by."""

BUILT_IN: tuple[str, ...] = (
    "twofour.operators.experts:OPERATORS",
    "twofour.operators.sparse_attention:OPERATORS",
)
"""Operators of this package, `module:attribute` each; they are plugins like all others."""

Array = NDArray[Any]
Attribute = int | float | str | tuple[int, ...] | tuple[float, ...]
Attributes = Mapping[str, Attribute]
Shape = tuple[int, ...]
Typed = tuple[Shape, str]
"""A shape, and numpy's name of a type ("bfloat16" is one)."""
BFLOAT16_TOLERANCE = 2.0**-6
"""Of results of products of rounded operands, relative to the largest."""


@dataclass(frozen=True)
class Operand:
    """An input or output of a node, as a kernel finds it.

    Attributes:
        name: as the meaning calls it.
        shape: its dimensions.
        dtype: numpy's name of its type; "bfloat16" is one.
        strides: bytes of one step along each axis.
        constant: its elements, of a weight; None where it is computed while running.
        biased: int8 values are stored plus 128, as uint8; only tactics that are `strided` see it.
        scale: of a quantized tensor, one number or one a channel; None of all others.
        zero_point: real = (value - zero_point) * scale.
    """

    name: str
    shape: Shape
    dtype: str
    strides: Shape
    constant: Array | None = None
    biased: bool = False
    scale: Array | None = None
    zero_point: int = 0

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie in C order, side by side."""
        return self.strides == c_strides(self.shape, self.dtype)


@dataclass(frozen=True)
class Problem:
    """What one node asks of a kernel.

    Attributes:
        operator: its name.
        inputs: in the order of the meaning; None where one that may be left out is.
        outputs: in the order of the meaning.
        attributes: of the node, with the meaning's own values where it gives none.
    """

    operator: str
    inputs: tuple[Operand | None, ...]
    outputs: tuple[Operand, ...]
    attributes: Attributes = field(default_factory=dict)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Those that are there, inputs first: the entries of a kernel's table of pointers."""
        return (*(each for each in self.inputs if each is not None), *self.outputs)


@dataclass(frozen=True)
class Stage:
    """One kernel of a tactic; all threads meet before the next one begins.

    Attributes:
        text: an LLVM module that defines
            `void kernel(ptr x, ptr w, ptr y, ptr r, i64 t0, i64 t1, i64 p0, i64 p1)`. x is a table
            of pointers: the operands in order, then the workspace. w are the constants, y and r the
            first output. A call does the pieces t0 ... t1 - 1; p0 and p1 are not used.
        pieces: units of work that threads share.
        name: for people; the last stage needs none.
        vectorize: let LLVM vectorise and unroll its loops. Kernels that are spelled in vectors do
            not need it.
    """

    text: str
    pieces: int = 1
    name: str = ""
    vectorize: bool = False


@dataclass(frozen=True)
class Code:
    """What a tactic makes of a problem.

    Attributes:
        stages: in order.
        constants: packed weights, tables: bytes, 64-aligned when they are read.
        workspace_bytes: memory that all stages and threads share, 64-aligned; what is in it at the
            beginning is not known.
        unread: places in `Problem.operands` of weights that no stage reads, as `constants` holds
            them packed: an engine leaves them out, and what the table has for them means nothing.
        precision: of its products, "int8", "bfloat16" or "float32", for people; "" for that of its
            first result.
    """

    stages: tuple[Stage, ...]
    constants: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    workspace_bytes: int = 0
    unread: tuple[int, ...] = ()
    precision: str = ""


def _takes_all(problem: Problem, target: Target) -> str:
    return ""


def _one_config(problem: Problem, target: Target) -> Sequence[str]:
    return ("",)


@dataclass(frozen=True)
class CpuTactic:
    """One way to run an operator on a CPU.

    Attributes:
        name: as reports show it.
        emit: (problem, target, config) -> the code.
        refuse: why it cannot take a problem on a target; "" if it can.
        configs: its configurations in words, best guess first; each is built and timed.
        strided: it takes operands of any strides. All others get theirs in C order: what lies
            otherwise is copied.
        bfloat16: it multiplies float32 in bfloat16: it is taken only where the user allows that and
            the target has it, and its results may be off by `BFLOAT16_TOLERANCE` as well.
    """

    name: str
    emit: Callable[[Problem, Target, str], Code]
    refuse: Callable[[Problem, Target], str] = _takes_all
    configs: Callable[[Problem, Target], Sequence[str]] = _one_config
    strided: bool = False
    bfloat16: bool = False


@dataclass(frozen=True)
class CudaTactic:
    """One way to run an operator on a GPU of NVIDIA; its operands lie in C order.

    Its kernels stand in a module of their own, which is imported only where a GPU is built for:
    Triton need not be there otherwise. The module has two functions,

        why_not(problem, capability) -> str
            why it cannot take a `Problem` on a GPU, 90 for compute capability 9.0; "" if it can
        recipes(problem, capability, *, effort) -> sequence of `Recipe`s
            ways to run it, the best guess first; `effort` 0 to 3 says how many are worth a try

    The roles of a `Recipe` (kernels/cuda/kernel.py) are the operands' names, and those of its own
    constants and scratch memory. Operands that it does not name are not read: weights, for example,
    that its constants have packed.

    Attributes:
        name: as reports show it.
        module: of its functions, as it is imported.
        strided: it takes operands of any strides, as of `CpuTactic`.
    """

    name: str
    module: str
    strided: bool = False

    def refuse(self, problem: Problem, capability: int) -> str:
        """Why it cannot take a problem; "" if it can."""
        return str(importlib.import_module(self.module).why_not(problem, capability))

    def recipes(self, problem: Problem, capability: int, *, effort: int = 2) -> Sequence[Any]:
        """Ways to run a problem that it takes."""
        module = importlib.import_module(self.module)
        found: Sequence[Any] = module.recipes(problem, capability, effort=effort)
        return found


Meaning = str | bytes | Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Operator:
    """An operator that a package adds.

    Attributes:
        domain: ONNX domain of its nodes; not one of ONNX's own.
        name: operator type of its nodes.
        meaning: what it computes. Either an ONNX function, in ONNX's text form or serialised, whose
            domain and name are these; or a callable on numpy arrays, `f(*inputs, **attributes)`,
            which returns an array or a tuple of them. An input that is left out is None; at the
            end of the list it is not given.
        shapes: (shape and type of each input, attributes) -> those of each output. A function needs
            none: its operators' own rules say it.
        tactics: of each kind of target, "cpu", "cuda" or "tensorrt". A node that none of them takes
            runs by its meaning: a function on ONNX Runtime, numpy in Python. Those of a CPU are
            `CpuTactic`s, those of "cuda" `CudaTactic`s, those of TensorRT functions: they get its
            Python module, and register creators of plugins.
        samples: (problem, generator) -> arrays to compare and time kernels with, one for each input
            that is no constant. By default normal floats, and bytes of a quantized tensor; an
            operator that reads other integers has to say which ones make sense.
        reference: computes what the meaning does, on numpy arrays and in bounded memory, where that
            would take too much to compare kernels with.
        stored: computes the quantized form on what is stored, where its kernels do not round what
            the meaning gives: (problem, an array for each input) -> an array for each output.
        tolerance: how far a kernel may be from the meaning, relative to the largest magnitude of
            the output. Integers must be equal.
        quantized: inputs and outputs by name that its tactics take as int8, where the model
            quantizes them; all of these inputs, and any of these outputs.
        version: of the operator: an engine that runs its meaning in Python wants the same one.
        package: what to install where it is missing; by default the one that the entry point is of.
    """

    domain: str
    name: str
    meaning: Meaning
    shapes: Callable[[Sequence[Typed], Attributes], Sequence[Typed]] | None = None
    tactics: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    samples: Callable[[Problem, np.random.Generator], Sequence[Array]] | None = None
    reference: Callable[..., Any] | None = None
    stored: Callable[[Problem, Sequence[Array | None]], Sequence[Array]] | None = None
    tolerance: float = 1e-5
    quantized: tuple[str, ...] = ()
    version: int = 1
    package: str = ""

    def __post_init__(self) -> None:
        """Refuses what could not work.

        Raises:
            ValueError: names the operator and what is wrong.
        """
        if self.domain in ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "twofour"):
            raise ValueError(f"{self}: an operator of a plugin has a domain of its own")
        if callable(self.meaning) and self.shapes is None:
            raise ValueError(f"{self}: a meaning in numpy needs a rule for shapes")
        if unknown := sorted(set(self.tactics) - {"cpu", "cuda", "tensorrt"}):
            raise ValueError(f"{self}: no target {unknown[0]!r}: expected cpu, cuda or tensorrt")
        for kind in ("cpu", "cuda"):
            names = [tactic.name for tactic in self.tactics.get(kind, ())]
            if len(set(names)) < len(names):
                raise ValueError(f"{self}: its tactics need names of their own, got {names}")

    def __str__(self) -> str:
        """As messages show it."""
        return f"{self.domain}.{self.name}"

    @property
    def is_function(self) -> bool:
        """Whether its meaning is an ONNX function."""
        return not callable(self.meaning)

    @property
    def cpu(self) -> tuple[CpuTactic, ...]:
        """Its tactics for CPUs."""
        return tuple(self.tactics.get("cpu", ()))

    @property
    def cuda(self) -> tuple[CudaTactic, ...]:
        """Its tactics for GPUs of NVIDIA."""
        return tuple(self.tactics.get("cuda", ()))

    @property
    def tensorrt(self) -> tuple[Callable[[Any], None], ...]:
        """What registers its plugins with TensorRT."""
        return tuple(self.tactics.get("tensorrt", ()))


@dataclass(frozen=True)
class Installed:
    """What is there.

    Attributes:
        operators: by (domain, name).
        packages: likewise, what installs each.
        problems: a line for each entry point that could not be used.
    """

    operators: Mapping[tuple[str, str], Operator]
    packages: Mapping[tuple[str, str], str]
    problems: tuple[str, ...]


@cache
def installed() -> Installed:
    """All operators of this package and of the installed ones; found once in a process.

    A package that cannot be imported, or that gives no operators, takes nothing else with it: it is
    a line of `problems`.
    """
    operators: dict[tuple[str, str], Operator] = {}
    packages: dict[tuple[str, str], str] = {}
    problems = []
    own = [EntryPoint(f"built-in {where}", where, GROUP) for where in BUILT_IN]
    for point in (*own, *sorted(entry_points(group=GROUP), key=lambda p: (p.name, p.value))):
        package = point.dist.name if point.dist is not None else "twofour"
        try:
            found = _operators(point)
        except Exception as error:  # noqa: BLE001  a foreign package may raise anything
            problems.append(f"{package}: entry point {point.name!r} ({point.value}): {error}")
            continue
        for operator in found:
            key = operator.domain, operator.name
            if key in operators and operators[key] is not operator:
                other = packages[key]
                problems.append(f"{package}: {operator} is already defined by {other}: not used")
                continue
            operators[key], packages[key] = operator, operator.package or package
    return Installed(operators, packages, tuple(problems))


def _operators(point: EntryPoint) -> list[Operator]:
    """What an entry point gives.

    Raises:
        TypeError: it is no operator, or something else than operators.
    """
    module = importlib.import_module(point.module)
    value: Any = getattr(module, point.attr) if point.attr else module
    found = [value] if isinstance(value, Operator) else value
    if not isinstance(found, Iterable) or isinstance(found, (str, bytes)):
        raise TypeError(f"expected an Operator or several, got {type(value).__name__}")
    listed = list(found)
    if wrong := [item for item in listed if not isinstance(item, Operator)]:
        raise TypeError(f"expected operators, got {type(wrong[0]).__name__} among them")
    return listed


def find(domain: str, name: str) -> Operator | None:
    """The installed operator of a node; None where there is none."""
    return installed().operators.get((domain, name))


def package_of(operator: Operator) -> str:
    """What installs an operator that is there."""
    return installed().packages[(operator.domain, operator.name)]


def require(domain: str, name: str, version: int, package: str) -> Operator:
    """The installed operator that an engine needs.

    Args:
        domain: of the operator.
        name: of the operator.
        version: of the operator that the engine was built with.
        package: that had it then.

    Raises:
        UnsupportedError: it is not installed, or in another version; says how to get it.
    """
    found = find(domain, name)
    fix = f"pip install {package}"
    if found is None:
        problems = [line for line in installed().problems if line.startswith(f"{package}:")]
        raise UnsupportedError(
            f"the engine needs the operator {domain}.{name}, which is not installed",
            [f"the plugin {package} had it when the engine was built", *problems],
            fix,
        )
    if found.version != version:
        raise UnsupportedError(
            f"the engine needs the operator {found} in version {version}",
            [f"version {found.version} is installed"],
            f"{fix}, in the version that the engine was built with; or build the engine again",
        )
    return found


def c_strides(shape: Shape, dtype: str) -> Shape:
    """Bytes of one step along each axis of an array in C order."""
    size = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    strides = []
    for dim in reversed(shape):
        strides.append(size)
        size *= dim
    return tuple(reversed(strides))
