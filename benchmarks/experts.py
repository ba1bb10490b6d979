"""Writes `experts.md` and `experts.json`: routed experts and a masked MLP, and their dense forms.

    python -m benchmarks.experts                              # all, about twenty minutes
    python -m benchmarks.experts --tokens 128 --k 1,2 --output /tmp

A layer of experts with random weights and logits is one node. It runs routed in our engines, in
float32, in INT8 and in 2:4 INT8; beside it, in turns: every expert for every token in our own
engines (gates come as an input there, so that nothing is routed), ONNX Runtime on the same files
(by the node's function: it computes all experts too), and ONNX Runtime's own operators MoE and
QMoE, which have weights in float32 and in 8 bits. Then an MLP of the same size with a mask, where
from none to all of the rows are set.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from benchmarks.document import about, head, write
from twofour.bench import peers
from twofour.bench.timing import Contestant, Schedule, Timing, race, ratio
from twofour.bench.versus import ours
from twofour.compiler.build import build
from twofour.core.errors import Error
from twofour.core.experts import DOMAIN, MASKED, MIXTURE, route
from twofour.core.experts_text import function_text, inputs_of, name_of
from twofour.core.rounding import quantize_weight
from twofour.core.target import detect_host, host_target
from twofour.onnx_tools.dynamic import quantize_dynamic
from twofour.onnx_tools.load import save_model
from twofour.onnx_tools.prune import prune
from twofour.runtime.session import Session

ROOT = Path(__file__).resolve().parent
ACTIVATION = "Silu"
FORMS = ("f32", "INT8", "2:4 INT8")
SHARES = (0, 25, 50, 75, 100)
"""Percent of the rows whose mask is set."""
FLOATS_DIFFER, INTEGERS_DIFFER = 1e-4, 2e-2
"""Relative to the largest output: our engine and ONNX Runtime on the same file."""
Arrays = dict[str, np.ndarray]
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Of a layer.

    Attributes:
        hidden: channels of a token.
        inner: channels within an expert.
        experts: how many.
    """

    hidden: int
    inner: int
    experts: int


def weights(size: Size, random: np.random.Generator) -> Arrays:
    """Of all experts; a masked MLP takes the first."""
    shapes = {
        "w1": (size.experts, size.inner, size.hidden),
        "b1": (size.experts, size.inner),
        "w2": (size.experts, size.hidden, size.inner),
        "b2": (size.experts, size.hidden),
    }
    made = {}
    for name, shape in shapes.items():
        spread = shape[-1] ** -0.5 if len(shape) > 2 else 0.1
        made[name] = random.standard_normal(shape, np.float32) * np.float32(spread)
    return made


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[int]]],
    held: Arrays,
    functions: Sequence[onnx.FunctionProto] = (),
) -> ir.Model:
    """A graph of x and another input to y, which has the shape of x."""
    infos = [helper.make_tensor_value_info(n, kind, dims) for n, (kind, dims) in inputs.items()]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, inputs["x"][1])
    stored = [numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in held.items()]
    graph = helper.make_graph(nodes, "experts", infos, [y], stored)
    imports = {"": 18, **{node.domain: 1 for node in nodes if node.domain}}
    return ir.from_proto(
        helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(*each) for each in imports.items()],
            functions=list(functions),
            ir_version=10,
        )
    )


def as_node(base: str, held: Arrays, tokens: int, k: int = 1) -> ir.Model:
    """The layer as one node of this package, with its function."""
    names = inputs_of(base, quantized=False)
    attributes = {"k": k} if base == MIXTURE else {}
    operator = name_of(base, ACTIVATION, quantized=False)
    node = helper.make_node(operator, names, ["y"], "layer", domain=DOMAIN, **attributes)
    if base == MIXTURE:
        second = (TensorProto.FLOAT, [tokens, held["b1"].shape[0]])
    else:
        second = (TensorProto.BOOL, [tokens])
    inputs = {"x": (TensorProto.FLOAT, [tokens, held["b2"].shape[-1]]), names[1]: second}
    text = function_text(base, ACTIVATION, quantized=False)
    return model_of([node], inputs, held, [onnx.parser.parse_function(text)])


def as_peer(held: Arrays, tokens: int, k: int, *, quantized: bool) -> ir.Model:
    """The layer as one node of ONNX Runtime, its weights in float32 or in 8 bits."""
    experts, hidden = held["b2"].shape
    given = ["x", "logits", "w1", "b1", "w2", "b2"]
    attributes = {"k": k, "activation_type": ACTIVATION.lower(), "normalize_routing_weights": 1}
    stored = dict(held)
    if quantized:
        given = ["x", "logits", "w1", "s1", "b1", "w2", "s2", "b2"]
        attributes["expert_weight_bits"] = 8
        for number in "12":
            w = held[f"w{number}"]
            w8, scale = quantize_weight(w.reshape(-1, w.shape[-1]))
            stored[f"w{number}"] = (w8.astype(np.int16) + 128).astype(np.uint8).reshape(w.shape)
            stored[f"s{number}"] = scale.reshape(w.shape[:-1])
    kind = "QMoE" if quantized else "MoE"
    node = helper.make_node(kind, given, ["y"], "layer", domain="com.microsoft", **attributes)
    inputs = {
        "x": (TensorProto.FLOAT, [tokens, hidden]),
        "logits": (TensorProto.FLOAT, [tokens, experts]),
    }
    return model_of([node], inputs, stored)


def of_all(held: Arrays, tokens: int) -> ir.Model:
    """Every expert for every token, each with products of its own: x and gates to y."""
    experts, hidden = held["b2"].shape
    nodes, stored, total = [], {"all": np.array([1] * experts, np.int64)}, ""
    parts = [f"gate{expert}" for expert in range(experts)]
    nodes.append(helper.make_node("Split", ["gates", "all"], parts, "split", axis=1))
    for e in range(experts):

        def add(op_type: str, *inputs: str, e: int = e) -> str:
            name = f"{op_type}{len(nodes)}_{e}"
            nodes.append(helper.make_node(op_type, inputs, [name], name))
            return name

        value = "x"
        for number in "12":
            stored[f"w{number}_{e}"] = held[f"w{number}"][e].T
            stored[f"b{number}_{e}"] = held[f"b{number}"][e]
            value = add("Add", add("MatMul", value, f"w{number}_{e}"), f"b{number}_{e}")
            value = add("Mul", value, add("Sigmoid", value)) if number == "1" else value
        value = add("Mul", value, parts[e])
        total = add("Add", total, value) if total else value
    nodes[-1].output[0] = "y"
    inputs = {
        "x": (TensorProto.FLOAT, [tokens, hidden]),
        "gates": (TensorProto.FLOAT, [tokens, experts]),
    }
    return model_of(nodes, inputs, stored)


def forms_of(model: ir.Model) -> Iterator[tuple[str, ir.Model]]:
    """The layer in float32, in INT8, and in 2:4 INT8."""
    yield FORMS[0], model
    yield FORMS[1], quantize_dynamic(model)
    yield FORMS[2], quantize_dynamic(prune(model)[0])


def gates_of(logits: np.ndarray, k: int) -> np.ndarray:
    """[tokens, experts], zeros where a token does not go."""
    found = route(logits, k, normalize=True)
    gates = np.zeros_like(logits)
    np.put_along_axis(gates, found.experts, found.gates, axis=1)
    return gates


@dataclass(frozen=True)
class Field:
    """Contestants in one race.

    Attributes:
        stack: closes sessions.
        folder: for files.
        threads: of each.
        members: so far, by name.
    """

    stack: ExitStack
    folder: Path
    threads: int
    members: dict[str, Contestant]

    def ours(self, name: str, model: ir.Model, feeds: Arrays) -> None:
        """Our engine of a model."""
        engine = build(model, threads=self.threads, race=False)
        session = self.stack.enter_context(Session(engine))
        self.members[name] = ours(session, feeds, name)

    def peer(self, name: str, model: ir.Model, feeds: Arrays) -> None:
        """ONNX Runtime on a model."""
        path = save_model(model, self.folder / f"{len(self.members)}.onnx")
        self.members[name] = peers.prepare("onnxruntime", path, feeds, self.threads)

    def y(self, name: str) -> np.ndarray:
        """What one of them computes."""
        return next(iter(self.members[name].outputs().values()))

    def race(self, duration_s: float) -> dict[str, Timing]:
        """All of them in turns."""
        results = race(list(self.members.values()), Schedule(duration_s, min_rounds=5))
        return dict(zip(self.members, results, strict=True))


def routed(size: Size, tokens: int, k: int, options: argparse.Namespace) -> Row:
    """One number of tokens and of experts a token."""
    random = np.random.default_rng(0)
    held = weights(size, random)
    x = random.standard_normal((tokens, size.hidden), np.float32)
    logits = random.standard_normal((tokens, size.experts), np.float32)
    feeds, dense_feeds = {"x": x, "logits": logits}, {"x": x, "gates": gates_of(logits, k)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        field = Field(stack, folder, options.threads, {})
        differ = {}
        for form, model in forms_of(as_node(MIXTURE, held, tokens, k)):
            field.ours(form, model, feeds)
            field.peer(f"onnxruntime {form}", model, feeds)
            differ[form] = difference(field.y(form), field.y(f"onnxruntime {form}"))
        for form, model in forms_of(of_all(held, tokens)):
            if form != FORMS[1]:
                field.ours(f"all {form}", model, dense_feeds)
                differ[f"all {form}"] = difference(field.y(f"all {form}"), field.y(form))
        for name, quantized in (("MoE", False), ("QMoE", True)):
            try:
                field.peer(name, as_peer(held, tokens, k, quantized=quantized), feeds)
                differ[name] = difference(field.y(name), field.y(FORMS[0]))
            except Error as error:
                print(f"{name}: {error}", file=sys.stderr)
        found = field.race(options.duration)
    return {
        "tokens": tokens,
        "k": k,
        "median_us": {name: timing.median_us for name, timing in found.items()},
        "spread_us": {name: timing.spread_us for name, timing in found.items()},
        "ratio": ratios(found),
        "difference": differ,
    }


def ratios(found: dict[str, Timing]) -> dict[str, float]:
    """How many times as fast ours is."""
    pairs = {
        "f32 / all": ("f32", ["all f32"]),
        "f32 / ONNX Runtime": ("f32", ["onnxruntime f32"]),
        "f32 / MoE": ("f32", ["MoE"]),
        "2:4 / all": ("2:4 INT8", ["all 2:4 INT8"]),
        "2:4 / INT8": ("2:4 INT8", ["INT8"]),
        "2:4 / ONNX Runtime": (
            "2:4 INT8",
            [name for name in found if name.startswith("onnxruntime") or name in ("MoE", "QMoE")],
        ),
    }
    result = {}
    for name, (mine, rivals) in pairs.items():
        there = [found[rival] for rival in rivals if rival in found]
        if there and mine in found:
            best = min(there, key=lambda timing: timing.median_us)
            result[name] = ratio(found[mine], best).median
    return result


def masked_mlp(size: Size, tokens: int, options: argparse.Namespace) -> list[Row]:
    """One layer, with more and more of its rows set."""
    random = np.random.default_rng(0)
    held = {name: array[0] for name, array in weights(size, random).items()}
    x = random.standard_normal((tokens, size.hidden), np.float32)
    rank = random.permutation(tokens)
    models = [each for each in forms_of(as_node(MASKED, held, tokens)) if each[0] != FORMS[1]]
    rows = []
    with ExitStack() as stack:
        sessions = {
            form: stack.enter_context(Session(build(m, threads=options.threads, race=False)))
            for form, m in models
        }
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for share in SHARES:
            feeds = {"x": x, "mask": rank < tokens * share // 100}
            field, differ = Field(stack, folder, options.threads, {}), {}
            for form, model in models:
                field.members[form] = ours(sessions[form], feeds, form)
                field.peer(f"onnxruntime {form}", model, feeds)
                differ[form] = difference(field.y(form), field.y(f"onnxruntime {form}"))
            found = field.race(options.duration)
            rows.append(
                {
                    "share": share,
                    "tokens": tokens,
                    "median_us": {name: timing.median_us for name, timing in found.items()},
                    "spread_us": {name: timing.spread_us for name, timing in found.items()},
                    "difference": differ,
                }
            )
    return rows


def difference(got: np.ndarray, want: np.ndarray) -> float:
    """The largest one, relative to the largest value."""
    return float(np.abs(got - want).max() / max(float(np.abs(want).max()), 1e-30))


def wrong(document: dict[str, Any]) -> list[str]:
    """Where an engine and ONNX Runtime computed different things from the same file."""
    bounds = dict(zip(FORMS, (FLOATS_DIFFER, INTEGERS_DIFFER, INTEGERS_DIFFER), strict=True))
    return [
        f"{row}: {name} differs by {row['difference'][name]:.1e}"
        for row in (*document["rows"], *document["masked"])
        for name, bound in bounds.items()
        if row["difference"].get(name, 0.0) > bound
    ]


def page(document: dict[str, Any]) -> str:
    """The figures as markdown."""
    size = document["size"]
    kinds = (*FORMS, "all f32", "all 2:4 INT8", *(f"onnxruntime {form}" for form in FORMS))
    heads = [
        *(f"routed {form}" for form in FORMS),
        *(f"all experts, {form}" for form in (FORMS[0], FORMS[2])),
        *(f"ONNX Runtime, {form}" for form in FORMS),
    ]
    lines = [
        *head(document),
        f"{size['experts']} experts of {size['hidden']} and {size['inner']} channels, {ACTIVATION}."
        " Milliseconds, medians of single calls in turns. Routed: our engine, one node. All"
        " experts: our engine, each expert for each token, gates as an input. ONNX Runtime: on the"
        " same files as the routed engines, by the node's function; MoE and QMoE are its own"
        " operators for experts, in float32 and with weights in 8 bits. Every call has the same"
        " tokens: few of them leave the weights of their experts in the cache, which those of all"
        " experts do not fit in.",
        "",
        f"| tokens | k | {' | '.join(heads)} | MoE | QMoE |",
        f"| --: | --: {'| --: ' * (len(kinds) + 2)}|",
    ]
    for row in document["rows"]:
        times = row["median_us"]
        cells = [_ms(times.get(kind)) for kind in (*kinds, "MoE", "QMoE")]
        lines.append(f"| {row['tokens']} | {row['k']} | {' | '.join(cells)} |")
    names = list(dict.fromkeys(name for row in document["rows"] for name in row["ratio"]))
    lines += [
        "",
        "How many times as fast: `a / b` is b's time over a's, from turns side by side. Of ONNX"
        " Runtime's forms, 2:4 is compared with the fastest.",
        "",
        f"| tokens | k | {' | '.join(names)} |",
        f"| --: | --: {'| --: ' * len(names)}|",
    ]
    for row in document["rows"]:
        cells = [f"{row['ratio'][n]:.2f}x" if n in row["ratio"] else "" for n in names]
        lines.append(f"| {row['tokens']} | {row['k']} | {' | '.join(cells)} |")
    lines += [
        "",
        "A masked MLP of the same channels; rows whose mask is set, in percent:",
        "",
        "| tokens | set | f32 | 2:4 INT8 | ONNX Runtime, f32 | ONNX Runtime, 2:4 INT8 |",
        "| --: | --: | --: | --: | --: | --: |",
    ]
    for row in document["masked"]:
        order = ("f32", "2:4 INT8", "onnxruntime f32", "onnxruntime 2:4 INT8")
        cells = [_ms(row["median_us"].get(name)) for name in order]
        lines.append(f"| {row['tokens']} | {row['share']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _ms(us: float | None) -> str:
    return "" if us is None else f"{us / 1e3:.3g}"


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main(arguments: Sequence[str]) -> int:
    """Returns 1 where an engine does not compute what ONNX Runtime does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=_numbers, default=[1, 16, 128, 512])
    parser.add_argument("--k", type=_numbers, default=[1, 2, 4, 8], help="experts a token")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--inner", type=int, default=3072)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--duration", type=float, default=5.0, help="timed seconds a race")
    parser.add_argument("--output", type=Path, default=ROOT, help="folder for the two files")
    options = parser.parse_args(arguments)
    size = Size(options.hidden, options.inner, options.experts)
    machine = f"{detect_host().model} ({host_target()}), threads: {options.threads}"
    title = "Routed experts and a masked MLP"
    document = about(title, "experts", arguments, [machine], ("onnxruntime",))
    document |= {"size": asdict(size), "rows": [], "masked": []}
    for tokens in options.tokens:
        for k in options.k:
            print(f"{tokens} tokens, {k} of {size.experts} experts", file=sys.stderr)
            document["rows"].append(routed(size, tokens, k, options))
            write(options.output, "experts", document, page(document))
    print("masked MLP", file=sys.stderr)
    document["masked"] = masked_mlp(size, max(options.tokens), options)
    write(options.output, "experts", document, page(document))
    problems = wrong(document)
    for line in problems:
        print(line, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
