"""How to build: what the user chooses, checked before any work."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from twofour.compiler.requests import Requested
from twofour.core.abi import MAX_THREADS
from twofour.core.data import DataLike
from twofour.core.errors import InputError
from twofour.core.plan import Layer, is_sparse
from twofour.core.target import Target, detect_host

EFFORTS = range(4)
SPARSITY = ("enable", "force", "disable")


@dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Attributes:
        sparsity: "enable" (sparse kernels compete where a weight has a pattern), "force" (weights
            that have none are pruned to 2:4 by magnitude where they can be, and only sparse kernels
            are taken there: for measuring, not for accuracy) or "disable".
        int8: quantize the model first, calibrated on `data`. A model that is quantized already, or
            has nothing to quantize, is built as it is, and the plan's notes say so.
        bf16: layers that are float32 may multiply in bfloat16, and hold results in it. Where the
            CPU cannot, or float32 is faster, they stay float32, and `explain` says so.
        fp16: the same in float16; on GPUs alone.
        fp8: quantized values are float8e4m3fn where int8 would hold them, on GPUs alone: calibrated
            on `data`, or those that the file has with Q/DQ.
        stay_float32: names of nodes of the model that `bf16` and `fp16` are not for.
        data: calibration batches, as `twofour quantize` takes them.
        calibration_cache: a file that keeps what calibration saw; where it has all that is needed,
            data may be left out. Or a calibration table of TensorRT.
        shapes: input name -> shape, or (smallest, usual, largest) shape: the engine then runs any
            shape in between. Dimensions left open are those of one calibration sample where there
            is data and no shape is given, else 1.
        profiles: several of such mappings, instead of `shapes`: the engine runs what fits one of
            them, and the first that does.
        threads: to tune for.
        timing_cache: a file that keeps measured times between builds.
        tuning_effort: 0 (nothing is timed) to 3 (everything is, and longer), see `Tuner`.
        workspace_bytes: what a kernel may take beside its operands and weights, for each thread;
            None for any amount.
        target: by default this machine; for another CPU nothing is timed (docs/other_cpus.md); for
            TensorRT see docs/tensorrt.md: threads, the race and the dump have no meaning there.
        race: a model that ONNX Runtime as a whole runs clearly faster becomes one step of it.
        dump: a folder for the text of the graph after each pass.
    """

    sparsity: str = "enable"
    int8: bool = False
    bf16: bool = False
    fp16: bool = False
    fp8: bool = False
    stay_float32: Collection[str] = ()
    data: DataLike | None = None
    calibration_cache: str | os.PathLike[str] | None = None
    shapes: Requested | None = None
    profiles: Sequence[Requested] = ()
    threads: int = 1
    timing_cache: str | os.PathLike[str] | None = None
    tuning_effort: int = 2
    workspace_bytes: int | None = None
    target: Target | None = None
    race: bool = True
    dump: Path | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked before any work.

        Raises:
            InputError: an unknown sparsity, INT8 without data or the reverse, or a thread count
                that the machine does not have.
        """
        if self.sparsity not in SPARSITY:
            raise InputError(
                f"unknown sparsity {self.sparsity!r}", [f"expected one of {', '.join(SPARSITY)}"]
            )
        given = self.data is not None or self.calibration_cache is not None
        if self.int8 and not given:
            raise InputError(
                "INT8 needs calibration data",
                ["int8 was asked for without data"],
                "give calibration inputs: --int8 --data inputs.npz",
            )
        if given and not (self.int8 or self.fp8):
            raise InputError(
                "data is of no use without int8",
                ["calibration data or a cache of it was given without int8"],
                "add int8=True, or drop it",
            )
        if self.shapes and self.profiles:
            raise InputError(
                "shapes and profiles cannot both be given",
                [f"got {len(self.profiles)} profiles and shapes for {', '.join(self.shapes)}"],
                "make the shapes the first of the profiles",
            )
        self._check_types()
        if self.tuning_effort not in EFFORTS:
            raise InputError(
                f"unknown tuning effort {self.tuning_effort!r}",
                [f"expected {EFFORTS[0]} to {EFFORTS[-1]}"],
            )
        elsewhere = self.target is not None and self.target.cpu
        most = MAX_THREADS if elsewhere else min(MAX_THREADS, detect_host().cores)
        if not 1 <= self.threads <= most:
            where = "anywhere" if elsewhere else "on this machine"
            raise InputError(
                f"cannot build for {self.threads} threads", [f"expected 1 to {most} {where}"]
            )

    def _check_types(self) -> None:
        """Refuses types that the target does not have, and two in one place."""
        target = self.target
        is_gpu = target is not None and (target.tensorrt is not None or target.cuda is not None)
        if self.fp16 and (self.bf16 or not is_gpu):
            raise InputError(
                "float16 is for GPUs, and in place of bfloat16",
                [f"the target is {target or 'this CPU'}{', with bf16' * self.bf16}"],
                "leave fp16 out, or build with the target cuda or tensorrt",
            )
        if self.fp8 and (self.int8 or target is None or target.cuda is None):
            raise InputError(
                "float8 is for GPUs, and in place of int8",
                [f"the target is {target or 'this CPU'}{', with int8' * self.int8}"],
                "leave fp8 out, or build with the target cuda",
            )


def without_sparse(options: BuildOptions, layers: Iterable[Layer]) -> tuple[str, ...]:
    """A note, where sparse kernels were forced and not a layer runs on one."""
    if options.sparsity != "force" or any(is_sparse(layer.tactic) for layer in layers):
        return ()
    return ("sparsity force: no layer runs on a sparse kernel; the layers' reasons say why",)
