"""--ray on a machine without a cluster: one is started, and ended with the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[default]'")

from tests.cli.test_json_schemas import twofour
from tests.cluster.nodes import room_for_a_cluster
from tests.evaluate.networks import network, samples, save, weights

pytestmark = pytest.mark.slow
SCAN = ["sensitivity", "model.onnx", "--data", "data.npz", "--forecast", "none", "--json"]


def test_a_command_starts_and_ends_its_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(network(weights()), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=samples(8), labels=np.arange(8) % 5)
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "twofour", *SCAN, "--ray", "--jobs", "1"]
    with room_for_a_cluster():
        folder = os.environ["RAY_TMPDIR"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert found.returncode == 0, found.stderr
        assert not [each for each in processes() if folder in each]
    alone = json.loads(twofour(*SCAN).stdout)
    drops = [[case["drop"] for case in each["cases"]] for each in (json.loads(found.stdout), alone)]
    assert drops[0] == drops[1]
    assert len(drops[0]) == 4


def processes() -> list[str]:
    """The command lines of all that run."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(each.read_text())
        except OSError:  # it has ended meanwhile
            continue
    return found
