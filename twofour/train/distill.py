"""Distillation: a pruned model learns from its dense parent, with or without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from twofour.core.errors import InputError
from twofour.train.batches import forward as call
from twofour.train.calibration import bare

Outputs = Literal["logits", "mse", "cosine"]


class Distiller:
    """The loss of a student against its teacher, at the outputs and at chosen layers inside.

        distiller = Distiller(student, teacher, hidden={"layer2": 1.0})
        loss = distiller(x, labels)                  # runs both; or distiller(x), without labels

    or, where the loop computes the outputs itself: `distiller.loss(student(x), x, labels)`. With
    labels the loss is `share * soft + (1 - share) * hard + inside`, without them `soft + inside`:

    - soft, `outputs="logits"`: temperature^2 * KL(teacher || student) of the softmax over axis 1 of
      the outputs divided by the temperature; "mse": the mean squared difference; "cosine": 1 -
      their cosine along the last axis, for embeddings.
    - hard: the cross entropy of logits with the labels, or for "mse" the mean squared difference.
    - inside: for each hidden layer its weight * mean((s - t)^2) / mean(t^2).

    Wrappers of the student (`torch.compile`, DistributedDataParallel) are looked through; under
    autocast the losses are float32. A context manager, which removes its hooks at the end.

    Args:
        student: what is trained.
        teacher: put in eval mode, never changed; on the student's device.
        temperature: above 0; higher shows more of how the teacher ranks wrong classes.
        share: of the soft loss, 0 to 1, where there are labels.
        hidden: module name, the same in both models -> weight of that layer's outputs, which have
            one shape in both; of a tuple the first item counts.
        outputs: "logits", "mse" or "cosine".
        label_smoothing: of the cross entropy, 0 to 1, 1 excluded.
        forward: (model, x) -> the outputs as one tensor.

    Raises:
        InputError: an option is out of its range, a hidden layer is in only one of the models, or
            the models share weights.

    Source: Hinton et al. 2015, arXiv:1503.02531; Romero et al. 2015, arXiv:1412.6550 (hidden).
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        temperature: float = 4.0,
        share: float = 0.9,
        hidden: Mapping[str, float] | None = None,
        *,
        outputs: Outputs = "logits",
        label_smoothing: float = 0.0,
        forward: Callable[[nn.Module, Any], Tensor] = call,
    ) -> None:
        """Hooks the hidden layers of both."""
        self.student, self.teacher = student, teacher
        self.temperature, self.share = temperature, share
        self.hidden = dict(hidden or {})
        self.outputs, self.label_smoothing = outputs, label_smoothing
        self.forward = forward
        _require_options(self)
        _require_apart(student, teacher)
        self._seen: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}}
        chosen = {"student": self._modules(student, "student")}
        chosen["teacher"] = self._modules(teacher, "teacher")
        self._hooks = [
            module.register_forward_hook(_keeper(self._seen[side], name, side == "student"))
            for side, modules in chosen.items()
            for name, module in modules.items()
        ]
        teacher.eval()

    def __call__(self, x: Any, labels: Tensor | None = None) -> Tensor:
        """The loss of the student on a batch.

        Args:
            x: what `forward` takes: a tensor, or a mapping of keyword arguments.
            labels: int64 [B] classes, or what "mse" compares the outputs with.

        Returns:
            A scalar with a gradient.
        """
        return self.loss(self.forward(self.student, x), x, labels)

    def loss(self, outputs: Tensor, x: Any, labels: Tensor | None = None) -> Tensor:
        """The loss of outputs that the student gave for `x` just now.

        Args:
            outputs: of the student.
            x: what the teacher is run on.
            labels: as in a call.

        Raises:
            InputError: student and teacher, or outputs and labels, do not fit together, or a
                hidden layer did not run.
        """
        if self.teacher.training:
            self.teacher.eval()
        with torch.no_grad():
            wanted = self.forward(self.teacher, x)
        _require_tensor(outputs, "student")
        _require_tensor(wanted, "teacher")
        _require_shape(outputs, wanted, "the outputs")
        if self.outputs == "logits" and (outputs.ndim < 2 or outputs.shape[1] < 2):
            raise InputError(
                "logits are of two classes or more, on axis 1",
                [f"got outputs of shape {list(outputs.shape)}, whose softmax says nothing"],
                'make the Distiller with outputs="mse"',
            )
        total = self._soft(outputs.float(), wanted.float())
        if labels is not None:
            total = self.share * total + (1 - self.share) * self._hard(outputs.float(), labels)
        for name, weight in self.hidden.items():
            total = total + weight * self._inside(name)
        return total

    def close(self) -> None:
        """Removes the hooks from both models; hidden layers are not seen any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> Distiller:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()

    def _soft(self, got: Tensor, wanted: Tensor) -> Tensor:
        if self.outputs == "mse":
            return functional.mse_loss(got, wanted)
        if self.outputs == "cosine":
            return (1 - functional.cosine_similarity(got, wanted, dim=-1)).mean()
        log_got = functional.log_softmax(got / self.temperature, dim=1)
        log_wanted = functional.log_softmax(wanted / self.temperature, dim=1)
        divergence = functional.kl_div(log_got, log_wanted, log_target=True, reduction="sum")
        # Its gradient shrinks with the square of the temperature.
        return self.temperature**2 * divergence * (got.shape[1] / got.numel())

    def _hard(self, got: Tensor, labels: Tensor) -> Tensor:
        if self.outputs == "mse":
            _require_shape(got, labels, "the outputs and the labels", ("outputs", "labels"))
            return functional.mse_loss(got, labels.float())
        if self.outputs == "cosine":
            raise InputError(
                "cosine compares embeddings, and has no use for labels",
                fix="call the Distiller with x alone (give finetune batches of x alone), and add "
                "your own loss to its",
            )
        return functional.cross_entropy(got, labels, label_smoothing=self.label_smoothing)

    def _inside(self, name: str) -> Tensor:
        pair = [self._seen[side].pop(name, None) for side in ("student", "teacher")]
        got, wanted = pair
        if got is None or wanted is None:
            raise InputError(
                f"hidden layer {name!r} gave no output in the last forward pass",
                [f"of the {'student' if got is None else 'teacher'}"],
                "make the Distiller before the model is compiled, run the student with gradients "
                "before each loss, and do not close the Distiller before",
            )
        _require_shape(got, wanted, f"hidden layer {name!r}")
        got, wanted = got.float(), wanted.float()
        energy = wanted.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
        return (got - wanted).square().mean() / energy

    def _modules(self, model: nn.Module, side: str) -> dict[str, nn.Module]:
        """The hidden layers of a model."""
        modules = dict(bare(model).named_modules())
        for name in self.hidden:
            if name not in modules:
                near = get_close_matches(name, modules, cutoff=0.0)
                raise InputError(
                    f"the {side} has no module {name!r}", fix=f"near it: {', '.join(near)}"
                )
        return {name: modules[name] for name in self.hidden}


def _keeper(
    seen: dict[str, Tensor], name: str, with_gradient: bool
) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that keeps the layer's output; of the student not while it is evaluated."""

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, (tuple, list)):
            output = output[0]
        if torch.is_grad_enabled() or not with_gradient:
            seen[name] = output

    return keep


def _require_options(options: Distiller) -> None:
    held = {
        "temperature: expected above 0": options.temperature > 0,
        "share: expected 0 to 1": 0 <= options.share <= 1,
        "outputs: expected logits, mse or cosine": options.outputs in ("logits", "mse", "cosine"),
        "hidden: expected weights of 0 or more": all(w >= 0 for w in options.hidden.values()),
        "label_smoothing: expected 0 to 1, 1 excluded": 0 <= options.label_smoothing < 1,
        "label_smoothing: expected 0 where outputs are no logits": options.outputs == "logits"
        or not options.label_smoothing,
    }
    wrong = [
        f"{text}; got {getattr(options, text.partition(':')[0])}"
        for text, holds in held.items()
        if not holds
    ]
    if wrong:
        raise InputError("cannot distill like this", wrong)


def _require_apart(student: nn.Module, teacher: nn.Module) -> None:
    taught = {id(p) for p in student.parameters()}
    shared = [name for name, p in teacher.named_parameters() if id(p) in taught]
    if shared:
        raise InputError(
            "student and teacher share weights, so there is nothing to learn from",
            [f"{len(shared)} of them, such as {shared[0]}"],
            "teacher = copy.deepcopy(model), before the model is pruned",
        )


def _require_tensor(outputs: Any, side: str) -> None:
    if not isinstance(outputs, Tensor):
        raise InputError(
            f"the {side}'s outputs are no tensor but {type(outputs).__name__}",
            fix="give Distiller a forward: a function of (model, x) that returns the tensor",
        )


def _require_shape(
    got: Tensor, wanted: Tensor, where: str, sides: tuple[str, str] = ("student", "teacher")
) -> None:
    if got.shape != wanted.shape:
        raise InputError(
            f"{' and '.join(sides)} differ in the shape of {where}",
            [f"{sides[0]} {list(got.shape)}, {sides[1]} {list(wanted.shape)}"],
            "compare tensors of one shape, at one input",
        )
