"""Prunes the weights of a PyTorch model to N:M patterns, and holds the masks while it is trained.

A mask is a buffer of the module it belongs to (`conv1.weight_mask`), so it moves with the model, is
saved with it and copied with it: a Sparsifier of a model that has masks takes them up. To resume,
build the model and `restore` what was saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from twofour.core import patterns
from twofour.core.errors import GateError, InputError
from twofour.core.progress import Report, silent
from twofour.train import holding, loading
from twofour.train.batches import forward as call
from twofour.train.calibration import Batches, Calibration, Forward, Loss
from twofour.train.choose import CRITERIA, choose
from twofour.train.layers import NeverPruned, WeightRef, survey
from twofour.train.reconstruct import ReconstructOptions
from twofour.train.report import LayerReport, select, table


class Sparsifier:
    """Prunes linear layers, convolutions and the projections of attention, and keeps them pruned.

    A weight is pruned if it matches `include` (or there is none), does not match `exclude`, and its
    shape allows the pattern. Names are those of `WeightRef`, with wildcards as in `fnmatch`.

        sparsifier = Sparsifier(model).prune()
        sparsifier.attach(optimizer)       # then train as before
        sparsifier.verify()

    Args:
        model: pruned in place.
        pattern: `2:4`, `4:8`, `2:4/pair` or another N:M; or a mapping of name patterns to such, of
            which the first that matches counts: `{"layer1.*": "2:4", "*": "2:4/pair"}`.
        criterion: how weights are ranked: `magnitude`, or with calibration data `wanda`, `taylor`
            or `sparsegpt` (see `choose.py`).
        include: patterns of names; None means all.
        exclude: patterns of names that stay dense.
        locked: once there are masks, changing them is an error.

    Raises:
        InputError: an unknown pattern or criterion, or a name pattern that matches no layer.

    Attributes:
        weights: those that get masks.
        patterns: name of each of them -> its pattern.
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: str | patterns.Pattern | Mapping[str, str | patterns.Pattern] = "2:4",
        criterion: str = "magnitude",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        *,
        locked: bool = False,
    ) -> None:
        """Decides which weights are pruned; changes nothing yet."""
        if criterion not in CRITERIA:
            raise InputError(
                f"unknown pruning criterion {criterion!r}", fix=f"use {' or '.join(CRITERIA)}"
            )
        self.model = model
        self.criterion = criterion
        self._found = survey(model)
        selection = select(self._found, pattern, include, exclude)
        self.patterns = selection.patterns
        self._reasons = selection.reasons
        self.weights = [
            entry
            for entry in self._found
            if isinstance(entry, WeightRef) and entry.name in self.patterns
        ]
        self._lock_next = locked
        self._digests: dict[str, str] = {}  # of the masks, while they are locked
        self._energy_kept: dict[str, float] = {}
        self._copies: list[dict[str, WeightRef]] = []
        self._handles: list[RemovableHandle] = []
        if locked and any(weight.mask is not None for weight in self.weights):
            self.lock()

    @property
    def locked(self) -> bool:
        """Whether masks cannot be changed any more once there are some."""
        return self._lock_next

    def prune(
        self,
        batches: Batches | None = None,
        *,
        forward: Forward | None = None,
        loss: Loss | None = None,
        report: Report = silent,
        options: ReconstructOptions | None = None,
    ) -> Sparsifier:
        """Chooses the masks from the weights as they are now, and applies them.

        Of a model that was pruned before they are chosen anew. In a `torch.distributed` job every
        process has to call it, with its own batches, and gets the masks of process 0. SparseGPT
        changes the weights that stay, too.

        Args:
            batches: calibration data, for criteria that need it; magnitude does not. For SparseGPT
                what can be run through several times. Moved to the model's device.
            forward: (model, batch) -> anything; default `batches.forward`.
            loss: (model, batch) -> scalar, for Taylor.
            report: told of each piece of work done.
            options: of SparseGPT.

        Returns:
            itself.

        Raises:
            InputError: no layer can be pruned, a weight holds a value that is not finite, the masks
                are locked, or the calibration data is none, wrong, or for another criterion. The
                model is left as it was.
        """
        self._require_unlocked("choose masks anew")
        self._require_weights()
        data = Calibration(batches, forward or call, loss, report)
        chosen = choose(self.model, self.weights, self.patterns, self.criterion, data, options)
        self.set_masks(chosen.masks)
        self._energy_kept |= chosen.energy_kept
        return self

    def set_masks(self, masks: Mapping[str, Tensor]) -> Sparsifier:
        """Sets the masks of some weights or all, and applies them.

        Args:
            masks: name of a weight -> bool [N, C, ...], True where it is kept.

        Returns:
            itself.

        Raises:
            InputError: a name, shape or dtype is wrong, a mask does not have the weight's pattern,
                or the masks are locked. No mask is changed then.
        """
        self._require_unlocked("change masks")
        self._require_valid(masks)
        chosen = [weight for weight in self.weights if weight.name in masks]
        placed = {w.name: masks[w.name].detach().to(w.parameter.device) for w in chosen}
        placed = holding.agree(placed)
        for weight in chosen:
            mask = placed[weight.name]
            self._energy_kept[weight.name] = _energy_kept(holding.whole(weight.parameter), mask)
            holding.set_mask(weight, mask)
        self.apply()
        if self._lock_next:
            self.lock()
        return self

    def restore(self, state_dict: Mapping[str, Any]) -> Sparsifier:
        """Loads a checkpoint with masks, `model.state_dict()` of a pruned one, into this model.

        Names may have prefixes of wrappers (`module.`, `_orig_mod.`) that this model lacks. Where
        the model has masks already, its own `load_state_dict` does the same.

        Args:
            state_dict: all weights, buffers and masks.

        Returns:
            itself, with the masks of the checkpoint.

        Raises:
            InputError: the checkpoint has no masks, those of another model or pattern, or lacks or
                has tensors that the model does not; or others are locked. The model's masks are
                then as they were.
        """
        self._require_weights()
        state, masks = loading.masks_in(state_dict, self.model, self.weights)
        self._require_valid(masks)
        changed = [
            f"{name}: another mask than the locked one"
            for name, mask in masks.items()
            if self._digests and self._digests.get(name) != holding.digest(mask)
        ]
        if changed:
            raise InputError("cannot load masks: they are locked", changed)
        loading.load(self.model, self.weights, state, masks)
        self._energy_kept = {}
        if self._lock_next:
            self.lock()
        return self

    @torch.no_grad()
    def apply(self) -> None:
        """Sets what the masks remove to zero, in the model and in the copies it was attached with.

        `attach` does this after each optimizer step.

        Raises:
            InputError: the model has no masks.
        """
        self._require_masks()
        holding.reshard(self.model)
        holding.hold(self.weights)
        for copied in self._copies:
            holding.follow(self.weights, copied)

    def attach(self, optimizer: torch.optim.Optimizer, *copies: nn.Module) -> RemovableHandle:
        """Re-applies the masks after each step of this optimizer.

        They are applied to the weights, to the optimizer's states of their shape, and to the
        copies. Call it once for each optimizer.

        Args:
            optimizer: holds parameters of the model. Under FSDP2 make it after `fully_shard`.
            copies: models with the same weights, such as a
                `torch.optim.swa_utils.AveragedModel`; they get the masks as buffers too.

        Returns:
            A handle; its `remove()` ends this.

        Raises:
            InputError: the model has no masks, the optimizer holds none of the pruned weights, or a
                copy lacks some.
        """
        pruned = self._require_masks()
        holding.reshard(self.model)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held.isdisjoint(id(weight.parameter) for weight, _ in pruned):
            raise InputError(
                "the optimizer holds none of the pruned weights",
                ["it was built from another model, from a copy, or before fully_shard"],
                "build the optimizer from model.parameters() of the model that was pruned",
            )
        followers = [holding.find_copies(self.weights, copy) for copy in copies]
        self._copies += followers
        self.apply()

        @torch.no_grad()
        def hold_masks(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
            holding.reshard(self.model)
            holding.hold(self.weights, optimizer)
            for copied in followers:
                holding.follow(self.weights, copied)

        handle = optimizer.register_step_post_hook(hold_masks)
        self._handles.append(handle)
        return handle

    def verify(self, *copies: nn.Module) -> None:
        """Checks every pruned weight against its pattern and its mask.

        Args:
            copies: checked too, beside those that `attach` was given.

        Raises:
            GateError: names the first violation in each weight that has one.
            InputError: the model has no masks, or a copy lacks weights.
        """
        pruned = self._require_masks()
        given = [holding.find_copies(self.weights, copy) for copy in copies]
        masked = {weight.name for weight, _ in pruned}
        broken = [f"{n}: its locked mask is gone" for n in self._digests if n not in masked]
        for weight, mask in pruned:
            pattern = self.patterns[weight.name]
            problem = holding.why_broken(weight.parameter, mask, pattern)
            if problem is None and self._digests:
                if self._digests.get(weight.name) != holding.digest(mask):
                    problem = "its mask is not the one that was locked"
            found = {"": problem}
            for i, copied in enumerate([*self._copies, *given]):
                follower = copied[weight.name].parameter
                found[f"copy {i}, "] = holding.why_broken(follower, mask, pattern)
            broken += [f"{where}{weight.name}: {why}" for where, why in found.items() if why]
        if broken:
            raise GateError(
                f"{len(broken)} pruned weights broke their pattern",
                broken,
                "call Sparsifier.attach(optimizer) before training, and load weights together "
                "with the masks they were saved with",
            )

    def lock(self) -> None:
        """From now on choosing or changing masks is an error, and `verify` finds a changed one.

        Raises:
            InputError: the model has no masks.
        """
        self._digests = {w.name: holding.digest(mask) for w, mask in self._require_masks()}
        self._lock_next = True

    def report(self) -> list[LayerReport]:
        """One entry for each matrix of the model, in its order: pruned, or why not."""
        return [self._entry(entry) for entry in self._found]

    def table(self) -> str:
        """The report as text of at most 100 columns, with totals."""
        return table(self.report())

    def remove(self) -> None:
        """Forgets the masks and leaves the weights; `state_dict` has its old names again."""
        self._require_masks()
        for handle in self._handles:
            handle.remove()
        for weight in (*self.weights, *(w for copied in self._copies for w in copied.values())):
            holding.drop_mask(weight)
        self._handles, self._copies = [], []
        self._energy_kept, self._digests = {}, {}

    def _entry(self, entry: WeightRef | NeverPruned) -> LayerReport:
        reason = self._reasons.get(entry.name, "")
        if isinstance(entry, NeverPruned):
            return LayerReport(entry.name, entry.shape, "dense", reason, shared=entry.shared)
        if not reason and entry.mask is None:
            reason = "not pruned yet"
        weight = holding.whole(entry.parameter.detach())
        return LayerReport(
            entry.name,
            entry.shape,
            "dense" if reason else str(self.patterns[entry.name]),
            reason,
            int(torch.count_nonzero(weight)) / weight.numel() if weight.numel() else 1.0,
            1.0 if reason else self._energy_kept.get(entry.name),
            entry.shared,
        )

    def _require_valid(self, masks: Mapping[str, Tensor]) -> None:
        """Refuses masks that the weights cannot have; all reasons at once."""
        weights = {weight.name: weight for weight in self.weights}
        reasons = []
        for name, mask in masks.items():
            if name not in weights:
                reasons.append(f"{name}: {self._reasons.get(name, 'the model has no such weight')}")
                continue
            problem = holding.why_no_mask(mask, weights[name].shape, self.patterns[name])
            if problem is not None:
                reasons.append(f"{name}: {problem}")
        if reasons:
            raise InputError(
                "these masks do not fit the model",
                reasons,
                "use the masks of this model, made with the same pattern, include and exclude",
            )

    def _require_unlocked(self, what: str) -> None:
        if self._digests:
            raise InputError(
                f"cannot {what}: the masks are locked",
                ["something was built on these masks: a recovery, a quantization, an export"],
                "call remove() first, or make the Sparsifier without locked=True",
            )

    def _require_weights(self) -> None:
        if not self.weights:
            reasons = [f"{name}: {reason}" for name, reason in self._reasons.items()]
            raise InputError(
                "no layer of this model can be pruned",
                reasons or ["it has no linear layer, convolution or attention"],
                "check include and exclude, or choose another pattern",
            )

    def _require_masks(self) -> list[tuple[WeightRef, Tensor]]:
        masked = [(w, mask) for w in self.weights if (mask := w.mask) is not None]
        if not masked:
            raise InputError("the model has no masks", fix="call Sparsifier.prune() first")
        return masked


def _energy_kept(weight: Tensor, mask: Tensor) -> float:
    """The share of the sum of squares that the mask keeps; of an all-zero weight, 1."""
    kept = weight.detach().clone()
    holding.zero_removed(kept, mask)
    norms = [torch.linalg.vector_norm(w, dtype=torch.float64) for w in (kept, weight.detach())]
    return float(norms[0] / norms[1]) ** 2 if norms[1] > 0 else 1.0
