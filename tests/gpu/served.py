"""A model that serves from GPUs, asked in a test."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest

from tests.cuda_engines import COUNT
from twofour.engine import Engine

VALUES = np.linspace(-1, 1, COUNT, dtype=np.float32)


def served(engine: Engine, settings: dict[str, Any], count: int) -> list[Any]:
    """Answers to VALUES times 0, 1, 2 and so on, all asked at once.

    Args:
        engine: of `cuda_kernels.gpu_engine`.
        settings: of the model, as in its config.yaml.
        count: how many.
    """
    pytest.importorskip("pydantic")
    version_module = pytest.importorskip("twofour.serve.models.version")
    config_of = pytest.importorskip("twofour.serve.repository.config").config_of
    config = config_of(settings, "config.yaml")

    async def serve() -> list[Any]:
        version = version_module.Version("m", 1, config, engine)
        await version.start()
        loop = asyncio.get_running_loop()
        waiting = [loop.create_future() for _ in range(count)]
        for factor, each in enumerate(waiting):
            ticket = version_module.Ticket(time.perf_counter_ns())
            version.submit({"x": VALUES * np.float32(factor)}, ticket, each.set_result)
        answers = await asyncio.gather(*waiting)
        await version.close()
        return answers

    return asyncio.run(serve())
