"""One INT8 file, made by one tool, in a process of its own.

    python quantize_once.py "onnxruntime minmax" float.onnx samples int8.onnx

The samples are a folder of .npz files, a batch each. The last line printed is
`{"seconds": ..., "memory_bytes": ...}`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

OPSET = 17
Batch = dict[str, Any]
Make = Callable[[Path, list[Batch], Path], None]


def ours(recipe: str, activation: str | None) -> Make:
    """`twofour quantize --recipe R --activation A`."""
    from twofour.compiler.importer import standardized
    from twofour.onnx_tools.load import load_model, save_model
    from twofour.onnx_tools.options import QuantizeOptions
    from twofour.onnx_tools.quantize import quantize

    def make(source: Path, samples: list[Batch], path: Path) -> None:
        model = standardized(load_model(source))
        options = QuantizeOptions(activation=activation, recipe=recipe, threads=1)
        save_model(quantize(model, samples, options), path)

    return make


def dynamic() -> Make:
    """`twofour quantize --dynamic`."""
    from twofour.compiler.importer import standardized
    from twofour.onnx_tools.dynamic import quantize_dynamic
    from twofour.onnx_tools.load import load_model, save_model

    def make(source: Path, samples: list[Batch], path: Path) -> None:
        save_model(quantize_dynamic(standardized(load_model(source))), path)

    return make


def onnxruntime(method: str, only: list[str] | None) -> Make:
    """quantize_static after its own preprocessing, its other options as they come."""
    import onnx
    from onnx import version_converter
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self, samples: list[Batch]) -> None:
            self.samples = iter(samples)

        def get_next(self) -> Batch | None:
            return next(self.samples, None)

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }

    def make(source: Path, samples: list[Batch], path: Path) -> None:
        prepared = path.with_suffix(".prepared")
        model = onnx.load(source)
        if model.opset_import[0].version < OPSET:
            # In older ones it writes scales of channels that no DequantizeLinear there can have.
            source = path.with_suffix(".newer")
            onnx.save(version_converter.convert_version(model, OPSET), source)
        # Its symbolic shapes are incomplete where an axis of a transformer is open.
        quant_pre_process(source, prepared, skip_symbolic_shape=len(samples[0]) > 1)
        quantize_static(
            prepared,
            path,
            Reader(list(padded(samples))),
            calibrate_method=methods[method],
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=only,
        )
        prepared.unlink()
        path.with_suffix(".newer").unlink(missing_ok=True)

    return make


def padded(samples: list[Batch]) -> Iterator[Batch]:
    """Sentences as long as the longest, in batches of the same size; images as they are."""
    if len(samples[0]) == 1:
        yield from samples
        return
    longest = max(batch["input_ids"].shape[1] for batch in samples)
    wide = [
        {k: np.pad(v, ((0, 0), (0, longest - v.shape[1]))) for k, v in batch.items()}
        for batch in samples
    ]
    whole = {name: np.concatenate([batch[name] for batch in wide]) for name in samples[0]}
    size = 64
    for i in range(0, len(whole["input_ids"]) - size + 1, size):
        yield {name: array[i : i + size] for name, array in whole.items()}


def nncf() -> Make:
    """nncf.quantize on the ONNX model, told what a transformer is."""
    import nncf as library
    import onnx

    def make(source: Path, samples: list[Batch], path: Path) -> None:
        options = {"model_type": library.ModelType.TRANSFORMER} if len(samples[0]) > 1 else {}
        data = library.Dataset(samples)
        model = library.quantize(onnx.load(source), data, subset_size=len(samples), **options)
        onnx.save(model, path)

    return make


def maker(tool: str) -> Make:
    """What makes a file as `tool` says, everything it needs imported."""
    name, _, rest = tool.partition(" ")
    if name == "twofour":
        recipe, _, activation = rest.partition(", ")
        return dynamic() if rest == "dynamic" else ours(recipe, activation or None)
    if name == "nncf":
        return nncf()
    method, _, only = rest.partition(", ")
    return onnxruntime(method, ["MatMul"] if only else None)


def memory_bytes(field: str) -> int:
    """VmRSS, what this process holds now, or VmHWM, the most since `forget_peak`.

    Not `getrusage`, whose peak has what the parent held when it started this process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def forget_peak() -> None:
    """Begins VmHWM anew (man 5 proc, clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> int:
    """Makes the file; returns 0."""
    tool, source, samples, path = sys.argv[1:]
    make = maker(tool)
    batches = [dict(np.load(file)) for file in sorted(Path(samples).glob("*.npz"))]
    forget_peak()
    before_bytes, begin_s = memory_bytes("VmRSS"), time.monotonic()
    make(Path(source), batches, Path(path))
    seconds = time.monotonic() - begin_s
    taken = memory_bytes("VmHWM") - before_bytes
    print(json.dumps({"seconds": seconds, "memory_bytes": taken}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
