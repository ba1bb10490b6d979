"""How fast Hopper's tensor cores take instructions, and nothing else: what no product can exceed.

Blocks of two warp groups, one on each multiprocessor, issue `wgmma` (or `wgmma.sp`) of 64 by 256
without end: the first operand in registers, the second in shared memory, both random, nothing
copied, nothing stored. A sparse instruction meets twice the bytes of shared memory of a dense one
in the same time, which is what bounds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from twofour.kernels.cuda.nvrtc import cubin_of
from twofour.runtime.cuda.device import Device

HOPPER = 90
KINDS = {
    "INT8": ("s32.s8.s8", 32, "", "v"),
    "fp16": ("f32.f16.f16", 16, ", 1, 1, 0", "(v & 0x83ff83ffu) | 0x38003800u"),
    "fp8": ("f32.e4m3.e4m3", 32, ", 1, 1", "(v & 0x87878787u) | 0x30303030u"),
}
"""Types of the instruction, K of the dense one, its flags, and random bits made usual numbers."""
_STEPS, _STAGES, _SUMS, _THREADS = 4096, 4, 128, 256
_RUNS, _ROUNDS = 40, 5
_METADATA = 0x4E8D49CE  # valid pairs of places, all different
_BODY = """
typedef unsigned int u32;
__device__ __forceinline__ u32 mixed(u32 v) {
  v ^= v >> 16; v *= 0x7feb352du; v ^= v >> 15; v *= 0x846ca68bu; v ^= v >> 16;
  return BITS;
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) roof(u32* out) {
  extern __shared__ __align__(1024) u32 memory[];
  for (u32 i = threadIdx.x; i < STAGES * 8192; i += THREADS) memory[i] = mixed(i + 1);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  SUM d[SUMS] = {};
  u32 a0 = mixed(threadIdx.x + 77777), a1 = mixed(a0 + 1), a2 = mixed(a1 + 1), a3 = mixed(a2 + 1);
  u32 at = (u32)__cvta_generic_to_shared(memory);
  unsigned long long first =
      (unsigned long long)((at & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  for (int step = 0; step < STEPS; step++) {
    unsigned long long b = first + step % STAGES * 2048;
#pragma unroll
    for (int part = 0; part < 4; part++) one(d, a0, a1, a2, a3, b + part * 2 * PACE % 8);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  SUM total = 0;
#pragma unroll
  for (int i = 0; i < SUMS; i++) total += d[i];
  if (total == (SUM)123456789) out[0] = 1;
}
"""


@dataclass(frozen=True)
class Roof:
    """What one type reaches.

    Attributes:
        kind: a key of KINDS.
        dense_tops: 10^12 operations a second of dense instructions.
        sparse_tops: of 2:4 ones, the zeros counted.
    """

    kind: str
    dense_tops: float
    sparse_tops: float


def text(kind: str, *, sparse: bool) -> str:
    """The kernel that issues one instruction."""
    types, k, flags, bits = KINDS[kind]
    integer = types.startswith("s32")
    sums = ", ".join(f"%{i}" for i in range(_SUMS))
    letter = "r" if integer else "f"
    outputs = ", ".join(f'"+{letter}"(d[{i}])' for i in range(_SUMS))
    a = ", ".join(f"%{_SUMS + i}" for i in range(4))
    name = f"m64n256k{k * (1 + sparse)}.{types}"
    selected = f", %{_SUMS + 5}, 0" if sparse else ""
    instruction = (
        f"wgmma.mma_async{'.sp' * sparse}.sync.aligned.{name} "
        f"{{{sums}}}, {{{a}}}, %{_SUMS + 4}{selected}, p{flags};"
    )
    inputs = '"r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b)'
    if sparse:
        inputs += f', "r"({_METADATA:#x}u)'
    constants = {
        "BITS": bits,
        "SUM": "int" if integer else "float",
        "SUMS": _SUMS,
        "STEPS": _STEPS,
        "STAGES": _STAGES,
        "THREADS": _THREADS,
        "PACE": 1 + sparse,
    }
    return (
        "".join(f"#define {name} {value}\n" for name, value in constants.items())
        + "__device__ __forceinline__ void one(SUM (&d)[SUMS], unsigned a0, unsigned a1, "
        "unsigned a2, unsigned a3, unsigned long long b) {\n"
        '  asm volatile("{\\n.reg .pred p;\\nsetp.ne.b32 p, 1, 0;\\n"\n'
        f'    "{instruction}\\n}}"\n    : {outputs}\n    : {inputs});\n}}\n' + _BODY
    )


def multiprocessors(device: Device) -> int:
    """How many the GPU has."""
    call, kinds = device.driver.call, device.driver.functions.CUdevice_attribute
    which = kinds.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    return int(call("cuDeviceGetAttribute", which, call("cuDeviceGet", device.gpu.index)))


def measured_roofs(device: Device, kinds: Sequence[str]) -> list[Roof]:
    """Of each type; none where the GPU is not Hopper."""
    if device.capability != HOPPER:
        return []
    return [_roof(device, kind) for kind in kinds if kind in KINDS]


def _roof(device: Device, kind: str) -> Roof:
    found = {}
    for sparse in (False, True):
        us = _time_us(device, text(kind, sparse=sparse))
        k = KINDS[kind][1] * (1 + sparse)
        groups = multiprocessors(device) * _THREADS // 128
        found[sparse] = 2e-6 * groups * _STEPS * 4 * 64 * 256 * k / us
    return Roof(kind, found[False], found[True])


def _time_us(device: Device, source: str) -> float:
    """Median microseconds of one start, among many that follow each other."""
    module = device.load(np.frombuffer(cubin_of(source, device.capability), np.uint8))
    shared = _STAGES * 32768
    stream, out = device.stream(), device.take(4)
    events = (device.event(), device.event())
    kernel = device.kernel(module, "roof", shared)
    grid = (multiprocessors(device), 1, 1)
    times = []
    try:
        for _ in range(_ROUNDS):
            device.record(events[0], stream)
            for _ in range(_RUNS):
                device.launch(kernel, grid, _THREADS, shared, [out], stream)
            device.record(events[1], stream)
            device.wait(stream)
            times.append(device.elapsed_us(*events) / _RUNS)
    finally:
        for event in events:
            device.drop_event(event)
        device.give_back(out)
        device.drop_stream(stream)
        device.unload(module)
    return median(times[1:])


def roof_lines(roofs: Sequence[Roof]) -> Iterator[str]:
    """A table for a page."""
    if not roofs:
        return
    yield from ("## What the instructions alone reach", "")
    yield from ("10^12 operations a second, the zeros counted; random operands.", "")
    yield from ("| type | dense | 2:4 | ratio |", "| --- | --: | --: | --: |")
    for each in roofs:
        ratio = each.sparse_tops / each.dense_tops
        yield f"| {each.kind} | {each.dense_tops:.0f} | {each.sparse_tops:.0f} | {ratio:.2f}x |"
    yield ""
