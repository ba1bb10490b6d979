"""--ray: who shares the work of a command, processes of this machine or those of a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from twofour.cli.options import require_packages
from twofour.cli.output import Output

if TYPE_CHECKING:
    from twofour.core.scan import Spread

OnRay = Annotated[
    bool, typer.Option("--ray", help="Spread the work over a Ray cluster: many machines.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="With --ray: auto, or HOST:PORT of its head; none: started here."),
]


@contextmanager
def spread_of(on_ray: bool, address: str | None, jobs: int | None, out: Output) -> Iterator[Spread]:
    """Workers, as long as the context is open.

    Args:
        on_ray: whether the user asked for a cluster.
        address: of it; None: one is started here.
        jobs: workers at most; None: one process, or as many as the cluster has CPUs for.
        out: shows what the user should know.

    Raises:
        InputError: Ray is not installed, there is no such cluster, or an address without --ray.
    """
    from twofour.core.errors import InputError
    from twofour.core.scan import Processes

    if not on_ray:
        if address is not None:
            raise InputError("--ray-address is of no use without --ray", [], "add --ray")
        yield Processes(jobs or 1)
        return
    require_packages("--ray", ("ray",), "ray")
    from twofour.cluster.tasks import on_ray as connected

    with ExitStack() as stack:
        with out.stage("connecting to Ray"):
            spread = stack.enter_context(connected(address or "", jobs, note=out.note))
        yield spread
