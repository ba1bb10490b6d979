"""The files of twofour quantize: paths of no use are found before the work."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from twofour.cli.calibration import require_table, write_table
from twofour.cli.options import require_writable
from twofour.cli.output import Output
from twofour.cli.quantize_quality import require_page

if TYPE_CHECKING:
    from twofour.compiler.prunable import Network
    from twofour.onnx_tools.options import QuantizeOptions

_ON_FLOATS = ("equalize", "smooth")


@dataclass(frozen=True)
class Files:
    """Paths as they were given; None for those that were not.

    Attributes:
        model: the float file, which the output may replace.
        output: the quantized file.
        calibration_cache: read and written.
        table: of TensorRT, written.
        cache: of --max-drop, read and written.
        report: the page.
    """

    model: Path
    output: Path
    calibration_cache: Path | None
    table: Path | None
    cache: Path | None
    report: Path | None

    def require(self, options: QuantizeOptions) -> None:
        """Finds before the work what could not be written.

        Raises:
            InputError: a path cannot be written, two are one file, or a table cannot hold the
                scales.
        """
        from twofour.core.errors import InputError

        require_writable(self.output)
        require_page(self.report)
        require_table(self.table, options.ranges.activation)
        named = [(name, path) for name, path in self._named() if path is not None]
        for (name, path), (other, same) in combinations(named, 2):
            if path.resolve() == same.resolve() and other != "--output":
                raise InputError(
                    f"{name} and {other} are one file",
                    [f"expected files of their own, got {path} and {same}"],
                    "name another file",
                )

    def _named(self) -> tuple[tuple[str, Path | None], ...]:
        return (
            ("the model", self.model),
            ("--output", self.output),
            ("--calibration-cache", self.calibration_cache),
            ("--tensorrt-table", self.table),
            ("--cache", self.cache),
            ("--report", self.report),
        )

    def write(self, model: Network, options: QuantizeOptions, out: Output) -> None:
        """The table, which may refuse a name, and then the model."""
        from twofour.onnx_tools.load import save_model

        write_table(self.table, model, options.method)
        save_model(model, self.output)
        changed = [name for name in _ON_FLOATS if options.takes(name)]
        if self.table is not None and changed:
            out.note(
                f"WARNING: the scales in {self.table} are not those of {self.model}\n"
                f"  its floats were changed first, by: {', '.join(changed)}\n"
                "fix: --recipe fast, or give the Q/DQ file to TensorRT"
            )
