"""What twofour doctor shows to people."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from twofour.cli.output import printable

if TYPE_CHECKING:
    from twofour.bench.probe import Probe
    from twofour.bench.speed import Speed
    from twofour.core.features import Feature
    from twofour.core.gpus import Gpu
    from twofour.core.machine import Machine

_HUGE_PAGES = {
    "always": "weights and activations of 2 MB and more lie in them",
    "madvise": "weights and activations of 2 MB and more ask for them and lie in them",
    "never": "large weights are slower to read without them: "
    "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
}


def machine_lines(machine: Machine, usable: int) -> list[str]:
    """Cores, caches and memory; what is unknown is left out."""
    counts = {
        "socket": machine.sockets,
        "core": machine.cores,
        "hardware thread": machine.threads,
        "NUMA node": machine.numa_nodes,
    }
    parts = [f"{n} {name}{'s' * (n > 1)}" for name, n in counts.items() if n]
    shown = ", ".join(parts) or "nothing more is known of them"
    virtual = ", in a virtual machine" if machine.virtual else ""
    lines = [f"cores: {usable} usable; {shown}{virtual}"]
    if machine.caches:
        kinds = (
            f"{cache.name} {_size(cache.size_bytes)}"
            + (f" for {cache.shared_by} threads" if cache.shared_by > 1 else "")
            for cache in machine.caches
        )
        lines.append(f"caches: {', '.join(kinds)}")
    if machine.memory_bytes:
        free = machine.available_bytes
        lines.append(
            f"memory: {_size(machine.memory_bytes)}{f', {_size(free)} available' if free else ''}"
        )
    if machine.huge_pages:
        size = f" of {_size(machine.huge_page_bytes)}" if machine.huge_page_bytes else ""
        effect = _HUGE_PAGES.get(machine.huge_pages, "")
        lines.append(f"transparent huge pages{size}: {machine.huge_pages}: {effect}")
    return lines


def feature_table(features: Sequence[Feature], flags: Collection[str]) -> Table:
    """What each gives, or would give."""
    table = Table()
    for header in ("feature", "here", "what kernels do with it"):
        table.add_column(header, overflow="fold")
    for feature in features:
        table.add_row(feature.name, "yes" if feature.here(flags) else "no", feature.gives)
    return table


def speed_table(speed: Speed) -> list[Table | str]:
    """Multiply-adds by type and pattern, and bytes."""
    dtypes = dict.fromkeys(name.partition(" ")[0] for name in speed.peak_gmacs)
    forms = dict.fromkeys(name.partition(" ")[2] for name in speed.peak_gmacs)
    table = Table()
    table.add_column("kernels")
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
    for form in forms:
        rates = [speed.peak_gmacs.get(f"{dtype} {form}") for dtype in dtypes]
        table.add_row(form, *("" if rate is None else f"{rate:.0f}" for rate in rates))
    together = (
        f", {speed.threads} threads {speed.read_all_gbps:.0f} GB/s" if speed.threads > 1 else ""
    )
    return [
        "multiply-adds of one core at most, thousand millions a second, counted as if dense:",
        table,
        f"memory read: one core {speed.read_gbps:.0f} GB/s{together}; "
        f"copied within L2: {speed.copy_gbps:.0f} GB/s",
    ]


def noise_lines(noise: Sequence[str]) -> list[str]:
    """What makes times unsteady."""
    if not noise:
        return ["times should be steady: nothing is known that disturbs them"]
    return ["times are unsteady here:", *(f"- {each}" for each in noise)]


def gpu_lines(gpus: Sequence[Gpu]) -> list[str]:
    """What there is."""
    if not gpus:
        return ["GPUs: none found"]
    kinds: dict[str, int] = {}
    for gpu in gpus:
        size = f", {_size(gpu.memory_bytes)}" if gpu.memory_bytes else ""
        driver = f", driver {gpu.driver}" if gpu.driver else ""
        name = f"{gpu.name}{size}{driver}"
        kinds[name] = kinds.get(name, 0) + 1
    shown = "; ".join(f"{count} x {name}" if count > 1 else name for name, count in kinds.items())
    return [f"GPUs: {shown}"]


def cuda_lines(found: Mapping[str, Any]) -> list[str]:
    """What builds engines for GPUs without TensorRT and runs them, and what would do more."""
    missing = found["missing_to_run"]
    here = ", ".join(
        f"{name} {part['version']}" for name, part in found["parts"].items() if part["version"]
    )
    runs = f"to run engines is missing: {', '.join(missing)}" if missing else "runs engines"
    gpus = f" for {', '.join(dict.fromkeys(found['gpus']))}" if found["gpus"] else ""
    lines = [f"CUDA: {here or 'nothing of it'}; {runs}{gpus}"]
    for name, part in found["parts"].items():
        if part["install"]:
            lines.append(f"CUDA without {name}, which {part['for']}: {part['install']}")
    return lines


def tensorrt_lines(found: Mapping[str, Any]) -> list[str]:
    """What builds engines for GPUs, and what keeps them from running here."""
    lines = []
    for each in found["found"]:
        missing = each["missing_to_run"]
        runs = f"to run them is missing: {', '.join(missing)}" if missing else "runs them"
        lines.append(f"{each['title']}: {_builds(each['library'], bool(missing))}; {runs}")
    return lines or [f"TensorRT: not installed, for --target tensorrt: {found['install']}"]


def _builds(library: str, is_missing: bool) -> str:
    if library == "tensorrt_rtx":
        return "builds engines for GPUs, here without one"
    return "builds engines where their GPU is" if is_missing else "builds engines"


def package_table(packages: Mapping[str, Mapping[str, Any]]) -> Table:
    """What is installed, and how to get what is not."""
    table = Table()
    for header in ("package", "version", "for"):
        table.add_column(header, overflow="fold")
    for name, found in packages.items():
        missing = f"not installed: {found['install']}"
        table.add_row(name, printable(found["version"] or missing), found["for"])
    return table


def plugin_lines(plugins: Mapping[str, Any]) -> list[Table | Text]:
    """The operators that plugins add, and the plugins that could not be used."""
    lines: list[Table | Text] = []
    if plugins["operators"]:
        table = Table()
        for header in ("operator", "package", "meaning", "tactics"):
            table.add_column(header, overflow="fold")
        for found in plugins["operators"]:
            tactics = ", ".join(found["tactics"])
            row = (found["operator"], found["package"], found["meaning"], tactics)
            table.add_row(*map(printable, row))
        lines.append(table)
    return [*lines, *(printable(f"plugin not used: {each}") for each in plugins["problems"])]


def gain_lines(probes: Sequence[Probe]) -> list[str]:
    """One line for each precision and pattern."""
    lines = [
        f"  {each.precision}: dense {each.dense_us:.0f} us ({each.dense_gops:.0f} GOPS), "
        f"{each.pattern} {each.sparse_us:.0f} us: {each.gain:.2f} times as fast"
        for each in probes
    ]
    return ["a 3x3 convolution, 128 to 128 channels on 28x28, one thread", *lines] if lines else []


def _size(size_bytes: int) -> str:
    """In units of 1024, three digits."""
    size, units = float(size_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.3g} {units[0]}" if size < 1000 else f"{size:.0f} {units[0]}"
