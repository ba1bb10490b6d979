"""Gradual pruning: the masks tighten while the model is trained, from none to all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from twofour.core.criteria import magnitude
from twofour.core.errors import InputError
from twofour.core.patterns import Pattern
from twofour.train.layers import WeightRef
from twofour.train.method import Method
from twofour.train.sparsify import Sparsifier

# The masks of `by="groups"` are made anew so often on the way from dense to sparse.
GROUP_UPDATES = 100


class Gradual(Method):
    """Masks one layer after the other, or in all layers one group after the other.

        gradual = Gradual(Sparsifier(model), steps=len(loader) * epochs, end=0.5)
        gradual.attach(optimizer)       # then train as before
        gradual.finish()

    Between `start` and `end` the share that is masked rises as 1 - (1 - p)^3, p from 0 to 1: fast
    while there is much that does no harm. Nothing that was masked comes back. Masks keep the
    largest weights, of those that the layer has when its turn comes.

    Args:
        sparsifier: not pruned yet.
        steps: of the optimizer in the whole training.
        start: share of the steps before the first mask.
        end: share of the steps by which all is masked, above `start`, up to 1.
        by: "layers": the share is one of the layers; "groups": of the groups of each layer, those
            first whose loss of energy is the least.
        order: of layers: "energy", those first whose mask keeps the largest share of the energy
            that the dense layer had at `attach`; or all their names.

    Raises:
        InputError: an option is out of its range, or as for every `Method`.

    Source: Zhu and Gupta 2017, arXiv:1710.01878 (the cubic rise).
    """

    def __init__(
        self,
        sparsifier: Sparsifier,
        steps: int,
        start: float = 0.0,
        end: float = 0.5,
        *,
        by: Literal["layers", "groups"] = "layers",
        order: Literal["energy"] | Sequence[str] = "energy",
    ) -> None:
        """Checks; changes nothing yet."""
        super().__init__(sparsifier, steps)
        names = sorted(weight.name for weight in sparsifier.weights)
        held = {
            f"start, end: expected shares, a step or more apart; got {start}, {end}": 0 <= start
            and start * steps < round(end * steps)
            and end <= 1,
            f"by: expected layers or groups; got {by}": by in ("layers", "groups"),
            f"order: expected 'energy' or each of {names} once; got {order!r}": order == "energy"
            or sorted(order) == names,
        }
        wrong = [text for text, holds in held.items() if not holds]
        if wrong:
            raise InputError("cannot prune gradually like this", wrong)
        self.start, self.end, self.by = start, end, by
        self._by_energy = order == "energy"
        self._order = [] if order == "energy" else list(order)

    def share(self, step: int) -> float:
        """The share that is masked after `step` steps, 0 to 1."""
        first, last = self.start * self.steps, self._last_step()
        rest = (last - step) / max(1.0, last - first)
        return 1.0 - min(1.0, max(0.0, rest)) ** 3

    @property
    def order(self) -> list[str]:
        """The layers' names in the order of their turns; empty before `attach` by energy."""
        return list(self._order)

    def state_dict(self) -> dict[str, Any]:
        """How far it is, and the order of layers."""
        return {**super().state_dict(), "order": self.order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there, in that order."""
        super().load_state_dict(state)
        self._order = list(state["order"])

    def _settings(self) -> dict[str, Any]:
        given = "energy" if self._by_energy else self._order
        schedule = {"steps": self.steps, "start": self.start, "end": self.end}
        return {**schedule, "by": self.by, "order": given}

    def _begin(self) -> None:
        self._leave_dense()
        if self._by_energy:
            kept = {w.name: self._energy_kept(w) for w in self.sparsifier.weights}
            self._order = sorted(kept, key=lambda name: -kept[name])

    def _before_step(self) -> None:
        return

    def _after_step(self) -> None:
        if self.by == "layers":
            due = self._order[self._layers_at(self.step - 1) : self._layers_at(self.step)]
            if due:
                new = [weight for weight in self.sparsifier.weights if weight.name in due]
                masks = {weight.name: self._best_mask(weight, weight.parameter) for weight in new}
                self.sparsifier.set_masks(masks)
        elif self._update_at(self.step):
            for weight, mask in self._masked():
                self._mask_groups(weight, mask, self.share(self.step))
            if self.step == self._last_step():
                self.sparsifier.set_masks({weight.name: mask for weight, mask in self._masked()})
        self._hold()

    def _last_step(self) -> int:
        return round(self.end * self.steps)

    def _end(self) -> None:
        return

    def _layers_at(self, step: int) -> int:
        """How many layers are masked after this step."""
        return int(self.share(step) * len(self._order) + 1e-9)

    def _update_at(self, step: int) -> bool:
        first, last = self.start * self.steps, self._last_step()
        every = max(1, int((last - first) / GROUP_UPDATES))
        return first < step <= last and (step % every == 0 or step == last)

    def _mask_groups(self, weight: WeightRef, mask: Tensor, share: float) -> None:
        """Masks the groups of one layer that lose least, up to this share of them."""
        pattern = self.sparsifier.patterns[weight.name]
        values = weight.parameter.detach().float()
        best = self._best_mask(weight, values)
        lost = _blocks(magnitude(values).masked_fill(best, 0.0), pattern)
        loss = lost.sum((1, 3))
        masked = ~_blocks(mask, pattern).all(3).all(1)
        ranked = loss.masked_fill(masked, -1.0).flatten().argsort(stable=True)
        chosen = torch.zeros(loss.numel(), dtype=torch.bool, device=mask.device)
        chosen[ranked[: int(share * loss.numel() + 1e-9)]] = True
        fresh = (chosen.view_as(loss) & ~masked)[:, None, :, None].expand(lost.shape)
        rows = mask.shape[0]
        wide = fresh.reshape(-1, *fresh.shape[2:])[:rows].reshape(mask.shape)
        mask.copy_(torch.where(wide, best, mask))

    def _energy_kept(self, weight: WeightRef) -> float:
        energy = magnitude(weight.parameter.detach().double())
        total = float(energy.sum())
        mask = self._best_mask(weight, weight.parameter)
        return float(energy[mask].sum()) / total if total > 0 else 1.0


def _blocks(values: Tensor, pattern: Pattern) -> Tensor:
    """[N, C, ...] -> [N / B, B, C / m, m, taps], B being the channels that share a mask.

    Rows that fill up the last block are zero, or True of a mask.
    """
    block = pattern.together
    rows, channels = values.shape[:2]
    flat = values.reshape(rows, channels // pattern.m, pattern.m, -1)
    missing = -rows % block
    if missing:
        filler = torch.full_like(flat[:1], values.dtype == torch.bool)
        flat = torch.cat([flat, filler.expand(missing, *flat.shape[1:])])
    return flat.reshape(-1, block, *flat.shape[1:])
