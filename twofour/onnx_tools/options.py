"""What the user chooses about quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from twofour.core.errors import InputError

Method = Literal["mse", "entropy", "percentile", "minmax"]
Activation = Literal["int8", "uint8"]
AddInputs = Literal["shortcut", "both"]


@dataclass(frozen=True)
class QuantizeOptions:
    """How a float model becomes an INT8 model.

    Attributes:
        method: how an activation's range is chosen from what calibration saw. `minmax` takes all of
            it; `percentile` leaves out the largest magnitudes; `mse` has the least square error;
            `entropy` the least Kullback-Leibler divergence.
        activation: `int8` is symmetric (zero point 0); `uint8` is asymmetric, and spends all 256
            steps on what a ReLU lets through.
        add_inputs: which inputs of a residual Add are quantized. `shortcut`: all but the output of
            the convolution before it, so that convolution, Add, ReLU and rounding are one step with
            one rounding. `both`: that output too, as ONNX Runtime's integer Add wants it.
        attention: the products within attention are quantized too.
        exclude: patterns, as in a shell, of names of nodes that stay float.
        percentile: for the method of this name, the share of values inside the range, in percent.
        samples: calibrate with so many samples at most; None for all.
        threads: of ONNX Runtime while calibrating; 0 for as many as there are cores.
    """

    method: Method = "mse"
    activation: Activation = "int8"
    add_inputs: AddInputs = "shortcut"
    attention: bool = True
    exclude: tuple[str, ...] = ()
    percentile: float = 99.99
    samples: int | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        """Refuses values that mean nothing. Raises InputError."""
        choices = {"method": Method, "activation": Activation, "add_inputs": AddInputs}
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                raise _refused(name, " or ".join(get_args(choice)), getattr(self, name))
        if not 50 < self.percentile <= 100:
            raise _refused("percentile", "above 50, up to 100", self.percentile)
        if self.samples is not None and self.samples < 1:
            raise _refused("samples", "at least 1", self.samples)
        if self.threads < 0:
            raise _refused("threads", "0 or more", self.threads)


def _refused(name: str, expected: str, value: object) -> InputError:
    return InputError(
        f"bad quantization option {name}", [f"expected {expected}, got {value!r}"], "change it"
    )
