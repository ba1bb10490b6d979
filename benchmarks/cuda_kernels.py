"""Writes `cuda_kernels.md` and `.json`: products with a 2:4 weight against dense ones, on a GPU.

    python -m benchmarks.cuda_kernels --output benchmarks
    python -m benchmarks.cuda_kernels --sizes 1024,4096 --families bert-base --output try
    python -m benchmarks.cuda_kernels --add try/cuda_kernels.json --output benchmarks

Both are NVIDIA's: 2:4 by cuSPARSELt, dense by cuBLASLt, each by the fastest of the algorithms that
its library has for the product (cuSPARSELt's but those that break, as many as `--algorithms` says;
those that cuBLASLt proposes, of fp8 with sums of all and of fewer bits). Two rounds find it: all
once, the best few several times. Then the two winners are recorded in CUDA graphs of at least 300
us and replayed in turns; the times are medians. Numbers are random (zeros would need less power,
and so run faster): int8 even in +-100, fp16 and fp8 normal. Both compute with the same weight, and
what they wrote is compared.

Our own 2:4 kernel (docs/cuda.md) is the fastest of the eight tiles it deems best; its time is of
another random weight, packed as it wants it. It takes turns with the other two.

y is of x's type, of fp8 bfloat16. The last column has y of int32. Rows that cuSPARSELt does
not take are filled up to 16 (8 of fp16); dense has the rows as they are. The operands of a product
stay in the L2 cache between replays where they fit, for both.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cuda.products import KINDS, SQUARE, Cell, Layer, families, measure, squares
from benchmarks.cuda.roof import Roof, measured_roofs, roof_lines
from benchmarks.document import about, head, noted, write
from twofour.runtime.cuda.device import open_device
from twofour.runtime.cuda.libraries import versions

ROOT = Path(__file__).resolve().parent
NAME, TITLE = "cuda_kernels", "2:4 against dense products on a GPU"
SIZES = (4096, 8192, 16384, 2048, 1024)
PUBLISHED = {4096: 1.28, 8192: 1.71, 16384: 1.79}
"""INT8 ratios on an H100, as published."""
PAYS = 1.05
_UNIT = "Microseconds dense / 2:4, and their ratio."


def pair(cell: Cell | None) -> str:
    """Both times and their ratio."""
    if cell is None or cell.problem:
        return "-"
    return f"{cell.dense_us:.1f} / {cell.sparse_us:.1f}, {times(cell.ratio)}"


def times(ratio: float) -> str:
    """A ratio, marked where it pays."""
    mark = "**" if ratio >= PAYS else ""
    return f"{mark}{ratio:.2f}x{mark}"


def rates(cell: Cell | None) -> str:
    """10^12 operations a second: dense, cuSPARSELt's, this package's."""
    if cell is None or cell.problem:
        return "-"
    found = [cell.tops(us) for us in (cell.dense_us, cell.sparse_us, cell.own_us)]
    return " / ".join(f"{each:.0f}" for each in found if not math.isnan(each))


def own_pair(cell: Cell | None) -> str:
    """This package's 2:4 kernel: its time, and dense over it."""
    if cell is None or cell.problem or math.isnan(cell.own_us):
        return "-"
    return f"{cell.own_us:.1f}, {times(cell.own_ratio)}"


def square_tables(cells: list[Cell]) -> Iterator[str]:
    """Products of equal sizes."""
    found = {(cell.layer.m, cell.kind): cell for cell in cells}
    sizes = sorted({cell.layer.m for cell in cells})

    def table(*more: str) -> list[str]:
        cols = ("M = N = K", *KINDS, *more)
        return [f"| {' | '.join(cols)} |", f"| {' | '.join(['--:'] * len(cols))} |"]

    def row(size: int, show: Callable[[Cell | None], str], *more: str) -> str:
        return f"| {' | '.join((str(size), *(show(found.get((size, k))) for k in KINDS), *more))} |"

    yield from ("## Products of equal sizes", "", _UNIT, "", *table("published INT8, H100"))
    for size in sizes:
        yield row(size, pair, f"{PUBLISHED[size]:.2f}x" if size in PUBLISHED else "")
    yield from ("", "This package's 2:4 kernel: microseconds, and dense over it.", "", *table())
    yield from (row(size, own_pair) for size in sizes)
    yield from ("", "10^12 operations a second, the zeros counted: dense / 2:4 / our 2:4.", "")
    yield from (*table(), *(row(size, rates) for size in sizes))
    yield from own_tiles(cells)


def own_tiles(cells: list[Cell]) -> Iterator[str]:
    """What each tile of this package's kernel takes."""
    if any(cell.own_tiles for cell in cells):
        yield from ("", "Tiles of this package's kernel, microseconds.", "")
    for cell in cells:
        found = sorted(cell.own_tiles.items(), key=lambda each: each[1])
        if found:
            told = "; ".join(f"{tile} {us:.1f}" for tile, us in found)
            yield f"- {cell.layer.name}, {cell.kind}: {told}"


def layer_tables(cells: list[Cell]) -> Iterator[str]:
    """Layers of networks, a table each."""
    for family in dict.fromkeys(cell.layer.family for cell in cells):
        own = [cell for cell in cells if cell.layer.family == family]
        kinds = [kind for kind in KINDS if any(cell.kind == kind for cell in own)]
        found = {(cell.layer, cell.kind): cell for cell in own}
        yield from ("", f"## {family}", "", _UNIT, "")
        yield "| layer | K | N | rows M | " + " | ".join(kinds) + " |"
        yield "| --- | --: | --: | --: |" + " --: |" * len(kinds)
        for layer in dict.fromkeys(cell.layer for cell in own):
            cols = " | ".join(pair(found.get((layer, kind))) for kind in kinds)
            yield f"| {layer.name} | {layer.k} | {layer.n} | {layer.m} | {cols} |"
        for kind in kinds:
            good = [cell for cell in own if cell.kind == kind and not cell.problem]
            pays = [cell for cell in good if cell.ratio >= PAYS]
            if good:
                mean = math.exp(sum(math.log(cell.ratio) for cell in good) / len(good))
                yield ""
                yield (
                    f"{kind}: 2:4 pays ({PAYS}x or more) in {len(pays)} of {len(good)}; "
                    f"geometric mean {mean:.2f}x."
                )


def report(document: dict[str, Any], cells: list[Cell], roofs: Sequence[Roof] = ()) -> str:
    """The page."""
    lines = [*head(document), f"Measured in {document['time_s']} s.", ""]
    lines += noted(document)
    lines += square_tables([cell for cell in cells if cell.layer.family == SQUARE])
    lines += ["", *roof_lines(roofs)]
    lines += layer_tables([cell for cell in cells if cell.layer.family != SQUARE])
    lines += ["", "## How", "", (__doc__ or "").split("\n\n", 2)[2].strip()]
    wrong = [cell for cell in cells if cell.problem]
    if wrong:
        lines += ["", "## Without a figure", ""]
        lines += [f"- {each.layer}, {each.kind}: {each.problem[:300]}" for each in wrong]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    made.add_argument("--output", type=Path, default=ROOT, help="where the files are written")
    made.add_argument("--sizes", default=",".join(map(str, SIZES)))
    made.add_argument("--families", default=",".join(families()))
    made.add_argument("--kinds", default=",".join(KINDS))
    made.add_argument("--seconds", type=float, default=100.0, help="no new product after that")
    made.add_argument("--algorithms", type=int, default=200, help="of cuSPARSELt, at most")
    made.add_argument("--add", type=Path, metavar="FILE", help="measure nothing, join this table")
    return made


def main() -> int:
    """Measures and writes."""
    chosen = parser().parse_args()
    return add(chosen.output, chosen.add) if chosen.add else run(chosen)


def add(folder: Path, path: Path) -> int:
    """Joins a table to the one that is there; what both have is taken from it."""
    made, before = json.loads(path.read_text()), {}
    old = folder / f"{NAME}.json"
    if old.is_file():
        before = json.loads(old.read_text())
    held = {_key(cell): cell for cell in (*before.get("cells", ()), *made["cells"]) if _told(cell)}
    roofs = {each["kind"]: each for each in (*before.get("roofs", ()), *made.get("roofs", ()))}
    made["cells"], made["roofs"] = list(held.values()), list(roofs.values())
    made["time_s"] += before.get("time_s", 0)
    cells = [_cell(each) for each in made["cells"]]
    found = [Roof(**each) for each in made["roofs"]]
    write(folder, NAME, made, report(made, cells, found))
    return 0


def _told(cell: dict[str, Any]) -> bool:
    """Whether it says anything: one that no time was left for may be there from before."""
    return bool(cell["problem"] != "the time was over")


def _key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return (*cell["layer"].values(), cell["kind"])


def _cell(held: dict[str, Any]) -> Cell:
    filled = {key: math.nan if value is None else value for key, value in held.items()}
    return Cell(**{**filled, "layer": Layer(**held["layer"])})


def run(chosen: argparse.Namespace) -> int:
    """Measures, and writes after each product."""
    begin = time.monotonic()
    end_s = begin + chosen.seconds
    device = open_device(0)
    cells: list[Cell] = []
    kinds = [kind for kind in KINDS if kind in chosen.kinds.split(",")]
    sizes = tuple(int(size) for size in chosen.sizes.split(",") if size)
    work = [(squares(sizes), kinds, begin + 0.6 * chosen.seconds)] if sizes else []
    for family in [name for name in chosen.families.split(",") if name]:
        same = [kind for kind in kinds if kind != "INT8 to int32"]
        work.append((families()[family], same, end_s))
    gpu = f"{device.gpu.name}, compute capability {device.capability / 10}"
    facts = about(TITLE, NAME, sys.argv[1:], [gpu], ()) | {"tools": versions()}
    with device.current():
        roofs = measured_roofs(device, kinds)
        facts["roofs"] = [asdict(each) for each in roofs]
        for layers, wanted, end in work:
            for cell in measure(device, layers, wanted, end, chosen.algorithms):
                cells.append(cell)
                facts["time_s"] = round(time.monotonic() - begin)
                facts["cells"] = [each.to_json() for each in cells]
                write(chosen.output, NAME, facts, report(facts, cells, roofs))
    print((chosen.output / "cuda_kernels.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
