"""`:function` in a recipe: one of the module that `model.torch` names.

So a recipe names its module once, and another one is one line away:

    model:
      torch: digits:model
      example: :example
    data:
      train: :train
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PLACES = (
    ("model", "example"),
    ("data", "train"),
    ("data", "calibrate"),
    ("data", "evaluate"),
    ("finetune", "loss"),
    ("qat", "loss"),
    ("metric",),
)


def with_own_module(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's fields, with the module written out; what cannot be is left for others to refuse.

    Args:
        plain: as the file has it; stays as it is.
    """
    found = {name: dict(v) if isinstance(v, dict) else v for name, v in plain.items()}
    model = found.get("model")
    named = model.get("torch") if isinstance(model, dict) else None
    if not isinstance(named, str) or not named.partition(":")[0]:
        return found
    for *section, name in _PLACES:
        holder = found.get(section[0]) if section else found
        value = holder.get(name) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and isinstance(value, str) and value.startswith(":"):
            holder[name] = named.partition(":")[0] + value
    return found
