"""Weights and code of an engine on a GPU: there once, however many sessions run it there."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from twofour.engine import Engine
from twofour.runtime.cuda.device import Device
from twofour.runtime.cuda.prepared import Objects

_lock = threading.RLock()
"""Sessions are freed by the collector of garbage too: in any thread, at any line."""


@dataclass(eq=False)
class Shared:
    """What all sessions of an engine on a GPU have in common.

    Attributes:
        engine: keeps its identity while this lives.
        device: the GPU.
        weights: address of the weights.
        objects: its kernels.
        users: how many sessions there are.
    """

    engine: Engine
    device: Device
    weights: int
    objects: Objects
    users: int = 0


_shared: dict[tuple[int, int], Shared] = {}


def acquire(engine: Engine, device: Device) -> Shared:
    """The weights of an engine on a GPU, copied there by the first who asks."""
    key = id(engine), id(device)
    with _lock:
        found = _shared.get(key)
        if found is not None:
            found.users += 1
            if _shared.get(key) is found:  # else the last other session was freed just now
                return found
        weights = device.take(engine.weights.nbytes, "the weights of an engine")
        try:
            _copy_weights(engine, device, weights)
        except BaseException:
            device.give_back(weights)
            raise
        made = Shared(engine, device, weights, Objects(device, engine.code), users=1)
        _shared[key] = made
        return made


def _copy_weights(engine: Engine, device: Device, to: int) -> None:
    stream = device.stream()
    try:
        device.to_gpu(to, engine.weights, stream)
        device.wait(stream)
    finally:
        device.drop_stream(stream)


def release(shared: Shared) -> None:
    """The last who leaves frees them."""
    with _lock:
        shared.users -= 1
        if shared.users:
            return
        del _shared[id(shared.engine), id(shared.device)]
        try:
            shared.objects.close()
        finally:
            shared.device.give_back(shared.weights)


def is_there(engine: Engine, device: Device) -> bool:
    """Whether a session has brought them."""
    return (id(engine), id(device)) in _shared
