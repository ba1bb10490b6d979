"""A model between the stages of a pipeline: one safetensors file, tensors and plain text, no code.

    header    metadata "twofour": JSON, the fields of `Facts`
    tensors   the model's state_dict: weights, statistics, masks (`conv1.weight_mask`), scales

A file is read into a model that was built anew. Its masks are compared with the hashes in the
header and with their patterns, and its weights with the masks.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from twofour.core.errors import GateError, InputError
from twofour.core.records import from_plain, to_plain
from twofour.train import holding
from twofour.train.calibration import bare
from twofour.train.quantize import Quantizer
from twofour.train.quantize_plan import QuantizerOptions
from twofour.train.sparsify import Sparsifier

_KEY = "twofour"
_NESTED = ("state_dict", "model_state_dict", "model")
_COUNTER = "num_batches_tracked"  # of BatchNorm; older checkpoints lack it


@dataclass(frozen=True)
class Order:
    """The order that `permute` gave to channels: with the same options it gives it again.

    Attributes:
        pattern: of the weights.
        include: see `permute`.
        exclude: likewise.
        seed: of its search.
        digest: of the dense parameters in that order.
    """

    pattern: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    seed: int
    digest: str


@dataclass(frozen=True)
class Facts:
    """What a file says of its tensors.

    Attributes:
        patterns: name of each pruned weight -> its pattern.
        masks: name of each pruned weight -> hash of its mask.
        order: of channels; None for the user's own.
        quantizer: options of the Quantizer whose scales are here; None without one.
    """

    patterns: dict[str, str] = field(default_factory=dict)
    masks: dict[str, str] = field(default_factory=dict)
    order: Order | None = None
    quantizer: QuantizerOptions | None = None


def facts_of(sparsifier: Sparsifier | None, order: Order | None = None) -> Facts:
    """What is true of a model with these masks, or without any.

    Args:
        sparsifier: has pruned.
        order: of the model's channels.
    """
    if sparsifier is None:
        return Facts(order=order)
    masks = {w.name: holding.digest(w.mask) for w in sparsifier.weights if w.mask is not None}
    patterns = {name: str(sparsifier.patterns[name]) for name in masks}
    return Facts(patterns, masks, order)


def digest_of(model: nn.Module) -> str:
    """A hash of a model's parameters, in their order."""
    hashed = hashlib.sha256()
    for parameter in model.parameters():
        array = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        hashed.update(array.numpy().data)
    return hashed.hexdigest()


def save_state(state: Mapping[str, Any], facts: Facts, path: Path) -> None:
    """Writes a file, whole or not at all.

    Args:
        state: of a model, as `state_dict` gives it.
        facts: of it.
        path: of the file; replaced.

    Raises:
        InputError: the state holds something that is no tensor.
        OSError: the file cannot be written.
    """
    foreign = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise InputError(
            "cannot save the model",
            [f"expected tensors in its state, got others: {', '.join(foreign[:5])}"],
            "keep what get_extra_state() returns in buffers",
        )
    # One entry, not several: their order in the file would not be the same each time.
    header = {_KEY: json.dumps(to_plain(facts), sort_keys=True)}
    _save({name: value.detach().cpu() for name, value in state.items()}, header, path)


def save_masks(sparsifier: Sparsifier, path: Path) -> None:
    """Writes the masks alone: bool, by name of the weight; the header has patterns and hashes."""
    facts = facts_of(sparsifier)
    masks = {w.name: w.mask.cpu() for w in sparsifier.weights if w.mask is not None}
    header = {"patterns": facts.patterns, "masks": facts.masks}
    _save(masks, {_KEY: json.dumps(header, sort_keys=True)}, path)


def read_facts(path: Path) -> Facts:
    """What a file says of its tensors.

    Raises:
        InputError: it is missing, damaged, or no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {})[_KEY]
        return _facts(json.loads(text))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as e:
        raise _unreadable(path, e) from e


def load_state(model: nn.Module, path: Path, example_inputs: Any) -> Sparsifier | None:
    """Puts a file's tensors into a model that was just built.

    Args:
        model: as the user's function made it; gets masks and quantizers if the file has them.
        path: of the file.
        example_inputs: of the model, for the places of quantizers.

    Returns:
        What holds the masks, locked; None where there are none.

    Raises:
        InputError: the file is missing or damaged, or of another model.
        GateError: a mask is not the one that was saved, or a weight left its mask or pattern.
    """
    facts, state = read_facts(path), _tensors(path)
    if facts.quantizer is not None:
        Quantizer(model, example_inputs, facts.quantizer)
    if not facts.patterns:
        put_state(model, state, path)
        return None
    sparsifier = Sparsifier(model, facts.patterns, include=list(facts.patterns))
    sparsifier.restore(state)
    changed = [n for n, found in facts_of(sparsifier).masks.items() if facts.masks.get(n) != found]
    if changed:
        raise GateError(
            f"{path} holds other masks than were saved there",
            [f"changed: {', '.join(changed)}"],
            "run the stage that made it again",
        )
    sparsifier.verify()
    sparsifier.lock()
    return sparsifier


def require_masks(sparsifier: Sparsifier, path: Path) -> None:
    """Compares a model's masks with those that `save_masks` wrote.

    Args:
        sparsifier: holds the model's.
        path: of the file.

    Raises:
        GateError: a mask is missing, too many, or another one.
        InputError: the file is missing or damaged.
    """
    kept = _tensors(path)
    held = {w.name: w.mask.cpu() for w in sparsifier.weights if w.mask is not None}
    differ = [
        name
        for name in sorted({*kept, *held})
        if name not in kept or name not in held or not torch.equal(kept[name], held[name])
    ]
    if differ:
        raise GateError(
            f"the model's masks are not those of {path.name}",
            [f"differ: {', '.join(differ[:8])}" + (", ..." if len(differ) > 8 else "")],
            "run the recipe again from the stage sparsify",
        )


def put_state(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Loads tensors into a model, all of them, each of the right shape.

    Args:
        model: has the names of the state, wrapped or not.
        state: name -> tensor; counters of BatchNorm may be missing.
        path: where it comes from, for messages.

    Raises:
        InputError: a tensor is missing, too many, or of another shape.
    """
    model = bare(model)
    try:
        missing, unknown = model.load_state_dict(dict(state), strict=False)
    except RuntimeError as e:  # sizes differ
        reasons = [line.strip() for line in str(e).splitlines()[1:]]
        raise InputError(f"{path} is of another model", reasons, _FIX_MODEL) from e
    reasons = [f"missing: {name}" for name in missing if not name.endswith(_COUNTER)]
    reasons += [f"not in the model: {name}" for name in unknown]
    if reasons:
        shown = [*reasons[:8], *([f"and {len(reasons) - 8} more"] if len(reasons) > 8 else [])]
        raise InputError(f"{path} is of another model", shown, _FIX_MODEL)


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads the user's checkpoint: safetensors, or what `torch.save(model.state_dict())` wrote.

    Nothing of the file is executed: of a pickle only tensors and plain data are read.

    Args:
        model: gets the weights.
        path: of the checkpoint; its tensors may stand under `state_dict` or `model`, and their
            names may begin with `module.`.

    Raises:
        InputError: no such file, it holds something else, or the weights of another model.
    """
    state = _tensors(path) if path.suffix == ".safetensors" else _unpickled(path)
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    put_state(model, state, path)


_FIX_MODEL = "give the weights of the model that `model.torch` makes"
_FIX_PICKLE = "save the weights alone: torch.save(model.state_dict(), 'model.pt'), or safetensors"


def _unpickled(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise InputError(f"cannot read the checkpoint {path}", [str(e)], "check the path") from e
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError) as e:
        first = next(iter(str(e).splitlines()), type(e).__name__)
        reasons = ["expected tensors and plain data; nothing else was read or run", first]
        raise InputError(f"cannot read the checkpoint {path}", reasons, _FIX_PICKLE) from e
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not any(isinstance(v, Tensor) for v in found.values()):
        got = f"expected a mapping of names to tensors, got a {type(found).__name__}"
        raise InputError(f"the checkpoint {path} holds no weights", [got], _FIX_PICKLE)
    return {str(name): value for name, value in found.items()}


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as e:
        raise _unreadable(path, e) from e
    return tensors


def _save(tensors: Mapping[str, Tensor], header: dict[str, str], path: Path) -> None:
    """Each tensor by itself: the format has no shared ones."""
    temporary = path.with_name(path.name + ".part")
    apart = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    try:
        save_file(apart, temporary, header)
        os.replace(temporary, path)
    except SafetensorError as e:  # it tells of a full disk so
        raise OSError(f"cannot write {path}: {e}") from e
    finally:
        temporary.unlink(missing_ok=True)


def _facts(plain: dict[str, Any]) -> Facts:
    """What the header says, each field's type checked."""
    options = plain.pop("quantizer", None)
    found = from_plain(_Plain, plain, "metadata")
    if options is not None:
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        options = QuantizerOptions(**options)
    return Facts(found.patterns, found.masks, found.order, options)


@dataclass(frozen=True)
class _Plain:
    """`Facts` without what checks itself."""

    patterns: dict[str, str]
    masks: dict[str, str]
    order: Order | None


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"cannot read the weights {path}",
        [f"{type(error).__name__}: {error}"],
        "give a whole safetensors file; one that a stage wrote is made again by that stage",
    )
