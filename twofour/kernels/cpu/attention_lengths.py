"""How many keys an attention has: a constant of its kernel, or known only when it runs.

Where the number is open, a kernel is planned for the most there can be, whole groups of keys. The
real counts stand in the area "lengths" of the scratch memory, and loops over keys read them there.
Keys that pad the last group are packed from the last real one, and masked.
"""

from __future__ import annotations

from twofour.kernels.cpu.attention_plan import GROUP, Plan
from twofour.kernels.cpu.llvm import Function, Value
from twofour.kernels.cpu.problem import LANES

_NAMES = ("k_len", "groups", "blocks", "whole_chunks", "value_units")


def emit_lengths(f: Function, plan: Plan, k_len: int | Value, scratch: Value) -> None:
    """Writes the area "lengths"; nothing to do where the number of keys is known.

    Args:
        f: the kernel.
        plan: sizes.
        k_len: keys, an i64 value.
        scratch: pointer to the scratch memory.
    """
    if not plan.open_keys:
        return
    each = LANES * GROUP
    groups = f.int_op("udiv", f.int_op("add", k_len, each - 1), each)
    blocks = f.int_op("mul", groups, GROUP)
    units: int | Value = k_len
    if plan.int8:
        units = f.int_op("mul", groups, LANES)
    elif plan.size == 2:
        units = f.int_op("udiv", f.int_op("add", k_len, 1), 2)
    chunks = f.int_op("udiv", blocks, plan.key_blocks)
    for index, number in enumerate((k_len, groups, blocks, chunks, units)):
        f.store("i64", str(number), scratch, plan.area("lengths") + 8 * index, 8)


def length(f: Function, plan: Plan, name: str) -> int | Value:
    """One of the plan's counts of keys, in a function with the scratch memory as `s`."""
    if not plan.open_keys:
        number: int = getattr(plan, name)
        return number
    return f.load("i64", "%s", plan.area("lengths") + 8 * _NAMES.index(name), 8)
