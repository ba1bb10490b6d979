"""Which operators of a model would run natively: what a build finds before it tunes kernels.

The same import, passes, schedule and lowering as those of a build, so it says what a build does.
An operator that a pass took into another one runs where that one runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir

from twofour.compiler.importer import Shapes, import_graph
from twofour.compiler.lower import lower
from twofour.compiler.native_plugin import runs_in_python
from twofour.compiler.passes.pipeline import run_passes
from twofour.compiler.schedule import schedule
from twofour.core.errors import GateError, InputError, UnsupportedError
from twofour.core.target import host_target

NATIVE, FALLBACK, PYTHON = "native", "onnxruntime", "python"


@dataclass(frozen=True)
class OperatorInfo:
    """One operator of the model, after constants were folded.

    Attributes:
        name: of the node.
        op_type: its type; other domains than ONNX are written before a dot.
        runs: "native", "onnxruntime" or, of a plugin's operator, "python".
        reason: why it is not native; "" where it is.
    """

    name: str
    op_type: str
    runs: str
    reason: str = ""


@dataclass(frozen=True)
class Survey:
    """Where a model's operators would run.

    Attributes:
        operators: in order.
        whole: why the whole model would run on ONNX Runtime; "" where it would not.
        refused: why a build would refuse the model, line by line; empty where it would not.
    """

    operators: tuple[OperatorInfo, ...]
    whole: str = ""
    refused: tuple[str, ...] = ()

    @property
    def native(self) -> int:
        """How many operators run natively."""
        return sum(each.runs == NATIVE for each in self.operators)

    @property
    def fallbacks(self) -> tuple[OperatorInfo, ...]:
        """Those that run on ONNX Runtime."""
        return tuple(each for each in self.operators if each.runs == FALLBACK)

    @property
    def python(self) -> tuple[OperatorInfo, ...]:
        """Those that a plugin runs in Python."""
        return tuple(each for each in self.operators if each.runs == PYTHON)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        counts = {"native": self.native, "onnxruntime": len(self.fallbacks)}
        counts["python"] = len(self.python)
        return counts | asdict(self)


def survey(model: ir.Model, shapes: Shapes | None = None) -> Survey:
    """Looks where each operator would run.

    Args:
        model: as loaded; not changed.
        shapes: of inputs by name, as `import_graph` takes them.
    """
    try:
        imported = import_graph(model, shapes, host_target())
        fused = run_passes(imported)
        order = schedule(fused.model.graph)
        lower(fused.model.graph, order)
    except UnsupportedError as error:
        why = "; ".join((error.what, *error.reasons))
        nodes = [OperatorInfo(n.name or "", _type(n), FALLBACK, why) for n in model.graph]
        return Survey(tuple(nodes), whole=why)
    except (InputError, GateError) as error:
        return Survey((), refused=(error.what, *error.reasons))
    return Survey(_placed(imported.graph, fused.model.graph, order.reasons))


def _placed(
    before: ir.Graph, after: ir.Graph, reasons: Mapping[ir.Node, str]
) -> tuple[OperatorInfo, ...]:
    """The operators before the passes, each with where that runs which it became."""
    made = {value.name: reasons.get(node, "") for node in after for value in node.outputs}
    found: dict[ir.Node, str] = {}
    for node in reversed(before):
        own = [made[value.name] for value in node.outputs if value.name in made]
        readers = [found[reader] for reader in node.successors() if reader in found]
        found[node] = (own or readers or [""])[0]
    return tuple(
        OperatorInfo(node.name or "", _type(node), _runs(node, why), why)
        for node, why in reversed(found.items())
    )


def _runs(node: ir.Node, why: str) -> str:
    """Where a node runs that is not native for that reason, or is."""
    if not why:
        return NATIVE
    return PYTHON if runs_in_python(node) else FALLBACK


def _type(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type
