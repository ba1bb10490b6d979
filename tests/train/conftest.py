"""One PyTorch thread: the networks are too small for two, and waiting for a second is slow.

Of whole modules: a network that a fixture of the module trained is compared bit for bit.
"""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
