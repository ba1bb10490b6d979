"""The file that a fine-tuning run goes on from: plain data and tensors, never code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from twofour.core.errors import InputError
from twofour.train.calibration import bare
from twofour.train.schedule import Schedule

# A buffer beside a weight that only training from dense needs, such as `conv1.weight_dense`.
DENSE = "_dense"
_NEEDED = {"schedule", "history", "parts"}


@dataclass(frozen=True)
class Progress:
    """Where a fine-tuning run is.

    Args:
        epoch: counted from 0.
        batch: batches done in this epoch.
        batches: batches in this epoch.
        loss: mean training loss of this epoch so far.
        accuracy: share of training samples of this epoch that were right, 0 to 1; NaN where the
            loss knows no labels.
        evaluated: what `evaluate` said after this epoch; None where it was not asked.
    """

    epoch: int
    batch: int
    batches: int
    loss: float
    accuracy: float
    evaluated: float | None = None


class Stateful(Protocol):
    """What can be saved and go on: a model, an optimizer, a method."""

    def state_dict(self) -> Mapping[str, Any]:
        """Plain data and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Goes on from it."""


def save_run(
    path: Path, schedule: Schedule, history: list[Progress], parts: Mapping[str, Stateful]
) -> None:
    """Replaces the checkpoint; with several processes, the one of rank 0 does.

    Args:
        path: of the checkpoint; its folder is made.
        schedule: of the run.
        history: the last `Progress` of each finished epoch.
        parts: name -> what has a state; "model" is one of them.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    state = {
        "schedule": schedule.to_dict(),
        "history": [asdict(entry) for entry in history],
        "parts": {name: dict(part.state_dict()) for name, part in parts.items()},
    }
    torch.save(_plain(state), temporary)
    os.replace(temporary, path)


def resume_run(path: Path, schedule: Schedule, parts: Mapping[str, Stateful]) -> list[Progress]:
    """Loads all parts of a run.

    Args:
        path: of the checkpoint.
        schedule: that of this run.
        parts: as they were saved.

    Returns:
        The last `Progress` of each finished epoch.

    Raises:
        InputError: the file is damaged, or from another schedule, method or model.
    """
    state = _read(path)
    differ = schedule.differences(state["schedule"])
    if differ:
        raise InputError(f"{path} belongs to a run with another schedule", differ, _fix(path))
    there, here = set(state["parts"]), set(parts)
    if there != here:
        raise InputError(
            f"{path} belongs to another kind of run",
            [f"expected the states of {sorted(here)}; got those of {sorted(there)}"],
            _fix(path),
        )
    _require_same(path, parts["model"].state_dict(), state["parts"]["model"], _fix(path))
    try:
        # The model last: what refuses leaves it as it was.
        for name, part in reversed(list(parts.items())):
            part.load_state_dict(state["parts"][name])
        return [Progress(**entry) for entry in state["history"]]
    except (RuntimeError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path} belongs to another model", [str(e)], _fix(path)) from e


def load_checkpoint(path: Path | str, model: nn.Module) -> list[Progress]:
    """Loads the weights and masks that `finetune` saved: the average where it leaves that.

    Args:
        path: of the checkpoint.
        model: pruned as it was before the fine-tuning, so that it has buffers for the masks.

    Returns:
        The last `Progress` of each finished epoch.

    Raises:
        InputError: the file is missing, damaged, or from another model.
    """
    path = Path(path)
    state = _read(path)
    model = bare(model)
    try:
        values = dict(state["parts"]["model"])
        if "average" in state["parts"] and state["schedule"]["ema_stays"]:
            values.update(state["parts"]["average"]["values"])
        known = model.state_dict().keys()
        values = {n: v for n, v in values.items() if n in known or not n.endswith(DENSE)}
        fix = "build the model of that run, and make masks: Sparsifier(model, ...).prune()"
        _require_same(path, model.state_dict(), values, fix)
        model.load_state_dict(values)
        return [Progress(**entry) for entry in state["history"]]
    except (RuntimeError, KeyError, TypeError) as e:
        raise InputError(f"{path} belongs to another model", [str(e)], _fix(path)) from e


def _require_same(path: Path, here: Mapping[str, Any], there: Mapping[str, Any], fix: str) -> None:
    """Refuses the tensors of another model before any is loaded."""
    shapes = [
        {name: list(getattr(value, "shape", [])) for name, value in state.items()}
        for state in (here, there)
    ]
    names = shapes[0].keys() | shapes[1].keys()
    differ = [
        f"{name}: {shapes[1].get(name, 'not')} there, {shapes[0].get(name, 'not')} here"
        for name in sorted(names)
        if shapes[0].get(name) != shapes[1].get(name)
    ]
    if differ:
        raise InputError(f"{path} belongs to another model", differ, fix)


def _plain(value: Any) -> Any:
    """The same with numpy's numbers, such as a rate from `np.logspace`, as Python's.

    A file with others could not be read as plain data.
    """
    if isinstance(value, dict):
        return {_plain(key): _plain(held) for key, held in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(held) for held in value)
    return value.item() if isinstance(value, np.generic) else value


def _read(path: Path) -> dict[str, Any]:
    """The checkpoint as plain data and tensors."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = _NEEDED - set(state)
    except OSError as e:
        fix = "name the file that finetune writes or wrote"
        raise InputError(f"cannot read the fine-tuning checkpoint {path}", [str(e)], fix) from e
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError) as e:
        raise InputError(
            f"cannot read the fine-tuning checkpoint {path}", [str(e)], _fix(path)
        ) from e
    if missing:
        raise InputError(
            f"{path} is no fine-tuning checkpoint", [f"it has no {sorted(missing)}"], _fix(path)
        )
    return dict(state)


def _fix(path: Path) -> str:
    return f"delete {path} to start over, or name another checkpoint"
