"""Fake quantization: a tensor rounded to what its int8 form could hold, while still being floats.

    y = (clamp(round(x / scale) + zero_point, least, most) - zero_point) * scale

Gradients go through as if nothing was rounded, and stop where a value was clipped. The scale comes
from calibration (`collect`, then `compute`), from a weight's own values, or is learned.

What is learned is the logarithm of a factor on the calibrated scale: it stays positive, weight
decay draws it back to what was calibrated, and the rates that suit weights suit it, under SGD and
Adam. Its gradient is LSQ's, divided by the square of the largest value that the integers reach:
then SGD moves that value as fast as a weight of its size. To divide by sqrt(values * integers), as
LSQ does, is for few bits: of 8 bits, small layers' scales become 100 times as large in six steps.

Source: Jacob et al. 2018, arXiv:1712.05877, section 3; Esser et al. 2020 (LSQ), arXiv:1902.08153;
Jain et al. 2020 (logarithms), arXiv:1903.08066.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from twofour.core.errors import InputError
from twofour.core.ranges import Range, RangeOptions, affine, choose_range
from twofour.core.rounding import WEIGHT_MAX
from twofour.train.observe import Observer

Mode = Literal["off", "collect", "on"]

MARK = "twofour::FakeQuant"
"""The operator that stands for a quantizer in an exported graph until `train/export_quantized.py`
has written what it means."""

_LEAST_SCALE = 2.0**-120


class FakeQuant(nn.Module):
    """Rounds one tensor: an activation with one scale, or a weight with one for each channel.

    Inputs of another type are rounded in float32, and the result given in their type. A weight's
    scale follows its values, as `core.rounding.quantize_weight` has it, unless it is learned.

        quant = FakeQuant(RangeOptions("mse"))
        quant.mode = "collect"
        for x in batches: quant(x)         # as it is
        quant.compute()                    # chooses the scale; the mode is "on" now

    Args:
        options: how the range is chosen; `int8` is symmetric, -128..127, `uint8` asymmetric.
        axis: counts the channels of a weight, which is symmetric int8, -127..127; None for an
            activation.
        learned: the scale is trained (LSQ), from the calibrated one on.

    Attributes:
        scale: float32 [], or [C] along `axis` once a weight was seen; > 0; before training.
        zero_point: int8 or uint8, as the integers are, of the same shape.
        log_factor: float32 parameter of the same shape, where the scale is learned; else None.
        follows: each call takes a weight's scale from its values.
        mark: a name that an exported graph shows in place of the rounding; None for the rounding.
    """

    scale: Tensor
    zero_point: Tensor
    log_factor: nn.Parameter | None

    def __init__(
        self, options: RangeOptions, axis: int | None = None, learned: bool = False
    ) -> None:
        """Starts with mode "off": nothing is changed and nothing remembered."""
        super().__init__()
        self.options = options
        self.axis = axis
        self.follows = axis is not None and not learned
        self.register_buffer("scale", torch.ones(()))
        self.log_factor = nn.Parameter(torch.zeros(())) if learned else None
        integers = torch.uint8 if self.bounds[0] == 0 else torch.int8
        self.register_buffer("zero_point", torch.zeros((), dtype=integers))
        self.mark: str | None = None
        self._mode: Mode = "off"
        self._known = self.follows
        self._observer: Observer | None = None

    @property
    def mode(self) -> Mode:
        """`off`: x is returned; `collect`: x is returned and remembered; `on`: x is rounded.

        Raises:
            InputError: set to something else, or to `on` while there is no scale.
        """
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in get_args(Mode):
            raise InputError(
                f"unknown mode of fake quantization {mode!r}", fix=f"use {get_args(Mode)}"
            )
        if mode == "on" and not self._known:
            raise InputError(
                "fake quantization has no scale yet",
                fix='set mode to "collect", run calibration batches, and call compute()',
            )
        self._mode = mode

    @property
    def calibrated(self) -> bool:
        """Whether there is a scale, or a weight's values give it."""
        return self._known

    @property
    def learned(self) -> bool:
        """Whether the scale is trained."""
        return self.log_factor is not None

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the largest integer."""
        if self.axis is not None:
            return -WEIGHT_MAX, WEIGHT_MAX
        return (0, 255) if self.options.activation == "uint8" else (-128, 127)

    def forward(self, x: Tensor) -> Tensor:
        """What the mode says, of x: float, any shape; its type."""
        if self._mode == "off":
            return x
        if self._mode == "collect":
            self._collect(x)
            return x
        if self.mark is not None:
            return torch.onnx.ops.symbolic(
                MARK, (x,), {"name": self.mark}, dtype=x.dtype, shape=x.shape, version=1
            )
        if not x.numel():
            return x
        if self.follows:
            self._set_scale(weight_scale(x, self.axis or 0))
        scale, point = self._along(self.trained_scale(), x), self._along(self.zero_point, x)
        factor = None if self.log_factor is None else self._along(self.log_factor, x)
        rounded: Tensor = _round(x.float(), scale, point, *self.bounds, factor)
        return rounded.to(x.dtype)

    def compute(self) -> None:
        """Takes the scale from what was collected, by all processes; the mode is `on` then.

        Raises:
            InputError: nothing was collected, or a value was NaN or infinite.
        """
        if self._observer is not None:
            seen = self._observer.histogram()
            if not seen.empty:
                self.set_range(choose_range(seen, self.options))
            self._observer = None
        self.mode = "on"

    def set_range(self, span: Range) -> None:
        """Takes the scale of an activation from a range that needs no calibration."""
        scheme = affine(span, self.options.activation)
        self._set_scale(torch.tensor(scheme.scale, dtype=torch.float32))
        self.zero_point.fill_(scheme.zero_point)

    def set_from(self, w: Tensor) -> None:
        """Takes the scales of a weight from its values: float [.., C, ..], channels on `axis`.

        A learned scale of a channel that is all zeros begins as the mean of the others.

        Raises:
            InputError: a value is NaN or infinite.
        """
        scale = weight_scale(w, self.axis or 0)
        if not bool(scale.isfinite().all()):
            raise InputError(
                "cannot quantize a weight that is not finite",
                fix="load a checkpoint from before training diverged",
            )
        if self.learned:
            filled = w.detach().ne(0).transpose(0, self.axis or 0).flatten(1).any(1)
            # With the scale 1 that zeros have they would be rounded to zero for ever.
            if bool(filled.any()):
                scale = torch.where(filled, scale, scale[filled].mean())
        self._set_scale(scale)

    def integers(self, x: Tensor) -> Tensor:
        """What the rounded values stand for: int32, the shape of x; as `forward` rounds them."""
        (mode, mark), self._mode, self.mark = (self._mode, self.mark), "on", None
        try:
            with torch.no_grad():
                rounded = self.forward(x.float())
        finally:
            self._mode, self.mark = mode, mark
        scale, point = self._along(self.trained_scale(), x), self._along(self.zero_point, x)
        return torch.round(rounded / scale).to(torch.int32) + point

    @torch.no_grad()
    def trained_scale(self) -> Tensor:
        """The scale that is divided by: float32 > 0, of the shape of `scale`; no gradient."""
        if self.log_factor is None:
            return self.scale
        return (self.scale * self.log_factor.exp()).clamp(min=_LEAST_SCALE)

    @torch.no_grad()
    def _collect(self, x: Tensor) -> None:
        if self.axis is not None:
            self.set_from(x)
            return
        if self._observer is None:
            self.to(x.device)
            self._observer = Observer(x.device)
        self._observer.add(x)

    @torch.no_grad()
    def _set_scale(self, scale: Tensor) -> None:
        """In place where the shape allows it; the parameter always: an optimizer may hold it."""
        if self.scale.shape == scale.shape:
            self.scale.copy_(scale)
        else:
            self.scale = scale
            self.zero_point = torch.zeros_like(self.scale, dtype=self.zero_point.dtype)
        if self.log_factor is not None:
            self.log_factor.data = torch.zeros_like(self.scale)
        self._known = True

    def _along(self, per_channel: Tensor, x: Tensor) -> Tensor:
        if self.axis is None:
            return per_channel
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return per_channel.reshape(shape)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Takes scales of any number of channels; what was saved is rounded with from now on."""
        saved, point = (state_dict.get(f"{prefix}{name}") for name in ("scale", "zero_point"))
        if isinstance(point, Tensor) and point.dtype != self.zero_point.dtype:
            errors = args[-1] if args else kwargs["error_msgs"]
            wanted, got = (str(p.dtype).removeprefix("torch.") for p in (self.zero_point, point))
            errors.append(f"{prefix}zero_point: expected integers of {wanted}, got {got}")
            return
        if isinstance(saved, Tensor):
            if self.axis is not None and saved.shape != self.scale.shape:
                self._set_scale(torch.ones(saved.shape, device=self.scale.device))
            self._known, self._mode, self._observer = True, "on", None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The form of the integers, and the mode."""
        least, most = self.bounds
        along = "" if self.axis is None else f", axis={self.axis}"
        return f"{least}..{most}{along}, learned={self.learned}, mode={self._mode}"


class _Rounding(torch.autograd.Function):
    """Rounds as `core.numerics.quantize` does, by dividing; gradients for x and the log factor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        point: Tensor,
        least: int,
        most: int,
        log_factor: Tensor | None,
    ) -> Tensor:
        """float32 of any shape; the scale, which has the factor, and what is like it broadcast."""
        steps = x / scale
        whole = torch.round(steps).add_(point)
        of_x, of_factor = ctx.needs_input_grad[0], ctx.needs_input_grad[-1]
        inside = (whole >= least) & (whole <= most) if of_x or of_factor else steps
        whole = whole.clamp_(least, most).sub_(point)
        if of_factor:  # Esser et al., eq. 3: the derivative of the result by the scale
            slope = torch.where(inside, whole - steps, whole)
            ctx.save_for_backward(inside, slope, most * most * scale)
        elif of_x:
            ctx.save_for_backward(inside, None, None)
        return whole.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of x: as if nothing was rounded; of the log factor: the derivative / reach^2."""
        (inside, slope, damping), (gradient,) = ctx.saved_tensors, gradients
        of_factor = None
        if slope is not None:
            # The derivative is the sum times the scale, and the reach is most * scale.
            of_factor = (gradient * slope).sum_to_size(damping.shape) / damping
        return gradient * inside, None, None, None, None, of_factor


_round: Callable[..., Tensor] = _Rounding.apply


@torch.no_grad()
def weight_scale(w: Tensor, axis: int) -> Tensor:
    """The scales of `core.rounding.quantize_weight`, bit for bit, on the weight's device.

    Args:
        w: float [.., C, ..].
        axis: counts the channels.

    Returns:
        float32 [C], > 0; NaN or infinite where the weight is.
    """
    peak = w.detach().float().abs().transpose(0, axis).flatten(1).amax(1).double()
    scale = (peak / WEIGHT_MAX).clamp(min=_LEAST_SCALE)
    return torch.where(peak == 0, 1.0, scale).float()
