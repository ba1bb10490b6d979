"""JSON that is not trusted: its size and depth are known before it is read.

Source: RFC 8259. NaN and Infinity are not JSON and are refused.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import orjson

from twofour.serve.errors import MalformedError, TooLargeError
from twofour.serve.limits import Limits

# A text, or what begins as one and never ends; possessive, so that time is linear in its size.
TEXT = re.compile(rb'"[^"\\]*+(?:\\.?[^"\\]*+)*+(?:"|\Z)', re.DOTALL)
NUMBERS_BEYOND_JSON = re.compile(rb"[\[:,\s]-?(?:NaN|Infinity)\b")


def depth(text: bytes) -> int:
    """How many lists and objects of a JSON document are open at once, at most.

    Args:
        text: any bytes; of what is not JSON the result is of no meaning.
    """
    bare = np.frombuffer(TEXT.sub(b"", text), np.uint8)
    # "[" and "{" differ in one bit, as "]" and "}" do; no other character has the same others.
    folded = bare & 0xDF
    steps = (folded == 0x5B).astype(np.int8) - (folded == 0x5D).astype(np.int8)
    return int(np.cumsum(steps, dtype=np.int64).max(initial=0))


def parse(text: bytes, limits: Limits) -> Any:
    """The values of a JSON document.

    Raises:
        TooLargeError: it is longer or deeper than the limits.
        MalformedError: it is not JSON.
    """
    if len(text) > limits.json_bytes:
        raise TooLargeError(
            "the JSON of the body is too large",
            [f"expected at most {limits.json_bytes} bytes", f"got {len(text)}"],
            "send the tensors as binary data behind the JSON",
        )
    if text.count(b"[") + text.count(b"{") > limits.json_depth:
        found = depth(text)
        if found > limits.json_depth:
            raise TooLargeError(
                "the JSON of the body is nested too deeply",
                [f"expected at most {limits.json_depth} levels", f"got {found}"],
                "send data as one flat list, or as nested lists of the tensor's shape",
            )
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise not_json(text, error) from error


def not_json(text: bytes, error: orjson.JSONDecodeError) -> MalformedError:
    """The refusal of a text that the parser did not take."""
    fix = "send a JSON object of the Open Inference Protocol, version 2"
    if NUMBERS_BEYOND_JSON.search(text):
        fix = "JSON has no NaN and no Infinity: send the tensor as binary data"
    elif b"\x00" in text:
        fix = (
            "give the length of the JSON in the header Inference-Header-Content-Length "
            "where binary data follows it"
        )
    where = f"{error.msg}, at line {error.lineno}, column {error.colno}"
    return MalformedError("the body is not JSON", ["expected a JSON object", f"got {where}"], fix)
