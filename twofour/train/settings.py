"""The settings of training stages, as a recipe has them, and the options that they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from twofour.core.errors import InputError
from twofour.train.distill import Distiller, Outputs
from twofour.train.quantize_plan import QuantizerOptions
from twofour.train.schedule import AdamW, Schedule, Sgd

Settings = TypeVar("Settings")

OPTIMIZERS = ("sgd", "adamw")
PARALLEL = ("ddp", "fsdp2")
_ELSEWHERE = {"memory", "correct", "dense"}
"""Settings of a recipe's section that other stages than those here read."""


@dataclass(frozen=True)
class SparsifySettings:
    """How a model is pruned.

    Attributes:
        pattern: of all chosen weights.
        method: a criterion of `Sparsifier`.
        include: patterns of the names of weights; () for all.
        exclude: of those that stay dense.
        permute: order channels first.
        samples: of the calibration data used at most.
    """

    pattern: str = "2:4"
    method: str = "magnitude"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    permute: bool = False
    samples: int = 512


@dataclass(frozen=True)
class TrainSettings:
    """How a model is trained; see `Schedule` and `Distiller`.

    Attributes:
        epochs: passes over the training data.
        lr: the highest rate.
        warmup: steps if an int, a share of all steps if a float.
        final_lr: what the cosine falls to.
        optimizer: sgd or adamw.
        momentum: of sgd.
        weight_decay: None for the optimizer's own.
        label_smoothing: of the cross entropy.
        clip_norm: gradients are scaled down to it; 0 does not.
        ema: decay of an average of the weights; 0 keeps none.
        bf16: forward passes in bfloat16.
        fp16: in float16, with scaled gradients.
        loss: module:function (model, batch) -> scalar.
        distil: learn from the dense model.
        temperature: of distillation.
        share: of distillation's loss, beside that of the labels.
        hidden: module name -> weight in the loss.
        outputs: how outputs are compared: logits, mse or cosine.
        processes: that share each batch.
        parallel: ddp, or fsdp2, which spreads the weights too.
    """

    epochs: int = 10
    lr: float = 0.02
    warmup: int | float = 0
    final_lr: float = 0.0
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float | None = None
    label_smoothing: float = 0.0
    clip_norm: float = 0.0
    ema: float = 0.0
    bf16: bool = False
    fp16: bool = False
    loss: str | None = None
    distil: bool = True
    temperature: float = 4.0
    share: float = 0.9
    hidden: dict[str, float] = field(default_factory=dict)
    outputs: Outputs = "logits"
    processes: int = 1
    parallel: str = "ddp"

    def __post_init__(self) -> None:
        """Refuses what contradicts itself. Raises InputError."""
        wrong = [
            f"{name}: expected {' or '.join(known)}, got {getattr(self, name)}"
            for name, known in (("optimizer", OPTIMIZERS), ("parallel", PARALLEL))
            if getattr(self, name) not in known
        ]
        if self.loss is not None and self.distil:
            wrong.append("loss: a function of your own and distil: true are two losses")
        if self.fp16 and self.bf16:
            wrong.append("fp16 and bf16: forward passes are in one of them")
        if self.fp16 and self.parallel == "fsdp2":
            wrong.append("fp16 with fsdp2: use bf16, whose gradients need no scaling")
        if wrong:
            raise InputError("cannot train like this", wrong)

    def schedule(self, seed: int) -> Schedule:
        """As `finetune` takes it."""
        optimizer: Sgd | AdamW = Sgd(self.momentum) if self.optimizer == "sgd" else AdamW()
        if self.weight_decay is not None:
            optimizer = dataclasses.replace(optimizer, weight_decay=self.weight_decay)
        return Schedule(
            self.epochs,
            self.lr,
            self.warmup,
            self.final_lr,
            optimizer,
            # With a teacher it is the Distiller's.
            label_smoothing=0.0 if self.distil else self.label_smoothing,
            clip_norm=self.clip_norm,
            ema=self.ema,
            seed=seed,
            bf16=self.bf16,
            fp16=self.fp16,
        )

    def distiller(self, student: nn.Module, teacher: nn.Module) -> Distiller:
        """The loss against the teacher."""
        return Distiller(
            student,
            teacher,
            self.temperature,
            self.share,
            self.hidden,
            outputs=self.outputs,
            label_smoothing=self.label_smoothing,
        )


@dataclass(frozen=True)
class QatSettings(TrainSettings):
    """How a model is trained with fake quantization; see `QuantizerOptions`.

    Attributes:
        method: how ranges are chosen.
        activation: uint8 or int8.
        exclude: patterns of names that stay float.
        learned_scales: scales are trained like weights.
        samples: of the calibration data used at most.
    """

    epochs: int = 3
    lr: float = 0.002
    method: str = "mse"
    activation: str = "uint8"
    exclude: tuple[str, ...] = ()
    learned_scales: bool = False
    samples: int = 512

    def quantizer(self) -> QuantizerOptions:
        """As `Quantizer` takes it."""
        return QuantizerOptions(
            method=self.method,  # type: ignore[arg-type]  # it checks that itself
            activation=self.activation,  # type: ignore[arg-type]
            exclude=self.exclude,
            learned_scales=self.learned_scales,
        )


def settings_of(kind: type[Settings], plain: Mapping[str, Any]) -> Settings:
    """The settings of a stage.

    Args:
        kind: one of the classes here.
        plain: of a recipe's section; what is missing has its default.

    Raises:
        InputError: there is no such setting, or its value means nothing.
    """
    known = {each.name for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(plain) - known - _ELSEWHERE)
    if unknown:
        raise InputError(
            f"unknown settings: {', '.join(unknown)}",
            [f"expected some of {', '.join(sorted(known))}"],
        )
    chosen = {name: value for name, value in plain.items() if name in known}
    return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in chosen.items()})
