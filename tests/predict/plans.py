"""Plans with given times, without a build."""

from __future__ import annotations

from collections.abc import Sequence

from twofour.core.target import Target
from twofour.engine import Candidate, Layer, Plan, Profile, Step, Work


def layer(
    name: str,
    dense_us: float | None = None,
    sparse_us: float | None = None,
    precision: str = "int8",
    work: Work | None = None,
) -> Layer:
    """A convolution that takes the faster of its kernels."""
    times = {"dense": dense_us, "2:4 H": sparse_us}
    candidates = tuple(Candidate(t, "", us) for t, us in times.items() if us is not None)
    best = min(candidates, key=lambda each: each.time_us or 0.0)
    return Layer(
        name,
        "QConv",
        best.tactic,
        time_us=best.time_us,
        shape="a -> b",
        precision=precision,
        pattern="2:4" if sparse_us else "dense",
        candidates=candidates,
        work=work or Work(moved_bytes=64, k=512, channels=64),
        source=(name,),
    )


def plan(layers: Sequence[Layer]) -> Plan:
    """Of one profile that has them all."""
    step = Step("native", "program0", (), (), tuple(range(len(layers))))
    profile = Profile((), (), (), (step,), 0, ())
    target = Target("vector", "x86_64", "a CPU")
    return Plan(target, "0", "", (profile,), tuple(layers), 1, ("native",))
