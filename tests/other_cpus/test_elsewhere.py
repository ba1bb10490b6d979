"""Engines built here for other machines, run there: bytes equal to this machine's, or refused.

The other machines are emulated (machines.py); nothing here ran on a real one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.compiler.test_build_transformers import Text, text_inputs
from tests.compiler.test_build_transformers import export as export_text
from tests.networks import Block, export, images, with_statistics
from tests.other_cpus.machines import (
    CORTEX_A72,
    HASWELL,
    LYING,
    NEHALEM,
    NEOVERSE_N1,
    ROOT,
    Machine,
)
from twofour.compiler.build import build
from twofour.core.target import parse_target
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize
from twofour.runtime.session import Session

GUEST = str(ROOT / "tests/other_cpus/guest.py")
NAMES = ("dense", "sparse", "pair", "float", "text")
# Target -> the networks that are built for it; portable code takes long to generate.
BUILT = {
    "dotprod": NAMES,
    "avx2": NAMES,
    "cortex-a72": ("sparse", "text"),
    "vector": ("sparse",),
    "avx512vnni": ("dense",),
}
# Where sums of floats are added in another order.
FLOATS = ("float", "text")
BOUND = 1e-4


class Network(nn.Module):
    """Convolutions with a shortcut, strides, dilation, groups and a depthwise one, and a mean."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 32, 3, 2, 1), Block(32, 32, 1)
        self.wide = nn.Conv2d(32, 48, 3, 1, 2, 2)
        self.each = nn.Conv2d(48, 48, 3, 1, 1, groups=48)
        self.grouped, self.fc = nn.Conv2d(48, 36, 3, 1, 1, groups=4), nn.Linear(36, 10)

    def forward(self, x):
        x = self.block(torch.relu(self.stem(x)))
        x = torch.nn.functional.hardswish(self.each(torch.relu(self.wide(x))))
        return self.fc(self.grouped(x).mean((2, 3)))


def models():
    """Name -> an integer network dense, 2:4 and 2:4/pair; floats; a transformer."""
    torch.manual_seed(0)
    plain = export(with_statistics(Network()), False)
    text = export_text(Text(by_hand=False), text_inputs(), False)
    asked = QuantizeOptions(threads=1)
    return {
        "dense": quantize(plain, images(), asked),
        "sparse": quantize(prune(plain, "2:4")[0], images(), asked),
        "pair": quantize(prune(plain, "2:4/pair")[0], images(), asked),
        "float": plain,
        "text": quantize(prune(text, "2:4")[0], text_inputs(8), asked),
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with every engine, the inputs, and this machine's outputs."""
    folder = tmp_path_factory.mktemp("built")
    feeds = {**images(1)[0], **text_inputs(2)}
    np.savez(folder / "inputs.npz", **feeds)
    for name, model in models().items():
        mine = {key: feeds[key] for key in (value.name for value in model.graph.inputs)}
        shapes = {key: value.shape for key, value in mine.items()}
        with Session(build(model, shapes=shapes, race=False, tuning_effort=0)) as session:
            np.savez(folder / f"{name}.here.npz", **session.run(mine))
        for word in (word for word, names in BUILT.items() if name in names):
            target = parse_target(f"cpu:{word}")
            engine = build(model, shapes=shapes, target=target, threads=2)
            engine.save(folder / f"{name}.{word}.engine")
    return folder


RUNS = {
    NEOVERSE_N1: ("dotprod", "cortex-a72"),
    HASWELL: ("avx2", "vector"),
    NEHALEM: ("vector",),
    CORTEX_A72: (),
}
REFUSED = {
    CORTEX_A72: ("dotprod", "avx2"),
    HASWELL: ("avx512vnni", "dotprod"),
    NEHALEM: ("avx2",),
}
WHERE: dict[Machine, str] = {}


@pytest.fixture
def there(built, tmp_path_factory):
    """Runs on a machine all that is asked of it, once; what it says of itself."""

    def run(machine: Machine) -> str:
        if machine not in WHERE:
            names = [f"{name}.{word}" for word in RUNS[machine] for name in BUILT[word]]
            names += [f"dense.{word}" for word in REFUSED.get(machine, ())]
            for name in names:
                (built / f"{name}.txt").unlink(missing_ok=True)
            done = machine.run(tmp_path_factory.mktemp("machine"), GUEST, str(built), *names)
            assert done.returncode == 0, done.stderr[-2000:]
            WHERE[machine] = done.stdout
            for word in REFUSED.get(machine, ()):  # another machine may have run or refused it
                text = built / f"dense.{word}.txt"
                text.rename(built / f"dense.{word}.{machine.cpu}.txt")
        return WHERE[machine]

    return run


def same(folder: Path, name: str, word: str) -> None:
    """The outputs there are those here: to the bit where sums are integers."""
    here = dict(np.load(folder / f"{name}.here.npz"))
    there = dict(np.load(folder / f"{name}.{word}.npz"))
    assert here.keys() == there.keys()
    for key, value in here.items():
        assert len(np.unique(value)) > 4
        if name in FLOATS:
            assert np.abs(there[key] - value).max() <= BOUND * np.abs(value).max()
        else:
            assert np.array_equal(there[key], value), f"{name} on cpu:{word}: {key}"


@pytest.mark.parametrize(
    ("machine", "isa"),
    [(NEOVERSE_N1, "cpu:dotprod"), (HASWELL, "cpu:avx2"), (NEHALEM, "cpu:vector")],
    ids=["neoverse-n1", "haswell", "nehalem"],
)
def test_results_there_are_those_here(machine, isa, built, there) -> None:
    assert there(machine).split() == [machine.arch, isa]
    for word in RUNS[machine]:
        for name in BUILT[word]:
            same(built, name, word)


@pytest.mark.parametrize(
    ("machine", "word", "needs", "has", "rebuild"),
    [
        (CORTEX_A72, "dotprod", "asimddp", "Arm Cortex-A72 (aarch64)", "--target cpu:cortex-a72"),
        (CORTEX_A72, "avx2", "architecture x86_64", "(aarch64)", "--target cpu:cortex-a72"),
        (HASWELL, "avx512vnni", "avx512vnni", "(Haswell) (x86_64)", "--target cpu:avx2"),
        (HASWELL, "dotprod", "architecture aarch64", "(Haswell)", "--target cpu:avx2"),
        (NEHALEM, "avx2", "avx2, fma", "(Nehalem) (x86_64)", "--target cpu:vector"),
    ],
    ids=["a72-dotprod", "a72-avx2", "haswell-avx512", "haswell-dotprod", "nehalem-avx2"],
)
def test_refused_where_it_cannot_run(machine, word, needs, has, rebuild, built, there) -> None:
    there(machine)
    what, *reasons, fix = (built / f"dense.{word}.{machine.cpu}.txt").read_text().splitlines()
    assert "cannot run on this machine" in what
    assert needs in reasons[-1]
    assert has in reasons[-1]
    assert "rebuild the engine on this machine" in fix
    assert rebuild in fix


def test_the_emulator_has_no_more_than_its_cpu(built, tmp_path) -> None:
    """So a result there is a proof: code for AVX2 ends at once where /proc/cpuinfo lies."""
    done = LYING.run(tmp_path, GUEST, str(built), "dense.avx2")
    assert done.returncode != 0
    assert "Illegal instruction" in done.stderr
