"""The page of `twofour quantize`: how well each tensor is represented, the worst ones first."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from twofour.core.version import __version__
from twofour.report.charts import ending
from twofour.report.histograms import CELL_LETTERS, histogram, layer_bars, percent, tensor_row
from twofour.report.page import render, write_page

Document = Mapping[str, Any]
_WORST = 10


def write_quantize(document: Document, path: str | os.PathLike[str]) -> None:
    """Writes the page.

    Args:
        document: of `twofour quantize --json --report`.
        path: of the HTML file.

    Raises:
        InputError: it cannot be written.
    """
    write_page(path, quantize_page(document))


def quantize_page(document: Document) -> str:
    """The page as HTML."""
    quality = document["quality"]
    rows = [tensor_row(each) for each in quality["tensors"]]
    content = {
        "title": f"{document['model']}, quantized",
        "found": document,
        "quality": quality,
        "worst": [row for row in rows if row["db"] < math.inf][:_WORST],
        "rows": rows,
        "plots": [histogram(row) for row in rows if row["bins"] is not None],
        "bars": layer_bars(quality["layers"]) if quality["layers"] else None,
        "moved": [_moved(each) for each in quality["moved"]],
        "left": [
            each for each in (document["mixed"] or {"layers": []})["layers"] if each["is_float"]
        ],
        "version": __version__,
    }
    return render("quantize.html", content)


def _moved(each: Document) -> dict[str, Any]:
    shares = ("own", "own_by_more", "by_one", "by_more")
    return {
        **each,
        "shown": ending(each["name"], CELL_LETTERS),
        "shares": [(each[name], percent(each[name] / each["values"])) for name in shares],
    }
