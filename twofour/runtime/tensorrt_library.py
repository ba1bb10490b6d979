"""The one place where TensorRT is imported: which there is, and what its own classes are made into.

    library = find_library(TensorRT())
    logger = implement(library.module.ILogger, log=write)

It is imported when it is needed and not before: engines for a CPU never load it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from twofour.core.errors import UnsupportedError
from twofour.core.plugins import Operator, package_of
from twofour.core.tensorrt import TITLES, Installed, TensorRT, how_to_get, installed

_MOST_LINES = 4000
_SERIOUS = ("INTERNAL_ERROR", "ERROR", "WARNING")
_SHOWN = 4
_REGISTERED: set[tuple[str, str, str]] = set()
"""Library, domain and name of operators whose plugins this process has."""


@dataclass(frozen=True, eq=False)
class Library:
    """A TensorRT that is loaded.

    Attributes:
        name: "tensorrt" or "tensorrt_rtx".
        module: its Python module.
        version: as it gives it: "10.9.0.34".
    """

    name: str
    module: Any
    version: str

    @property
    def title(self) -> str:
        """For people."""
        return f"{TITLES[self.name]} {self.version}"


def find_library(wanted: TensorRT) -> Library:
    """Imports the TensorRT that is asked for; the preferred one where none is named.

    Raises:
        UnsupportedError: it is not installed, or cannot be loaded; says how to get it.
    """
    found = [each for each in installed() if wanted.library in ("", each.library)]
    if not found:
        what = TITLES.get(wanted.library, "TensorRT")
        others = [TITLES[each.library] for each in installed()]
        raise UnsupportedError(
            f"{what} is not installed",
            [f"the target {wanted} needs it", *(f"{name} is here" for name in others)],
            how_to_get(wanted),
        )
    return _imported(found[0])


def _imported(found: Installed) -> Library:
    try:
        module = importlib.import_module(found.module)
    except (ImportError, OSError) as error:
        raise UnsupportedError(
            f"{TITLES[found.library]} cannot be loaded",
            [f"import {found.module}: {error}"],
            "install its libraries for the CUDA version of this machine's driver",
        ) from error
    return Library(found.library, module, str(module.__version__))


def register(library: Library, operators: Iterable[Operator]) -> None:
    """Lets packages register the plugins of TensorRT that compute their operators, once each.

    Raises:
        UnsupportedError: a package fails at it.
    """
    for operator in operators:
        key = library.name, operator.domain, operator.name
        if key in _REGISTERED:
            continue
        for tactic in operator.tensorrt:
            try:
                tactic(library.module)
            except Exception as error:
                raise UnsupportedError(
                    f"the plugin of {library.title} for {operator} cannot be registered",
                    [f"{type(error).__name__}: {error}"],
                    f"see the package {package_of(operator)}",
                ) from error
        _REGISTERED.add(key)


def implement(base: Any, **methods: Callable[..., Any]) -> Any:
    """An object of a class of TensorRT whose methods are these functions.

    Args:
        base: a class that is meant to be derived from.
        **methods: by name; they get the arguments without the object.
    """

    def start(self: Any) -> None:
        base.__init__(self)

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Any, *arguments: Any) -> Any:
            return function(*arguments)

        return method

    body = {"__init__": start} | {name: bound(function) for name, function in methods.items()}
    return type(f"Own{base.__name__}", (base,), body)()


class Log:
    """What TensorRT says, kept until somebody asks.

    Attributes:
        logger: to give to TensorRT.
        lines: level by name and text, the newest last.
    """

    def __init__(self, library: Library) -> None:
        """Makes the logger."""
        self.lines: list[tuple[str, str]] = []
        self.logger = implement(library.module.ILogger, log=self._write)

    def _write(self, severity: Any, text: str) -> None:
        self.lines.append((str(severity).rpartition(".")[2], text))
        if len(self.lines) > _MOST_LINES:
            kept = [line for line in self.lines if line[0] in _SERIOUS or _is_summary(line[1])]
            self.lines = kept[-_MOST_LINES // 2 :]

    def problems(self) -> list[str]:
        """The last errors, else the last warnings, for a message."""
        for levels in (_SERIOUS[:2], _SERIOUS[2:]):
            found = [_first_line(text) for level, text in self.lines if level in levels]
            if found:
                return list(dict.fromkeys(found))[-_SHOWN:]
        return []


def _is_summary(text: str) -> bool:
    """Whether a line is one that later code looks for."""
    return text.startswith(("Layers:", "(Sparsity)"))


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""
