"""The emitters of core/functions.py: the same float32 operations in the same order.

All take and return vectors of `lanes` floats (1: a scalar `float`, for loops that LLVM vectorises).
Nothing else may become a fused multiply-add than what is one there: no fast-math flags.
"""

from __future__ import annotations

from twofour.core import approximations as definition
from twofour.core.approximations import Table, Tail
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.vector import LANES, emit_fma, every, float_bits

Bounds = tuple[Value, Value]


class Floats:
    """Float32 operations on `lanes` lanes, each beside its numpy meaning."""

    def __init__(self, function: Function, lanes: int = LANES, isa: str = "") -> None:
        """Emits into `function`; with an `isa`, what it has no plain IR for."""
        self.f = function
        self.isa = isa
        self.lanes = lanes
        self.kind = "float" if lanes == 1 else f"<{lanes} x float>"
        self.bits = "i32" if lanes == 1 else f"<{lanes} x i32>"

    def constant(self, value: float) -> Value:
        """np.float32(value) in each lane."""
        text = float_bits(value)
        return text if self.lanes == 1 else every("float", text, self.lanes)

    def op(self, name: str, a: Value, b: Value) -> Value:
        """One of a + b, a - b, a * b, a / b: `name` is fadd, fsub, fmul or fdiv."""
        return self.f.let(f"{name} {self.kind} {a}, {b}")

    def least(self, a: Value, b: Value) -> Value:
        """np.where(a < b, a, b), one instruction."""
        return self.select(self.compare("olt", a, b), a, b)

    def most(self, a: Value, b: Value) -> Value:
        """np.where(a > b, a, b), one instruction."""
        return self.select(self.compare("ogt", a, b), a, b)

    def compare(self, how: str, a: Value, b: Value) -> Value:
        """Booleans: `how` as LLVM spells it (olt, ogt, ...), false for NaN."""
        return self.f.let(f"fcmp {how} {self.kind} {a}, {b}")

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        """np.where(condition, a, b)."""
        mask = "i1" if self.lanes == 1 else f"<{self.lanes} x i1>"
        return self.f.let(f"select {mask} {condition}, {self.kind} {a}, {self.kind} {b}")

    def size(self, x: Value) -> Value:
        """np.abs(x)."""
        name = "llvm.fabs.f32" if self.lanes == 1 else f"llvm.fabs.v{self.lanes}f32"
        return self.f.call(self.kind, name, (self.kind, x))

    def polynomial(self, x: Value, coefficients: tuple[float, ...]) -> Value:
        """Horner's rule; the constant coefficient comes first."""
        value = self.constant(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            value = self.op("fadd", self.op("fmul", value, x), self.constant(coefficient))
        return value

    def power_of_two(self, shifted: Value) -> Value:
        """2**n from n + ROUND127."""
        whole = self.f.let(f"bitcast {self.kind} {shifted} to {self.bits}")
        places = "23" if self.lanes == 1 else every("i32", 23, self.lanes)
        moved = self.f.let(f"shl {self.bits} {whole}, {places}")
        return self.f.let(f"bitcast {self.bits} {moved} to {self.kind}")

    def exp2(self, x: Value) -> Value:
        """2**x for |x| <= 126."""
        magic = self.constant(definition.ROUND127)
        shifted = self.op("fadd", x, magic)
        fraction = self.op("fsub", x, self.op("fsub", shifted, magic))
        power = self.power_of_two(shifted)
        return self.op("fmul", self.polynomial(fraction, definition.EXP2), power)

    def tail(self, a: Value, tail: Tail) -> Value:
        """T(a) for a <= limit."""
        value = self.polynomial(a, tail.coefficients)
        for _ in range(tail.squarings):
            value = self.op("fmul", value, value)
        return value

    def limited(self, x: Value, limit: float) -> Value:
        """min(|x|, limit)."""
        return self.least(self.constant(limit), self.size(x))

    def parabola(self, a: Value, table: Table) -> Value:
        """T(a) for a <= limit."""
        shifted = self.op("fadd", a, self.constant(definition.QUARTERS))
        bits = self.f.let(f"bitcast {self.kind} {shifted} to {self.bits}")
        c0, c1, c2 = (self._looked_up(bits, row) for row in table.coefficients)
        slope = emit_fma(self.f, (c2, a, c1), self.lanes, self.isa)
        return emit_fma(self.f, (slope, a, c0), self.lanes, self.isa)

    def _looked_up(self, bits: Value, row: tuple[float, ...]) -> Value:
        """np.array(row)[bits & 15]."""
        f = self.f
        if self.lanes == LANES and self.isa == "avx512vnni":
            values = "<" + ", ".join(f"float {float_bits(value)}" for value in row) + ">"
            name = "llvm.x86.avx512.permvar.sf.512"
            return f.call(self.kind, name, (self.kind, values), (self.bits, bits))
        table = f.constant("float", [float_bits(value) for value in row])
        mask = "15" if self.lanes == 1 else every("i32", 15, self.lanes)
        place = f.let(f"and {self.bits} {bits}, {mask}")
        if self.lanes == 1:
            return f.load("float", f.let(f"getelementptr float, ptr {table}, i32 {place}"), 0, 4)
        out = "poison"
        for lane in range(self.lanes):
            one = f.let(f"extractelement {self.bits} {place}, i32 {lane}")
            value = f.load("float", f.let(f"getelementptr float, ptr {table}, i32 {one}"), 0, 4)
            out = f.let(f"insertelement {self.kind} {out}, float {value}, i32 {lane}")
        return out


def emit_exp(f: Function, x: Value, lanes: int = LANES) -> Value:
    """`core.functions.exp`: 23 operations."""
    v = Floats(f, lanes)
    magic = v.constant(definition.ROUND127)
    shifted = v.op("fadd", v.op("fmul", x, v.constant(definition.LOG2_E)), magic)
    n = v.op("fsub", shifted, magic)
    r = v.op("fsub", x, v.op("fmul", n, v.constant(definition.LN2_HIGH)))
    r = v.op("fsub", r, v.op("fmul", n, v.constant(definition.LN2_LOW)))
    y = v.op("fmul", v.polynomial(r, definition.EXP), v.power_of_two(shifted))
    below = v.compare("olt", x, v.constant(definition.EXP_LOW))
    y = v.select(below, v.constant(0.0), y)
    above = v.compare("ogt", x, v.constant(definition.EXP_HIGH))
    return v.select(above, v.constant(float("inf")), y)


def emit_log(f: Function, x: Value, lanes: int = LANES) -> Value:
    """`core.functions.log`: 36 operations."""
    v = Floats(f, lanes)
    small = v.compare("olt", x, v.constant(definition.LEAST_NORMAL))
    scaled = v.select(small, v.op("fmul", x, v.constant(definition.SUBNORMAL_FACTOR)), x)
    bits = f.let(f"bitcast {v.kind} {scaled} to {v.bits}")
    start, places = (
        str(number) if lanes == 1 else every("i32", number, lanes)
        for number in (definition.SQRT_HALF_BITS, 23)
    )
    whole = f.let(f"ashr {v.bits} {f.let(f'sub {v.bits} {bits}, {start}')}, {places}")
    rest = f.let(f"sub {v.bits} {bits}, {f.let(f'shl {v.bits} {whole}, {places}')}")
    part = v.op("fsub", f.let(f"bitcast {v.bits} {rest} to {v.kind}"), v.constant(1.0))
    n = f.let(f"sitofp {v.bits} {whole} to {v.kind}")
    n = v.op("fsub", n, v.select(small, v.constant(23.0), v.constant(0.0)))
    square = v.op("fmul", part, part)
    y = v.op("fmul", v.op("fmul", v.polynomial(part, definition.LOG), part), square)
    y = v.op("fadd", y, v.op("fmul", n, v.constant(definition.LN2_LOW)))
    y = v.op("fsub", y, v.op("fmul", v.constant(0.5), square))
    y = v.op("fadd", v.op("fadd", part, y), v.op("fmul", n, v.constant(definition.LN2_HIGH)))
    y = v.select(v.compare("ogt", x, v.constant(0.0)), y, v.constant(float("nan")))
    y = v.select(v.compare("oeq", x, v.constant(0.0)), v.constant(float("-inf")), y)
    return v.select(v.compare("oeq", x, v.constant(float("inf"))), x, y)


def emit_sigmoid(f: Function, x: Value, lanes: int = LANES) -> Value:
    """`core.functions.sigmoid`: 20 operations, one of them a division."""
    v = Floats(f, lanes)
    limited = _between(v, x, -definition.SIGMOID_LIMIT, definition.SIGMOID_LIMIT)
    power = v.exp2(v.op("fmul", limited, v.constant(-definition.LOG2_E)))
    return v.op("fdiv", v.constant(1.0), v.op("fadd", v.constant(1.0), power))


def emit_tanh(f: Function, x: Value, lanes: int = LANES) -> Value:
    """`core.functions.tanh`: 21 operations, one of them a division."""
    v = Floats(f, lanes)
    limited = _between(v, x, -definition.TANH_LIMIT, definition.TANH_LIMIT)
    power = v.exp2(v.op("fmul", limited, v.constant(2 * definition.LOG2_E)))
    half = v.op("fdiv", v.constant(2.0), v.op("fadd", v.constant(1.0), power))
    return v.op("fsub", v.constant(1.0), half)


def emit_erf(f: Function, x: Value, lanes: int = LANES) -> Value:
    """`core.functions.erf`: 22 operations."""
    v = Floats(f, lanes)
    rest = v.tail(v.limited(x, definition.ERFC.limit), definition.ERFC)
    size = v.op("fsub", v.constant(1.0), rest)
    both = [f.let(f"bitcast {v.kind} {value} to {v.bits}") for value in (x, size)]
    top = str(-(1 << 31)) if lanes == 1 else every("i32", -(1 << 31), lanes)
    sign = f.let(f"and {v.bits} {both[0]}, {top}")
    return f.let(f"bitcast {v.bits} {f.let(f'or {v.bits} {sign}, {both[1]}')} to {v.kind}")


def emit_silu(f: Function, x: Value, lanes: int = LANES) -> Value:
    """`core.functions.silu`: 22 operations, one of them a division."""
    v = Floats(f, lanes)
    factor = v.most(v.constant(-definition.SIGMOID_LIMIT), x)
    return v.op("fmul", factor, emit_sigmoid(f, x, lanes))


def emit_hard_sigmoid(f: Function, x: Value, lanes: int = LANES) -> Value:
    """`core.functions.hard_sigmoid`: 4 operations."""
    v = Floats(f, lanes)
    line = v.op("fadd", v.op("fmul", x, v.constant(definition.SIXTH)), v.constant(0.5))
    return _between(v, line, 0.0, 1.0)


def emit_gelu(f: Function, x: Value, tail: Tail, lanes: int = LANES) -> Value:
    """`core.functions.gelu` and gelu_tanh: 19 or 21 operations, as `tail` is GELU or GELU_TANH."""
    v = Floats(f, lanes)
    a = v.limited(x, tail.limit)
    rest = v.op("fmul", a, v.tail(a, tail))
    return v.op("fsub", v.most(v.constant(0.0), x), rest)


def emit_gelu_short(v: Floats, x: Value, table: Table) -> Value:
    """`core.functions.gelu_short` and gelu_tanh_short: 10 operations."""
    rest = v.parabola(v.limited(x, table.limit), table)
    return v.op("fsub", v.most(v.constant(0.0), x), rest)


def emit_activation(
    v: Floats, name: str, x: Value, bounds: Bounds | None = None, *, short: bool = False
) -> Value:
    """`core.functions.Activation.apply`.

    Args:
        v: emits the operations.
        name: of the activation.
        x: its input.
        bounds: low and high of Clip, vectors like `x`.
        short: as there.

    Raises:
        ValueError: Clip without bounds, or an unknown name.
    """
    if name == "Clip" and bounds is not None:
        return v.least(bounds[1], v.most(bounds[0], x))
    if name in _TAILS:
        if short:
            return emit_gelu_short(v, x, _TABLES[name])
        return emit_gelu(v.f, x, _TAILS[name], v.lanes)
    if name == "HardSwish":
        return v.op("fmul", x, emit_hard_sigmoid(v.f, x, v.lanes))
    if name == "Relu":
        return v.most(v.constant(0.0), x)
    if name in _OTHERS:
        return _OTHERS[name](v.f, x, v.lanes)
    if name:
        raise ValueError(f"no emitter for activation {name!r} with bounds {bounds}")
    return x


_TAILS = {"Gelu": definition.GELU, "GeluTanh": definition.GELU_TANH}
_TABLES = {"Gelu": definition.GELU_SHORT, "GeluTanh": definition.GELU_TANH_SHORT}
_OTHERS = {
    "HardSigmoid": emit_hard_sigmoid,
    "Sigmoid": emit_sigmoid,
    "Silu": emit_silu,
    "Tanh": emit_tanh,
}


def _between(v: Floats, x: Value, low: float, high: float) -> Value:
    """min(max(x, low), high); NaN stays NaN."""
    return v.least(v.constant(high), v.most(v.constant(low), x))
