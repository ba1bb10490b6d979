"""The kernels of AArch64 against their definition, on an emulated Neoverse N1: arm_kernels.py."""

from __future__ import annotations

from tests.other_cpus.machines import NEOVERSE_N1, ROOT

KERNELS = str(ROOT / "tests/other_cpus/arm_kernels.py")
PROGRAM = str(ROOT / "tests/kernels/test_program.py")
OPTIONS = ("-q", "-p", "no:cacheprovider", "--noconftest")


def test_kernels_are_their_definition(tmp_path) -> None:
    done = NEOVERSE_N1.run(tmp_path, "-m", "pytest", *OPTIONS, KERNELS)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert " passed" in done.stdout


def test_threads_share_a_program(tmp_path) -> None:
    """Barriers, sleeping workers, windows of calls: with the atomics of that architecture."""
    done = NEOVERSE_N1.run(
        tmp_path, "-m", "pytest", *OPTIONS, PROGRAM, "-k", "sleep or barrier or threads"
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert " passed" in done.stdout
