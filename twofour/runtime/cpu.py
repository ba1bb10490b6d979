"""What native steps run on: mapped code, worker threads."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import llvmlite.binding as binding
import numpy as np
from numpy.typing import NDArray

from twofour.core.abi import ALL_CALLS, MAX_THREADS, STAMP_BYTES, SYNC, SYNC_BYTES
from twofour.core.errors import EngineError, UnsupportedError
from twofour.core.memory import Bytes, address, allocate

_LOCK = threading.Lock()  # LLVM's JIT set-up is not safe from several threads
_KERNEL_ARGUMENTS = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 4
_ELF_HEADER_BYTES = 64
_NEEDED = (
    "sched_yield",
    "sched_getcpu",
    "sem_init",
    "sem_wait",
    "sem_post",
    "pthread_create",
    "pthread_join",
    "pthread_setaffinity_np",
)
Stamps = NDArray[np.int64]
_MASK_BYTES = 1024  # a set of up to 8192 cores


class Code:
    """Object files mapped as executable code, each by itself.

    Addresses are valid while this lives.
    """

    def __init__(self, objects: Sequence[bytes]) -> None:
        """Maps the objects.

        Raises:
            EngineError: one is not an object file of this system.
        """
        self._engines = [_mapped(data) for data in objects]

    def address(self, symbol: str) -> int:
        """Where `symbol` starts.

        Raises:
            EngineError: there is no such symbol.
        """
        found = next(filter(None, (int(e.get_function_address(symbol)) for e in self._engines)), 0)
        if not found:
            raise EngineError(
                f"the engine's code has no function {symbol!r}", [], "rebuild the engine"
            )
        return found

    def kernel(self, symbol: str) -> Any:
        """`symbol` as a Python callable of a kernel's signature; the call releases the GIL."""
        return ctypes.CFUNCTYPE(None, *_KERNEL_ARGUMENTS)(self.address(symbol))

    def repeat(self) -> Any:
        """The timing loop as a Python callable.

        Its arguments are the kernel's address, those of the kernel, the number of runs, and the
        bytes to the first run's weights, from one run's to the next one's, and to the end of all,
        where they start over.
        """
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *_KERNEL_ARGUMENTS, *[ctypes.c_int64] * 4)
        return kind(self.address("repeat"))


def _mapped(data: bytes) -> Any:
    """LLVM's handle on one object in memory."""
    _require_object(data)
    with _LOCK:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        machine = binding.Target.from_triple(binding.get_process_triple()).create_target_machine(
            opt=3, reloc="pic", codemodel="small", jit=True
        )
        # use_lmm: one small mapping for all sections of the object, so that relocations between
        # them always reach.
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine, use_lmm=True)
        try:
            engine.add_object_file(binding.ObjectFileRef.from_data(data))
        except RuntimeError as e:
            raise EngineError(
                "the engine's code cannot be loaded", [str(e)], "rebuild the engine"
            ) from e
        engine.finalize_object()
        return engine


def _require_object(data: bytes) -> None:
    """Refuses what LLVM would crash on: no ELF object, or one that ends before its sections do."""
    if not sys.platform.startswith("linux"):
        return
    table, size, count = (
        int.from_bytes(data[at : at + width], sys.byteorder)
        for at, width in ((40, 8), (58, 2), (60, 2))
    )
    whole = len(data) >= _ELF_HEADER_BYTES and count and table + size * count <= len(data)
    if data[:4] != b"\x7fELF" or not whole:
        raise EngineError(
            "the engine's code cannot be loaded",
            [f"expected an ELF object, got {len(data)} bytes that begin {data[:4]!r}"],
            "rebuild the engine on this system",
        )


class Workers:
    """The threads of one session: native, asleep between runs, ended with the session.

    Threads do not survive a fork: in the child process the caller's own thread does all the work.

    Args:
        code: holds `run` and `worker`.
        threads: how many, the caller's own included.
    """

    def __init__(self, code: Code, threads: int) -> None:
        """Starts threads - 1 workers."""
        libc = self._libc = _libc(threads)
        self._caller_core = -1
        self.threads = threads
        self.sync = allocate(SYNC_BYTES)
        self._code = code
        self._run = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64
        )(code.address("run"))
        words = self.sync.view(np.int64)
        self._window = words[SYNC["first"] // 8 :][:3]  # first, last, stamps
        self._window[:] = 0, ALL_CALLS, 0
        words[SYNC["clock"] // 8] = time.CLOCK_MONOTONIC
        for name in ("sched_yield", "sem_wait", "sem_post", "clock_gettime"):
            if hasattr(libc, name):
                words[SYNC[name] // 8] = _function_address(getattr(libc, name))
        base = self._sync_address = address(self.sync)
        self._selves = np.array([[base, tid] for tid in range(threads)], np.int64)
        handles = self._handles = list[ctypes.c_ulong]()
        _ALIVE.add(self)
        # Holds the code and the memory until the threads that use them have ended.
        self.close = weakref.finalize(
            self, _stop, libc, self._run, code, self.sync, handles, self._selves
        )
        for tid in range(1, threads):
            libc.sem_init(ctypes.c_void_p(base + SYNC["semaphore"] + 64 * tid), 0, 0)
            handle = ctypes.c_ulong()
            failed = libc.pthread_create(
                ctypes.byref(handle),
                None,
                ctypes.c_void_p(code.address("worker")),
                ctypes.c_void_p(address(self._selves[tid])),
            )
            if failed:
                self.close()
                raise UnsupportedError(
                    f"the system refused thread {tid + 1} of {threads}",
                    [f"error {failed}"],
                    "use fewer --threads",
                )
            handles.append(handle)

    def run(self, program: int, args: int) -> None:
        """Runs the program at that address with all threads; returns when all are done.

        Args:
            program: address of the program.
            args: address of its table of pointers.
        """
        if self._handles:
            self._keep_off(self._libc.sched_getcpu())
        self._run(self._sync_address, program, args, self.threads)

    def run_calls(self, program: int, args: int, calls: range, stamps: Stamps | None) -> None:
        """Runs some calls of a program, as `run` runs all of them.

        Args:
            program: address of the program.
            args: address of its table of pointers.
            calls: which ones, one after the other: at least one of those that it has.
            stamps: int64 [calls.stop, threads, 8], where their times go; None for nowhere.
        """
        self._window[:] = calls.start, calls.stop, 0 if stamps is None else address(stamps)
        try:
            self.run(program, args)
        finally:
            self._window[:] = 0, ALL_CALLS, 0

    def stamps(self, calls: int) -> Stamps:
        """Room for the times of a program of so many calls, zeros."""
        return np.zeros((calls, self.threads, STAMP_BYTES // 8), np.int64)

    def _keep_off(self, core: int) -> None:
        """Bars the workers from the core that the caller is on, if it is another than before.

        Threads that wait for each other in turns of microseconds look busy and cache-hot to the
        scheduler: two that share a core by chance stay there, ten times slower, beside an idle one.
        """
        if core == self._caller_core:
            return
        self._caller_core = core
        allowed = os.sched_getaffinity(0) - {core}
        if len(allowed) < len(self._handles):
            return
        mask = np.zeros(_MASK_BYTES, np.uint8)
        for one in filter(lambda core: core < 8 * _MASK_BYTES, allowed):
            mask[one // 8] |= 1 << one % 8
        for handle in self._handles:
            self._libc.pthread_setaffinity_np(handle, _MASK_BYTES, ctypes.c_void_p(address(mask)))


_ALIVE: weakref.WeakSet[Workers] = weakref.WeakSet()


def _forget_threads() -> None:
    """After a fork, in the child: its copies of the worker threads do not exist."""
    for workers in _ALIVE:
        workers.threads = 1
        workers._handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def _libc(threads: int) -> Any:
    """The C library; refuses a number of threads that it or the engine cannot run."""
    libc = ctypes.CDLL(None)
    missing = [name for name in _NEEDED if not hasattr(libc, name)]
    if (missing and threads > 1) or not 1 <= threads <= MAX_THREADS:
        raise UnsupportedError(
            f"cannot run with {threads} threads",
            [f"expected 1 to {MAX_THREADS}", *(f"the system lacks {n}" for n in missing)],
            "use --threads 1",
        )
    return libc


def _function_address(function: Any) -> int:
    """Where a C function starts; 0 for none."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _stop(
    libc: Any,
    run: Any,
    code: Code,
    sync: Bytes,
    handles: list[ctypes.c_ulong],
    selves: NDArray[np.int64],
) -> None:
    """Ends the workers and waits for them."""
    if not handles:
        return
    sync.view(np.int32)[SYNC["stop"] // 4] = 1
    nothing = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(
        lambda *_: None
    )
    run(address(sync), _function_address(nothing), 0, len(handles) + 1)
    for handle in handles:
        libc.pthread_join(handle, None)
