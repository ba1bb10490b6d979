"""What generated code and the runtime agree on. A change here is a new engine format.

A program is `void program(ptr args, i64 tid, i64 threads)`, run by every thread. `args` is a table
of pointers: arena, weights, sync, then the step's plain inputs and outputs. Threads meet in the
sync block: one cache line an item. Of a program's calls those from `first` to before `last` are
run; where `stamps` is not null, each thread writes its clock there (STAMPS). Where a profile has
open sizes, the arena begins with the values of its symbols, i64 each, which the session writes
before a run.
"""

from __future__ import annotations

ARENA, WEIGHTS, SYNC_INDEX, BINDINGS = 0, 1, 2, 3

# Byte offsets in the sync block; "sleeping" and "semaphore" hold one cache line a thread.
SYNC = {
    "arrived": 0,
    "generation": 64,
    "epoch": 128,
    "stop": 192,
    "program": 256,
    "args": 264,
    "threads": 272,
    "first": 280,
    "last": 288,
    "stamps": 296,
    "sched_yield": 320,
    "sem_wait": 328,
    "sem_post": 336,
    "clock_gettime": 344,
    "clock": 352,
    "sleeping": 1024,
    "semaphore": 8192,
}
SYNC_BYTES = 16384
ALL_CALLS = 1 << 62
"""`last` of a run of every call."""

# Nanoseconds, i64 each, one cache line for each call and thread: [call][thread][8]. "met" is when
# all threads had done the call, and thread 0 alone writes it: the others may be late.
STAMPS = {"begin": 0, "end": 8, "met": 16}
STAMP_BYTES = 64
MAX_THREADS = min(SYNC["semaphore"] - SYNC["sleeping"], SYNC_BYTES - SYNC["semaphore"]) // 64

# Kernels may read this far beyond a tensor or the packed weights, never write.
SLACK_BYTES = 8192

SYMBOL_BYTES = 8
MAX_SYMBOLS = 8  # one cache line
