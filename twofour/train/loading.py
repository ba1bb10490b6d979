"""Brings the masks of a checkpoint into a model that was never pruned itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from twofour.core.errors import InputError
from twofour.train import holding
from twofour.train.layers import WeightRef, plain_name

_WRAPPER = "module."


def masks_in(
    state_dict: Mapping[str, Any], model: nn.Module, weights: Sequence[WeightRef]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Finds the masks of a checkpoint.

    Args:
        state_dict: of a pruned model, wrapped in the same way or not.
        model: to be loaded.
        weights: those of the model that can have masks.

    Returns:
        The checkpoint with the names of the model inside all wrappers, and its masks by the names
        of their weights.

    Raises:
        InputError: it has no masks, or one of a weight that is not among these.
    """
    own = {plain_name(key, model) for key in model.state_dict()}
    wrapped = all(key.startswith(_WRAPPER) for key in state_dict)
    if wrapped and not any(key.startswith(_WRAPPER) for key in own):
        state_dict = {key.removeprefix(_WRAPPER): value for key, value in state_dict.items()}
    state = {plain_name(key, model): value for key, value in state_dict.items()}
    paths: dict[nn.Module, list[str]] = {}  # several, if a module is used in several places
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(plain_name(path, model))
    keys = {w.name: [f"{p}.{w.mask_name}".lstrip(".") for p in paths[w.module]] for w in weights}
    known = own.union(*keys.values())
    unknown = [
        f"{key} is of no weight that this Sparsifier prunes"
        for key in state
        if key.endswith("_mask") and key not in known
    ]
    masks = {name: state[first] for name, (first, *_) in keys.items() if first in state}
    if unknown or not masks:
        raise InputError(
            "the checkpoint has not the masks of this model",
            unknown or [f"expected {next(iter(keys.values()))[0]} and the like, got no mask"],
            "make the model and the Sparsifier as they were when it was saved; what finetune saved "
            "is loaded by load_checkpoint",
        )
    return state, masks


def load(
    model: nn.Module,
    weights: Sequence[WeightRef],
    state: Mapping[str, Any],
    masks: Mapping[str, Tensor],
) -> None:
    """Makes the buffers of the masks, then loads everything.

    Args:
        model: to be loaded.
        weights: those that can have masks.
        state: as `masks_in` returned it.
        masks: likewise, checked.

    Raises:
        InputError: a tensor is missing, too many, or of another shape. The masks are then as they
            were, and the weights those of the checkpoint as far as they fit.
    """
    chosen = [weight for weight in weights if weight.name in masks]
    before = {w: None if w.mask is None else w.mask.clone() for w in chosen}
    for weight in chosen:
        holding.set_mask(weight, masks[weight.name])
    keys = {plain_name(key, model): key for key in model.state_dict()}
    try:
        model.load_state_dict({keys.get(key, key): value for key, value in state.items()})
    except RuntimeError as e:
        for weight, mask in before.items():
            if mask is None:
                holding.drop_mask(weight)
            else:
                holding.set_mask(weight, mask)
        raise InputError("the checkpoint is from another model", [str(e)]) from e
