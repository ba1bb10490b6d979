"""SmoothQuant: outliers of a transformer's activations go into the weights that read them.

    q = wq n,  k = wk n,  v = wv n          n = x_normalized * gamma + beta
=>  q = (wq s) n', ...                      n' = x_normalized * (gamma / s) + beta / s

A transformer's normalizations have a few channels that are many times the others; with one scale
for all, the others are rounded to little. What follows a normalization, and the output projection
of an attention (whose channels are those of the value projection), is equalized as in
`equalize.py`, with the alpha that does each group of layers best.

In a network that normalizes after each block (BERT), the normalization's result is also what the
next block adds to. There the layers read a second normalization of the same sum, with a gamma and
beta of its own, which is exact and costs the few microseconds of one normalization more.

The product after a GELU keeps its channels: no factor passes through a GELU.

Source: Xiao et al. 2023, arXiv:2211.10438.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from twofour.core.progress import Report, silent
from twofour.core.ranges import RangeOptions
from twofour.onnx_tools.capture import Samples
from twofour.onnx_tools.edit import Editor, constant, is_standard, operand, sole_use
from twofour.onnx_tools.eligible import is_layer
from twofour.onnx_tools.equalize import Equalized, equalize

_NORMALIZATIONS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class _Split:
    """A normalization whose layers read a copy.

    Attributes:
        value: its result, for all others.
        copies: the nodes of the copy; the last one makes what the layers read.
        scaled: input of the first of them that smoothing changes.
    """

    value: ir.Value
    copies: tuple[ir.Node, ...]
    scaled: ir.Value | None

    def undo(self, graph: ir.Graph) -> None:
        """Lets the layers read the one result again."""
        self.copies[-1].outputs[0].replace_all_uses_with(self.value)
        graph.remove(reversed(self.copies), safe=True)


def smooth(
    model: ir.Model,
    samples: Samples,
    options: RangeOptions,
    progress: Report = silent,
) -> tuple[Equalized, ...]:
    """Equalizes what follows normalizations, and the heads of attentions.

    Args:
        model: prepared and float; changed.
        samples: what it will see.
        options: how activations will be quantized.
        progress: called with the samples done.

    Returns:
        What became of each group of channels that layers read together.

    Raises:
        InputError: the data does not fit the model's inputs, or it or a value is not finite.
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    editor = Editor(model.graph)
    splits = [_split(editor, node) for node in list(model.graph)]
    done = equalize(model, samples, options, normalized=True, progress=progress)
    for split in splits:
        if split is not None and split.scaled in split.copies[0].inputs:  # a factor replaces it
            split.undo(model.graph)
    return done


def _split(editor: Editor, node: ir.Node) -> _Split | None:
    """Gives the layers that read a normalization a copy of it, if others read it, too."""
    nodes = _normalization(node)
    value = node.outputs[0]
    mine = [use for use in value.uses() if use.idx == 0 and is_layer(use.node)]
    others = value.is_graph_output() or len(mine) < len(value.uses())
    if not nodes or not mine or not others:
        return None
    copies: list[ir.Node] = []
    for each in nodes:
        inputs = list(each.inputs)
        if copies:
            inputs = [copies[-1].outputs[0] if v is nodes[0].outputs[0] else v for v in inputs]
        old = each.outputs[0]
        output = ir.Value(name=editor.name(f"{old.name}_smooth"), type=old.type, shape=old.shape)
        name = editor.name(f"{each.name}_smooth")
        attributes = list(each.attributes.values())
        copies.append(ir.Node("", each.op_type, inputs, attributes, outputs=[output], name=name))
    node.append(copies)
    for use in mine:
        use.node.replace_input_with(use.idx, copies[-1].outputs[0])
    return _Split(value, tuple(copies), nodes[0].inputs[_factor_of(nodes[0])])


def _normalization(node: ir.Node) -> tuple[ir.Node, ...]:
    """The nodes that give a normalization its gamma and beta, if this is the last of them."""
    if is_standard(node, *_NORMALIZATIONS):
        return (node,) if len(node.outputs) == 1 and constant(operand(node, 1)) is not None else ()
    if not is_standard(node, "Add"):
        return ()
    computed = [value for value in node.inputs if value is not None and constant(value) is None]
    before = computed[0].producer() if len(computed) == 1 else None
    if before is None or not is_standard(before, "Mul") or not sole_use(computed[0]):
        return ()
    gamma = constant(operand(before, _factor_of(before)))
    vector = gamma is not None and gamma.size > 1 and gamma.size == gamma.shape[-1]
    return (before, node) if vector else ()


def _factor_of(node: ir.Node) -> int:
    """Which input gamma is."""
    return 1 if constant(operand(node, 1)) is not None or node.op_type != "Mul" else 0
