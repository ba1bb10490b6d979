"""How fast this machine computes at the moment: a fixed loop that takes its turn in a race.

A network's time in two runs differs by what changed in it, and by what changed around it: another
clock, a neighbour. The loop is multiply-adds in registers and nothing else, the same in every run,
so its own time tells the two apart (`regression.py`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from twofour.bench.timing import Contestant
from twofour.compiler.peak import multiply_adds
from twofour.core.memory import address, allocate
from twofour.core.target import host_target
from twofour.core.version import __version__
from twofour.kernels.cpu.llvm import Source, compile_object, module_text
from twofour.runtime.cpu import Code

_FAMILY, _REPEATS, _SHARE = "float32 dense", 200, 0.1


@dataclass(frozen=True)
class Gauge:
    """The loop, ready to run.

    Attributes:
        contestant: for a race; its turns are short.
        sha256: of the loop's code: times of another loop are not comparable.
    """

    contestant: Contestant
    sha256: str


class _Loop:
    """A call of the loop; holds its code and memory."""

    def __init__(self, text: str, symbol: str) -> None:
        self._code = Code([compile_object([Source(text)], host_target())])
        self._kernel = self._code.kernel(symbol)
        self._memory = allocate(1 << 14)  # page-aligned zeros: the time does not depend on values

    def __call__(self) -> None:
        at = address(self._memory)
        self._kernel(at, at, at, at, 0, _REPEATS, 0, 0)


def gauge() -> Gauge:
    """Makes the loop for this machine; one call takes about 50 us."""
    function = multiply_adds(_FAMILY, 0, host_target().isa)
    text = module_text([function])
    setting = f"{_FAMILY} multiply-adds in registers, {_REPEATS} times"
    loop = _Loop(text, function.name)
    contestant = Contestant("gauge", __version__, setting, loop, dict, share=_SHARE)
    return Gauge(contestant, hashlib.sha256(f"{text} {_REPEATS}".encode()).hexdigest())
