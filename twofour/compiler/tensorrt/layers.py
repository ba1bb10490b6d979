"""What TensorRT says of the layers that it built, as text or JSON: read into plain data.

    Name: mm_myl0_1, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [256,64], Datatype: Int8 }],
    ..., TacticName: sm80_xmma_sparse_gemm_i8i8_i8i32_..., Metadata: [ONNX Layer: mm][ONNX Layer: w]

The builder writes the text to its log, GPU or not; an engine that is loaded gives JSON. A sparse
kernel is told by its name, or by the builder's own list.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEAD = "Layers:"
"""What the builder's text begins with."""
_NAME = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*),")
_TACTIC = re.compile(r", TacticName: (?P<tactic>[^,]*)")
_SOURCES = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1f\[]|$)")
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<dims>[^\]]*)\],"
    r"(?P<rest>.*?)(?=\}(?:, \{|$))"
)
_DATATYPE = re.compile(r"Datatype: ([^,}\]]*)")
_ITEMS = {"Inputs": "inputs", "Constants": "constants", "Outputs": "outputs"}
_PARTS = re.compile(r", (?P<what>Inputs|Constants|Outputs): \[(?P<body>|.*?\})\](?=, |$)")
_TYPES = (
    ("int8", "int8"),
    ("bf16", "bfloat16"),
    ("bfloat16", "bfloat16"),
    ("half", "float16"),
    ("fp16", "float16"),
    ("fp32", "float32"),
    ("float", "float32"),
    ("int32", "int32"),
    ("int64", "int64"),
    ("bool", "bool"),
)
_PRODUCT = re.compile(r"gemm|conv|correlation|matrix_?mult", re.IGNORECASE)
_SPARSE = re.compile(r"sparse|sptensor|spgemm", re.IGNORECASE)
_LATER = "CASK_STUB"
_SPARSITY = re.compile(r"\(Sparsity\) (?P<what>.*?): ?(?P<names>.*)", re.DOTALL)
_CHOSEN, _ELIGIBLE = ("picked", "using sparse"), ("eligible",)


@dataclass(frozen=True)
class Port:
    """A tensor that a layer reads or writes.

    Attributes:
        name: TensorRT's.
        shape: -1 where it is open.
        dtype: numpy's name of it, or "bfloat16"; "" where TensorRT does not say.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Reported:
    """One layer as TensorRT describes it.

    Attributes:
        name: TensorRT's.
        kind: of layer: "gemm", "CaskConvolution", "kgen".
        inputs: that are computed.
        constants: that it reads.
        outputs: that it writes.
        tactic: the kernel's name; "" where it has none.
        sources: nodes of the model that it computes something of.
    """

    name: str
    kind: str
    inputs: tuple[Port, ...] = ()
    constants: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    tactic: str = ""
    sources: tuple[str, ...] = ()

    @property
    def is_product(self) -> bool:
        """Whether it sums products: what can be sparse."""
        return _PRODUCT.search(self.kind) is not None and "_quantize" not in self.kind.lower()

    @property
    def is_sparse(self) -> bool:
        """Whether its kernel skips zeros, by its name."""
        return _SPARSE.search(self.tactic) is not None

    @property
    def is_open(self) -> bool:
        """Whether its kernel is chosen when the engine is loaded, and not before."""
        return self.is_product and _LATER in self.tactic

    @property
    def precision(self) -> str:
        """The type of what it multiplies, or works on.

        A layer that begins with a Cast reads another type than it multiplies its weight with.
        """
        weights = [port for port in self.constants if len(port.shape) > 1]
        if weights:
            weight = max(weights, key=lambda port: abs(math.prod(port.shape)))
            if weight.dtype in ("float16", "bfloat16"):
                return weight.dtype
        return next((port.dtype for port in (*self.inputs, *self.outputs) if port.dtype), "")


@dataclass(frozen=True)
class Sparsity:
    """The builder's lists of layers by TensorRT's names; None where it wrote none.

    Attributes:
        eligible: whose weights have the pattern, as TensorRT sees them.
        chosen: that run on sparse kernels.
    """

    eligible: frozenset[str] | None = None
    chosen: frozenset[str] | None = None


def read_layers(text: str) -> tuple[Reported, ...]:
    """The layers of a report, in the order they run in; those that say only their name have that.

    Args:
        text: of the builder's log, or the inspector's JSON.
    """
    if text.lstrip().startswith("{"):
        return tuple(map(_from_json, _json_layers(text)))
    lines = text.removeprefix(HEAD).splitlines()
    return tuple(_from_line(line) for line in lines if _NAME.match(line))


def read_sparsity(lines: Iterable[str]) -> Sparsity:
    """What the log says of sparse weights.

    Args:
        lines: of the log: "(Sparsity) Layers eligible for sparse math: conv1, conv2" or
            "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: conv1, conv2", and such.
    """
    eligible = chosen = None
    for line in lines:
        match = _SPARSITY.match(line.strip())
        if match is None:
            continue
        names = frozenset(name.strip() for name in match["names"].split(", ") if name.strip())
        if any(word in match["what"] for word in _CHOSEN):
            chosen = names
        elif any(word in match["what"] for word in _ELIGIBLE):
            eligible = names
    return Sparsity(eligible, chosen)


def _from_line(line: str) -> Reported:
    head = _NAME.match(line)
    assert head is not None  # read_layers looked
    found: dict[str, tuple[Port, ...]] = {}
    for part in _PARTS.finditer(line):
        found[_ITEMS[part["what"]]] = tuple(map(_port, _TENSOR.finditer(part["body"])))
    tactic = _TACTIC.search(line)
    _, _, metadata = line.rpartition(", Metadata: ")
    sources = tuple(_SOURCES.findall(metadata.strip()))
    return Reported(
        head["name"],
        head["kind"],
        tactic=tactic["tactic"] if tactic else "",
        sources=sources,
        **found,
    )


def _port(match: re.Match[str]) -> Port:
    dims = tuple(int(n) for n in match["dims"].split(",") if n.strip().lstrip("-").isdigit())
    datatype = _DATATYPE.search(match["rest"])
    return Port(match["name"], dims, dtype_of(datatype[1] if datatype else ""))


def dtype_of(text: str) -> str:
    """Numpy's name of a type in TensorRT's words: "Half", "Row major linear FP32"; "" if none."""
    lower = text.lower()
    return next((name for word, name in _TYPES if word in lower), "")


def _json_layers(text: str) -> Sequence[Any]:
    try:
        found = json.loads(text).get("Layers", [])
    except (ValueError, AttributeError):
        return []
    return found if isinstance(found, list) else []


def _from_json(layer: Any) -> Reported:
    if not isinstance(layer, Mapping):
        return Reported(str(layer), "")
    ports = {field: _json_ports(layer.get(key)) for key, field in _ITEMS.items()}
    return Reported(
        str(layer.get("Name", "")),
        str(layer.get("LayerType", "")),
        tactic=str(layer.get("TacticName", "")),
        sources=tuple(_SOURCES.findall(str(layer.get("Metadata", "")).strip())),
        **ports,
    )


def _json_ports(found: Any) -> tuple[Port, ...]:
    ports = found if isinstance(found, list) else []
    return tuple(
        Port(
            str(port.get("Name", "")),
            tuple(int(n) for n in port.get("Dimensions", ()) if isinstance(n, int)),
            dtype_of(str(port.get("Datatype", port.get("Format/Datatype", "")))),
        )
        for port in ports
        if isinstance(port, Mapping)
    )
