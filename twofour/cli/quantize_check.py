"""twofour quantize: the outputs beside those of the float model, and what to do if they are far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twofour.cli.output import Output

if TYPE_CHECKING:
    from twofour.onnx_tools.agreement import Agreement
    from twofour.onnx_tools.options import QuantizeOptions
    from twofour.onnx_tools.quality import TensorQuality

_MOST_OUTPUTS, _MOST_TENSORS = 4, 3

RequireCosine = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Fail, and write nothing, where an output's cosine with the float model is below. "
        "Without it there is a warning below 0.99.",
    ),
]


def require_samples(least: float | None, data: str | None) -> None:
    """Refuses a bound on outputs where nothing is run.

    Raises:
        InputError: there is no data.
    """
    from twofour.core.errors import InputError

    if least is not None and data is None:
        raise InputError(
            "--require-cosine needs data",
            ["expected --data, to run both models on, got none"],
            "add --data, or leave the option out",
        )


@dataclass(frozen=True)
class Check:
    """The outputs of a quantized model beside those of the float model.

    Attributes:
        found: how near they are; None where there is no data to run.
        options: the model was quantized with.
        least: the cosine that is asked for; None where nothing is.
        tensors: how well each tensor is represented, the worst first; called where it matters.
    """

    found: Agreement | None
    options: QuantizeOptions
    least: float | None
    tensors: Callable[[], Sequence[TensorQuality]]

    def tell(self, out: Output) -> None:
        """Prints the cosines; below the bound a warning.

        Raises:
            GateError: an output is further away than the user allows.
        """
        from twofour.core.errors import GateError
        from twofour.onnx_tools.agreement import LEAST_COSINE

        if self.found is None:
            return
        out.show(self._figures(self.found))
        low = self.found.below(LEAST_COSINE if self.least is None else self.least)
        if not low:
            return
        bound = LEAST_COSINE if self.least is None else self.least
        what = f"output {low[0].name!r} has cosine {low[0].cosine:.4f} with the float model"
        reasons = [f"expected at least {bound:g}, on {self.found.samples} samples"]
        worst = [each for each in self.tensors() if each.sqnr_db is not None][:_MOST_TENSORS]
        shown = ", ".join(f"{each.name} ({each.sqnr_db:.1f} dB)" for each in worst)
        reasons += [f"the tensors that rounding harms most: {shown}"] if worst else []
        if self.least is not None:
            raise GateError(what, reasons, f"nothing was written; {self._way_out()}")
        out.note("\n  ".join([f"WARNING: {what}", *reasons, f"fix: {self._way_out()}"]))

    @property
    def document(self) -> dict[str, Any] | None:
        """The same as plain data; None where nothing was run."""
        return None if self.found is None else asdict(self.found)

    def _figures(self, found: Agreement) -> str:
        shown = [
            f"{each.name} cosine {each.cosine:.4f} (worst {each.worst_cosine:.4f}), "
            f"{each.sqnr_db:.1f} dB"
            for each in found.outputs[:_MOST_OUTPUTS]
        ]
        more = len(found.outputs) - len(shown)
        shown += [f"{more} more outputs"] if more else []
        return f"beside the float model, {found.samples} samples: {'; '.join(shown)}"

    def _way_out(self) -> str:
        ways = []
        if self.options.recipe != "best":
            ways.append("--recipe best")
        if self.options.ranges.activation == "int8":
            ways.append("--activation uint8, where the runtime takes zero points")
        if self.options.method != "mse":
            ways.append("--method mse")
        ways.append("--max-drop leaves the fewest layers float that the metric needs")
        return "try " + "; ".join(ways)
