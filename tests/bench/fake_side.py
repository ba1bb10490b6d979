"""What stands for PyTorch or our engines in a process of its own; it loads neither."""

import os
import time
from functools import partial

import numpy as np

from benchmarks.cuda.turns import Entry


class Fake:
    """Opens contestants that are as slow as their name says, or does what else it says."""

    def __init__(self):
        self.closed = 0

    def files(self, network):
        time.sleep(0.01)

    def open(self, network, batch, kind):
        if kind == "ends":
            os._exit(3)
        if kind == "fails":
            raise ValueError("it cannot\nbe opened")
        if kind == "hangs":
            time.sleep(60)
        outputs = [np.full((2, 3), float(batch))]
        wait = partial(time.sleep, 1e-5)
        return [Entry(kind, "set", partial(time.sleep, 1e-3), wait, lambda: outputs, 12)]

    def close(self):
        self.closed += 1
