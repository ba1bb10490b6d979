"""Sees which PyTorch functions a model calls, and where.

A function is known by its site, which is the same in each run: the path of the module that called
it, which call of that module, the function's name, and the how many-th of that name it is there
(`layer1.0/add`, `layer1.0/relu_1`, `head#1/linear`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Place = tuple[int | str, ...]
"""Where an argument stands: (0,) or (0, 2), counted from 0, or ("weight",)."""


@dataclass(frozen=True)
class Site:
    """One call of a function in a model's forward.

    Attributes:
        path: of the module that calls, in the model; "" for the model itself.
        call: how many calls of that module came before in the run.
        function: its name, without the underscores of its in-place form.
        index: how many of that name came before in this call of the module.
    """

    path: str
    call: int
    function: str
    index: int

    def __str__(self) -> str:
        """`layer1.0/add`, with numbers where they are not 0."""
        owner = self.path + (f"#{self.call}" if self.call else "")
        name = self.function + (f"_{self.index}" if self.index else "")
        return f"{owner}/{name}".lstrip("/")


class Watcher(Protocol):
    """Is given each function that is called instead of it."""

    def called(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], watch: Watch
    ) -> Any:
        """What the function is to give; inside `with watch` this is asked again."""


class Watch(TorchFunctionMode):
    """Lets a watcher see the PyTorch functions that are called inside.

    torch.compile does not follow it: what is inside runs as without torch.compile.
    """

    def __init__(self, watcher: Watcher) -> None:
        """Inside `with`, and in this thread, the watcher is asked."""
        super().__init__()
        self.watcher = watcher

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called by PyTorch for each function."""
        return self.watcher.called(func, args, kwargs or {}, self)


class Frames:
    """Knows which site each function is called at.

    Attributes:
        calls: path -> how often that module was called so far.
        path: of the module that runs; None outside all.
        last: of the module that this one called last; "" before the first.
    """

    def __init__(self) -> None:
        """Outside all modules."""
        self.calls: dict[str, int] = {}
        self.path: str | None = None
        self.last = ""
        self._call = 0
        self._counts: dict[str, int] = {}
        self._around: list[tuple[str | None, str, int, dict[str, int]]] = []

    def begin(self, path: str) -> None:
        """A module begins."""
        self._around.append((self.path, path, self._call, self._counts))
        self.path, self.last, self._call, self._counts = path, "", self.calls.get(path, 0), {}
        self.calls[path] = self._call + 1

    def end(self) -> None:
        """The module ends."""
        self.path, self.last, self._call, self._counts = self._around.pop()

    def next_site(self, name: str) -> Site | None:
        """Of a function that is called now; None outside all modules."""
        if self.path is None:
            return None
        index = self._counts.get(name, 0)
        self._counts[name] = index + 1
        return Site(self.path, self._call, name, index)


def modules_that_call(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the model and all in it but containers, which call no functions."""
    for path, module in model.named_modules():
        plain = type(module).forward in (nn.Sequential.forward, nn.Module.forward)
        if not path or not plain:
            yield path, module


def name_of(function: Callable[..., Any]) -> str:
    """`add` for `Tensor.add_`; `T` for the property."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", "")
    return name.strip("_")
