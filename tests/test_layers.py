"""Imports go one way: every file of the package is parsed, and planted files that break each rule.

The level of a file is that of its folder. A file imports lower levels, or its own folder without
cycles; never inside a function, so that reading a file's head tells what it needs; and a heavy
dependency has one home.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "twofour"

LEVELS = {
    "core": 0,
    "onnx_tools": 1,
    "train": 1,
    "engine": 1,
    "cluster": 1,
    "kernels": 2,
    "runtime": 2,
    "compiler": 3,
    "plugins": 3,
    "operators": 4,
    "evaluate": 4,
    "bench": 4,
    "report": 4,
    "serve": 4,
    "demo": 5,
    "predict": 5,
    "registry": 5,
    "search": 6,
    "pipeline": 7,
    "cli": 8,
    "__main__": 9,
    "": 9,  # twofour/__init__.py
}
# These meet in a file on disk, never in memory.
APART = {("compiler", "train")}
LAZY = ("twofour/__init__.py", "twofour/cli/")
# Dependency -> the files and folders that may import it; what is not listed here is free to all.
HOMES = {
    "torch": ("twofour/train/", "twofour/bench/peers/torch.py", "twofour/demo/digits.py"),
    "sklearn": ("twofour/train/digits.py",),
    "llvmlite": ("twofour/kernels/cpu/", "twofour/runtime/cpu.py"),
    "openvino": ("twofour/bench/peers/openvino.py",),
    "onnxruntime": (
        "twofour/onnx_tools/",
        "twofour/kernels/onnxruntime.py",
        "twofour/runtime/",
        "twofour/compiler/",
        "twofour/bench/peers/onnxruntime.py",
    ),
    "onnx": (
        "twofour/onnx_tools/",
        "twofour/compiler/",
        "twofour/train/export_constants.py",
        "twofour/train/export_functions.py",
        "twofour/bench/probe.py",
    ),
    "onnx_ir": ("twofour/onnx_tools/", "twofour/compiler/", "twofour/train/export"),
    "onnxscript": ("twofour/onnx_tools/", "twofour/compiler/"),
    "google": ("twofour/onnx_tools/load.py", "twofour/serve/protocol/"),  # errors, own messages
    "typer": ("twofour/cli/",),
    "rich": (
        "twofour/cli/",
        "twofour/demo/",
        "twofour/bench/table.py",
        "twofour/bench/suite/page.py",
    ),
    "jinja2": ("twofour/report/page.py",),
    "matplotlib": ("twofour/report/plot.py",),
    "tokenizers": ("twofour/bench/suite/text.py",),
    "yaml": (
        "twofour/serve/repository/config.py",
        "twofour/search/recipe.py",
        "twofour/pipeline/",
        "twofour/registry/config_text.py",
    ),
    "pydantic": ("twofour/serve/", "twofour/pipeline/recipe.py"),
    "uvloop": ("twofour/serve/", "twofour/bench/load/"),
    "httptools": ("twofour/serve/", "twofour/bench/load/"),
    "grpc": ("twofour/bench/load/",),
    "hpack": ("twofour/serve/grpc/",),
    "ray": ("twofour/serve/ray/", "twofour/cluster/"),
    "starlette": ("twofour/serve/ray/",),  # which Ray Serve has
    "orjson": ("twofour/serve/", "twofour/bench/load/"),
    "fsspec": ("twofour/serve/repository/", "twofour/registry/"),
    "cryptography": ("twofour/serve/repository/signatures.py", "twofour/registry/"),
    "scipy": ("twofour/search/solve.py",),
    "pynvml": ("twofour/core/nvml.py",),
    "mlflow": ("twofour/registry/mlflow.py",),
    "prometheus_client": ("twofour/serve/",),
    "opentelemetry": ("twofour/serve/",),
    "tensorrt": ("twofour/runtime/tensorrt_library.py",),
    "cuda": ("twofour/runtime/cuda/",),
    "triton": ("twofour/kernels/cuda/",),
    "triton_python_backend_utils": ("twofour/serve/triton/model.py",),  # in Triton's own process
    "safetensors": ("twofour/engine.py", "twofour/train/"),
}
# What a file may import beside these and the standard library.
ANYWHERE = {"numpy", "twofour"}


@dataclass(frozen=True)
class Import:
    """One imported module, where it stands, and whether a function holds it."""

    module: str
    line: int
    inside: bool


def imports_of(source: str, module: str) -> list[Import]:
    """All imports of a file, relative ones resolved against `module` (a file, not a package)."""
    tree = ast.parse(source)
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        inside = id(node) in inner
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, node.module] if node.module else parents)
            names = [f"{base}.{alias.name}" for alias in node.names]
            found += [Import(name, node.lineno, inside) for name in names]
    return found


def module_of(path: str) -> str:
    """twofour/core/data.py -> twofour.core.data; an __init__.py is its folder."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def part_of(module: str) -> str:
    """The first name below twofour: core, train, ...; "" for twofour itself."""
    return [*module.split("."), ""][1]


def target_of(name: str, modules: set[str]) -> str:
    """The module that an imported name lies in: the longest prefix that is one."""
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name


def violations(files: dict[str, str]) -> Iterator[str]:
    """What is wrong in these files, path -> source; paths begin with twofour/."""
    modules = {module_of(path): path for path in files}
    edges: dict[str, set[str]] = {module: set() for module in modules}
    for module, path in modules.items():
        if part_of(module) not in LEVELS:
            yield f"{path}: its folder has no level"
            continue
        for found in imports_of(files[path], module_of(path) + ".x" * path.endswith("__init__.py")):
            where = f"{path}:{found.line}"
            if found.inside and not path.startswith(LAZY):
                yield f"{where}: import of {found.module} inside a function"
            top = found.module.partition(".")[0]
            if top != "twofour":
                yield from foreign(where, path, top)
                continue
            target = target_of(found.module, set(modules))
            if target != module:
                edges[module].add(target)
            if path != "twofour/__init__.py":
                yield from upward(where, module, target)
    yield from (f"cycle: {' -> '.join(cycle)}" for cycle in cycles(edges))


def foreign(where: str, path: str, top: str) -> Iterator[str]:
    """An import of another package."""
    if top in HOMES:
        if not path.startswith(HOMES[top]):
            yield f"{where}: {top} has its home in {', '.join(HOMES[top])}"
    elif top not in ANYWHERE | sys.stdlib_module_names:
        yield f"{where}: {top} is not a dependency that a file may import"


def upward(where: str, module: str, target: str) -> Iterator[str]:
    """An import within the package that does not go down."""
    here, there = part_of(module), part_of(target)
    if there not in LEVELS:
        yield f"{where}: {target} has no level"
    elif here == there:
        return
    elif LEVELS[there] > LEVELS[here]:
        yield f"{where}: upward import of {target}, level {LEVELS[here]} -> {LEVELS[there]}"
    elif LEVELS[there] == LEVELS[here]:
        yield f"{where}: sideways import of {target}, both level {LEVELS[here]}"
    elif (here, there) in APART:
        yield f"{where}: {here} and {there} stay apart"


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Import cycles, each once, as module names with the first repeated at the end."""
    done: set[str] = set()
    found: list[list[str]] = []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
            return
        if module in done:
            return
        for target in sorted(edges.get(module, ())):
            visit(target, [*path, module])
        done.add(module)

    for module in sorted(edges):
        visit(module, [])
    return found


def package_files() -> dict[str, str]:
    root = PACKAGE.parent
    return {str(path.relative_to(root)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def test_the_package_imports_one_way() -> None:
    files = package_files()
    assert len(files) > 10
    assert list(violations(files)) == []


def test_no_file_is_longer_than_can_be_read_at_once() -> None:
    lengths = {path: source.count("\n") for path, source in package_files().items()}
    assert {path: length for path, length in lengths.items() if length > 420} == {}


CLEAN = {
    "twofour/__init__.py": "def f():\n    from twofour.compiler.build import build\n",
    "twofour/core/errors.py": "import os\nimport numpy as np\n",
    "twofour/core/data.py": "from twofour.core.errors import Error\n",
    "twofour/train/export.py": "import torch\nfrom twofour.core import data\n",
    "twofour/compiler/build.py": "import onnx_ir\nfrom twofour.core.data import x\n",
    "twofour/cli/build.py": "def f():\n    from twofour.compiler.build import build\n",
}


def test_clean_files_pass() -> None:
    assert list(violations(CLEAN)) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("twofour/core/a.py", "from twofour.train.export import x", "upward import"),
        ("twofour/core/a.py", "import twofour.compiler.build", "upward import"),
        ("twofour/core/a.py", "from twofour import __version__", "upward import of twofour,"),
        ("twofour/core/a.py", "from ..compiler import build", "upward import"),
        ("twofour/core/a.py", "if x:\n    from twofour.cli import build", "upward import"),
        ("twofour/train/a.py", "from twofour.compiler.build import build", "upward import"),
        ("twofour/compiler/a.py", "import twofour.train.export", "stay apart"),
        ("twofour/onnx_tools/a.py", "import twofour.train.export", "sideways import"),
        ("twofour/core/a.py", "def f():\n    import os", "inside a function"),
        ("twofour/core/a.py", "class A:\n    def f(self):\n        import os", "inside a function"),
        ("twofour/core/a.py", "async def f():\n    from os import path", "inside a function"),
        ("twofour/core/a.py", "import torch", "torch has its home in"),
        ("twofour/core/a.py", "from torch.nn import Module", "torch has its home in"),
        ("twofour/compiler/a.py", "import torch", "torch has its home in"),
        ("twofour/cli/a.py", "def f():\n    import torch", "torch has its home in"),
        ("twofour/compiler/a.py", "import llvmlite.binding", "llvmlite has its home in"),
        ("twofour/core/a.py", "import onnxruntime", "onnxruntime has its home in"),
        ("twofour/runtime/a.py", "import openvino", "openvino has its home in"),
        ("twofour/evaluate/a.py", "from matplotlib.figure import Figure", "its home in"),
        ("twofour/report/sensitivity.py", "import jinja2", "jinja2 has its home in"),
        ("twofour/report/a.py", "from twofour.cli import build", "upward import"),
        ("twofour/core/a.py", "import pandas", "pandas is not a dependency"),
        ("twofour/new/a.py", "import os", "its folder has no level"),
        ("twofour/core/a.py", "import twofour.core.b", "cycle: twofour.core.a -> twofour.core.b"),
    ],
)
def test_each_rule_is_seen_to_be_broken(path: str, source: str, message: str) -> None:
    planted = {path: source}
    if "core.b" in source:
        planted["twofour/core/b.py"] = "from twofour.core.a import x\n"
    found = list(violations(CLEAN | planted))
    assert len(found) == 1, found
    assert message in found[0]


def test_a_long_cycle_is_found_once() -> None:
    ring = {
        f"twofour/core/{a}.py": f"from twofour.core import {b}\n" for a, b in ("ab", "bc", "ca")
    }
    (found,) = violations(CLEAN | ring)
    assert found == "cycle: twofour.core.a -> twofour.core.b -> twofour.core.c -> twofour.core.a"
