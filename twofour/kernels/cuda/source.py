"""Kernels of Triton whose text is generated, as functions that `triton.jit` can read.

Triton reads the source of a function from the file it stands in. A generated one stands in none, so
its text is entered into `linecache` under a name that only its own text gives.
"""

from __future__ import annotations

import hashlib
import linecache
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

_MOST = 4096


@lru_cache(maxsize=_MOST)
def function_of(text: str, name: str) -> Any:
    """The kernel in a text; the same one for the same text.

    Args:
        text: a function of Triton without decorators; it uses `tl` and its parameters alone.
        name: of the function in it.
    """
    file = f"<twofour {name} {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    scope = {"tl": tl, "__name__": __name__}
    exec(compile(text, file, "exec"), scope)
    return triton.jit(scope[name])
