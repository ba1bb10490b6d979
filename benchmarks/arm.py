"""The kernels for Arm, counted: instructions of their inner loops, and what they should take.

    python -m benchmarks.arm --write

Counted is the machine code that LLVM makes of them; nothing here is measured. Cycles follow from
the pipes that each instruction may take (core/cpus.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from twofour.compiler.cost import CostModel, group_code
from twofour.compiler.instructions import counted, cycles
from twofour.core.cpus import cpu_named
from twofour.core.masks import mask_of
from twofour.core.target import parse_target
from twofour.kernels.cpu.nest import Tiled
from twofour.kernels.cpu.problem import LANES, Config, ConvProblem, Strides
from twofour.kernels.cpu.tactic import Tactic, tactics

CPUS = ("neoverse-n1", "neoverse-v1")
KERNELS = {
    "dense sdot": Config(3, 1, 2),
    "2:4 tbl": Config(3, 1, 1),
    "2:4 pair tbl": Config(2, 1, 2),
    "2:4 quad tbl": Config(4, 1, 1),
}
SHAPES = ((3136, 576, 64), (128, 768, 3072), (16, 1024, 1024), (1, 4096, 4096))
GROUP = 16  # inputs


def tactic(name: str) -> Tactic:
    """The integer tactic of that name."""
    return next(t for t in tactics() if t.name == name and t.dtype == "int8")


def loops() -> Iterator[str]:
    """A table of inner loops."""
    target = replace(parse_target("cpu:dotprod"), model="")
    names = "tile | sdot | tbl | other vector | loads | all | sdot + tbl + other per 16 dense"
    yield f"| kernel | {names} "
    yield "| --- | --- | --: | --: | --: | --: | --: | --: " + "| --: " * (1 + len(CPUS)) + "|"
    for name, config in KERNELS.items():
        kernel = tactic(name).kernel
        assert isinstance(kernel, Tiled)
        found = group_code(kernel.format, "int8", config.tile_h, config.blocks, target)
        kinds = counted(found)
        products = config.tile_h * config.blocks * LANES * GROUP
        dense = products // 16
        other = kinds["vector"] + kinds["shift"]
        bytes_of = kernel.format.group_bytes(config.blocks, GROUP // kernel.format.k_per_step)
        speeds = [products / cycles(found, cpu_named(cpu)) for cpu in CPUS]
        yield (
            f"| {name} | {config} | {kinds['dot']} | {kinds['pick']} | {other} | {kinds['load']} "
            f"| {len(found)} | {16 * (kinds['dot'] + kinds['pick'] + other) / dense:.1f} "
            f"| {bytes_of / (config.blocks * LANES * GROUP):.3f} "
            f"| {' | '.join(f'{speed:.1f}' for speed in speeds)} |"
        )


def layers(word: str) -> Iterator[str]:
    """A table of matrix products: the best configuration of each kernel."""
    target = parse_target(f"cpu:{word}")
    yield "| M, K, N | " + " | ".join(KERNELS) + " |"
    yield "| --- |" + " --: |" * len(KERNELS)
    for m, k, n in SHAPES:
        x, y = Strides(m * k, k, k), Strides(m * n, n, n)
        problem = ConvProblem(1, m, 1, k, n, "int8", x, y, "int8", bounded=True)
        model = CostModel(target)
        times = [
            min(model.time_us(problem, t, c) for c in t.configs(problem, target.isa))
            for t in map(tactic, KERNELS)
        ]
        cells = [f"{time:.0f} us, {times[0] / time:.2f}x" for time in times]
        yield f"| {m}, {k}, {n} | {' | '.join(cells)} |"


def energies() -> Iterator[str]:
    """What masks keep of the squares of normally distributed weights."""
    squares = np.random.default_rng(0).standard_normal((512, 512)) ** 2
    fours = np.repeat(squares.reshape(-1, 4, 512).sum(1), 4, axis=0)
    masks = {
        "2:4": mask_of(squares, "2:4"),
        "2:4/pair": mask_of(squares, "2:4/pair"),
        "one for 4 neighbours": mask_of(fours, "2:4"),
    }
    for name, mask in masks.items():
        yield f"- {name}: {squares[mask].sum() / squares.sum():.3f}"


def page() -> Iterator[str]:
    """All of it."""
    head, *rest = loops()
    speeds = " | ".join(f"multiply-adds a cycle, {cpu} (est.)" for cpu in CPUS)
    yield "# Kernels for Arm with dot products, counted\n\n    python -m benchmarks.arm --write\n"
    yield (
        "Instructions of one turn of the inner loop: 16 inputs of each position of a tile, from "
        "the machine code that LLVM makes. `other vector` flips the highest bits of inputs and "
        "unpacks indices. The column per 16 dense: instructions on the vector pipes for each 16 "
        "`sdot` that a dense kernel has at least. Bytes: packed weights and indices for each "
        "weight, zeros included. Multiply-adds are counted as if dense.\n"
    )
    yield f"{head}| bytes a weight | {speeds} |"
    yield from rest
    for word in CPUS:
        yield f"\n## Matrix products on {cpu_named(word).model}, estimated\n"
        yield "Microseconds of the cost model, and times as fast as dense.\n"
        yield from layers(word)
    yield "\n## What a mask keeps of the squares of normally distributed weights\n"
    yield from energies()


def main() -> None:
    """Prints the page, and writes it to benchmarks/arm.md if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    text = "\n".join(page()) + "\n"
    print(text)
    if parser.parse_args().write:
        (Path(__file__).parent / "arm.md").write_text(text)


if __name__ == "__main__":
    main()
