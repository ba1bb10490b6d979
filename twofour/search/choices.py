"""A choice for a layer, and the words for it: `2:4 int8`, `dense f32`, `2:4/pair bf16`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from twofour.compiler.forms import F32, PRECISIONS, Form
from twofour.core.errors import InputError
from twofour.core.patterns import Pattern

DENSE = "dense"


@dataclass(frozen=True, order=True)
class Choice:
    """What a layer's weight is pruned to, and what it computes in.

    Attributes:
        pattern: such as "2:4"; "" for none.
        precision: "f32", "bf16" or "int8".
    """

    pattern: str = ""
    precision: str = F32

    def __str__(self) -> str:
        """In words."""
        return f"{self.pattern or DENSE} {self.precision}"

    @property
    def form(self) -> Form:
        """The form of a whole model in which every layer has this choice."""
        return Form(self.precision, self.pattern)

    @staticmethod
    def of(form: Form) -> Choice:
        """The inverse of `form`."""
        return Choice(form.pattern, form.precision)

    @staticmethod
    def parse(text: object, layer: str = "") -> Choice:
        """The inverse of `str`.

        Raises:
            InputError: it means nothing.
        """
        words = text.split() if isinstance(text, str) else []
        try:
            if len(words) == 2 and words[1] in PRECISIONS:
                pattern = "" if words[0] == DENSE else str(Pattern.parse(words[0]))
                return Choice(pattern, words[1])
        except InputError:
            pass
        raise InputError(
            f"bad choice {text!r}" + f" for layer {layer!r}" * bool(layer),
            [f"expected a pattern or {DENSE}, and one of {', '.join(PRECISIONS)}"],
            "write it like 2:4 int8, dense f32 or 2:4/pair bf16",
        )


BASELINE = Choice()


def parse_choices(texts: Mapping[str, str]) -> dict[str, Choice]:
    """Choices by the names of layers.

    Raises:
        InputError: one means nothing.
    """
    return {name: Choice.parse(text, name) for name, text in texts.items()}
