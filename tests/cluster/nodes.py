"""A Ray cluster of two nodes on this machine, with as many CPUs each as tests need."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.serve.clusters import ONE_AT_A_TIME, ROOT

STORE_BYTES = 80 << 20


@contextmanager
def room_for_a_cluster() -> Iterator[None]:
    """One cluster at a time, whoever else runs tests; its files go when it has ended."""
    folder = Path(mkdtemp(prefix="tf", dir="/tmp"))  # short, for the paths of sockets
    with ONE_AT_A_TIME.open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """One CPU on the head, two on the other; this process is its driver."""
    with room_for_a_cluster():
        options = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=options)
        try:
            cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
            ray.init(cluster.address, log_to_driver=False)
            cluster.wait_for_nodes()
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
