"""Which of a version's engines runs here: the plans decide, before any machine code is read.

Of several that run here, the first is tried first:
1. the one whose target names the most features of this CPU: `avx512vnni` before `avx2` before
   `vector`, and with bfloat16 before without;
2. of these, one that was tuned on this very model of CPU: its times are true here;
3. then by name, so that the choice is the same every time.
One that turns out to be damaged is passed over, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from twofour.core.errors import Error
from twofour.core.target import Target, check_runs_here, detect_host
from twofour.engine import Engine, read_plan


@dataclass(frozen=True)
class Choice:
    """The engines of a version, judged by their targets.

    Attributes:
        fits: names of those that run here, the best first.
        refused: name -> why not, in one line.
    """

    fits: tuple[str, ...]
    refused: Mapping[str, str]


@dataclass(frozen=True)
class Picked:
    """An engine for this machine.

    Attributes:
        engine: read and checked; None where none can be used.
        name: of its file; "" where there is none.
        refused: why others were not taken that should have come before it, one line each.
    """

    engine: Engine | None
    name: str
    refused: tuple[str, ...]


def choose(targets: Mapping[str, Target]) -> Choice:
    """Ranks engines by what they were built for.

    Args:
        targets: of each file, by name.
    """
    here = detect_host()
    refused = {}
    for name, target in targets.items():
        try:
            check_runs_here(target)
        except Error as e:
            refused[name] = one_line(e)

    def rank(name: str) -> tuple[bool, int, bool, str]:
        target = targets[name]
        on_cpu = not target.on_gpu  # a GPU that is here is here to be used
        return on_cpu, -len(target.features), target.model != here.model, name

    return Choice(tuple(sorted(targets.keys() - refused.keys(), key=rank)), refused)


def judge(folder: Path, names: tuple[str, ...]) -> Choice:
    """Ranks engine files; reads their plans alone.

    Args:
        folder: where they are.
        names: of the files.
    """
    targets, unreadable = {}, {}
    for name in names:
        try:
            targets[name] = read_plan(folder / name).target
        except Error as e:
            unreadable[name] = one_line(e)
    choice = choose(targets)
    return Choice(choice.fits, unreadable | dict(choice.refused))


def pick(folder: Path, names: tuple[str, ...]) -> Picked:
    """Reads the engine that fits this machine best; damaged ones are passed over.

    Args:
        folder: where they are.
        names: of the files.
    """
    choice = judge(folder, names)
    refused = [f"{name}: {reason}" for name, reason in sorted(choice.refused.items())]
    for name in choice.fits:
        try:
            return Picked(Engine.load(folder / name), name, tuple(refused))
        except Error as e:
            refused.append(f"{name}: {one_line(e)}")
    return Picked(None, "", tuple(refused))


def one_line(error: Error) -> str:
    """An error's message as one of several reasons: what, and why."""
    return "; ".join([error.what, *error.reasons]).replace("\n", " ")
