"""Placed operators -> kernels, packed weights, calls: the last step before an engine.

Kernels are kept by their text, so layers of equal shape and configuration share one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.compiler.conv_problems import conv_problem
from twofour.compiler.emit_nd import nd_shape, nd_table, nd_text
from twofour.compiler.emit_plugin import Room, emit_plugin
from twofour.compiler.layers import conv_layer, extent_of, plain_layer, precision_of
from twofour.compiler.layout import ALIGNMENT, Tensor
from twofour.compiler.lower import Place, Placed, images_of
from twofour.compiler.native import (
    AttentionOp,
    ConvOp,
    MapOp,
    NativeOp,
    NormOp,
    PoolOp,
    RowsOp,
)
from twofour.compiler.native_nd import NdOp
from twofour.compiler.native_plugin import PluginOp
from twofour.compiler.native_resize import ResizeOp
from twofour.compiler.rivals import FloatForm, Rivals
from twofour.compiler.row_problems import (
    attention_macs,
    attention_problem,
    attention_scores,
    norm_problem,
    rows_problem,
    rows_work,
    tensor,
)
from twofour.compiler.tune import Choice, Tuner
from twofour.compiler.work import walked_bytes
from twofour.core.abi import ARENA, WEIGHTS
from twofour.core.errors import UnsupportedError
from twofour.core.patterns import is_pattern
from twofour.core.sizes import Count
from twofour.engine import Candidate, Layer, TensorInfo, Work
from twofour.kernels.cpu.attention import emit_attention, pack_attention
from twofour.kernels.cpu.llvm import Source, renamed
from twofour.kernels.cpu.norm import emit_norm, pack_norm
from twofour.kernels.cpu.pointwise import MapConstants, MapProblem, View, emit_map
from twofour.kernels.cpu.pool import PoolProblem, emit_pool, pack_average, pack_mean
from twofour.kernels.cpu.pool_chain import emit_pool_chain
from twofour.kernels.cpu.problem import Strides, merge_groups
from twofour.kernels.cpu.program import Call, Operand
from twofour.kernels.cpu.quantize_rows import emit_rows
from twofour.kernels.cpu.resize import ResizeProblem, emit_resize, pack_resize
from twofour.kernels.cpu.tactic import Tactic

Array = NDArray[Any]


@dataclass(frozen=True)
class _Kernel:
    """A kernel ready to be called.

    Attributes:
        symbol: its function.
        constants: packed weights, scales, zero points.
        pieces: row pieces.
        panels: panels.
        x_offset: where its input starts in the arena.
        by_panels: whether several threads share its panels; None where that was not measured.
    """

    symbol: str
    constants: Array
    pieces: Count
    panels: int
    x_offset: int
    by_panels: bool | None = None


@dataclass
class Emitter:
    """Collects code and constants of one engine.

    Attributes:
        tuner: chooses convolution kernels.
        sparsity: "enable", "force" or "disable".
        workspace_bytes: what a kernel may take beside operands and weights, for each thread; None
            for any amount.
        floats: why a layer stays float32 though bfloat16 is allowed, by its name.
        rivals: the float32 forms of products in bfloat16.
        sources: kernels by symbol.
        layers: what `explain` will show, in order.
    """

    tuner: Tuner
    sparsity: str
    floats: Mapping[str, str]
    workspace_bytes: int | None
    rivals: Rivals
    sources: dict[str, Source] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    _constants: list[Array] = field(default_factory=list)
    _constant_bytes: int = 0
    _kept: dict[str, int] = field(default_factory=dict)
    _arena_bytes: int = 0
    _workspace_bytes: int = 0

    def weights(self) -> NDArray[np.uint8]:
        """All constants in one block."""
        return np.concatenate(self._constants) if self._constants else np.zeros(0, np.uint8)

    @property
    def memory_bytes(self) -> int:
        """Of the network that is emitted, workspaces of plugins among them."""
        if not self._workspace_bytes:
            return self._arena_bytes
        return self._workspaces_at + self._workspace_bytes

    @property
    def _workspaces_at(self) -> int:
        """Where they all begin: behind the activations."""
        return -(-self._arena_bytes // ALIGNMENT) * ALIGNMENT

    def begin(self, arena_bytes: int) -> None:
        """Goes on with a network of that much activation memory."""
        self._arena_bytes, self._workspace_bytes = arena_bytes, 0

    def emit(self, placed: Placed, bindings: dict[str, int]) -> list[Call]:
        """One operator; its last call is that of its last new layer.

        Args:
            placed: the operator and its places.
            bindings: plain tensor -> its index in the step's table of pointers.
        """
        op = placed.op
        if isinstance(op, PluginOp):
            room = Room(self._plugin_kernel, self._keep_once, self._workspace, bindings)
            calls, layers = emit_plugin(op, placed, self.tuner, room)
            self.layers += layers
            return calls
        if isinstance(op, NdOp):
            return [self._nd(op, placed, bindings)]
        if isinstance(op, PoolOp) and op.also:
            return [self._pool_chain(op, placed)]
        return [self._call(op, placed, bindings)]

    def _call(self, op: NativeOp, placed: Placed, bindings: dict[str, int]) -> Call:
        """An operator of one kernel."""
        if isinstance(op, ConvOp):
            kernel = self._conv(op, placed)
        elif isinstance(op, PoolOp):
            kernel = self._pool(op, placed)
        elif isinstance(op, NormOp):
            kernel = self._norm(op, placed)
        elif isinstance(op, RowsOp):
            kernel = self._rows(op, placed)
        elif isinstance(op, ResizeOp):
            kernel = self._resize(op, placed)
        elif isinstance(op, AttentionOp):
            kernel = self._attention(op, placed)
        else:
            assert isinstance(op, MapOp)
            kernel = self._map(op, placed)

        def operand(place: Place, offset: int | None = None) -> Operand:
            if isinstance(place, TensorInfo):
                return Operand(bindings[place.name])
            return Operand(ARENA, place.at() if offset is None else offset)

        y = operand(placed.y)
        second = placed.also[0] if placed.also else placed.r
        r = y if second is None else operand(second)
        x, w = (
            operand(placed.x, kernel.x_offset),
            Operand(WEIGHTS, self._keep_once(kernel.constants)),
        )
        work = kernel.pieces, kernel.panels
        return Call(kernel.symbol, x, w, y, r, *work, by_panels=kernel.by_panels)

    def _keep(self, constants: Array) -> int:
        """Appends constants, aligned; returns their offset."""
        offset = self._constant_bytes
        padded = -(-constants.size // ALIGNMENT) * ALIGNMENT
        self._constants.append(np.pad(constants, (0, padded - constants.size)))
        self._constant_bytes += padded
        return offset

    def _kernel(self, text: str, *, vectorize: bool = False) -> str:
        """The symbol of a kernel, given with the name `kernel`; kept once."""
        symbol = "k" + hashlib.sha256(text.encode()).hexdigest()[:16]
        if symbol not in self.sources:
            self.sources[symbol] = Source(renamed(text, symbol), vectorize)
        return symbol

    def _plugin_kernel(self, source: Source) -> str:
        return self._kernel(source.text, vectorize=source.vectorize)

    def _workspace(self, name: str, size_bytes: int) -> int:
        """Where a workspace lies: that of one operator may be that of the next."""
        self._require_workspace(name, size_bytes)
        self._workspace_bytes = max(self._workspace_bytes, size_bytes)
        return self._workspaces_at

    def _conv(self, op: ConvOp, placed: Placed) -> _Kernel:
        w, groups = merge_groups(op.w, op.groups)
        problem = conv_problem(op, placed, w, groups)
        choice, candidates = self.tuner.choose(
            replace(problem, open_rows=False),
            w,
            op.epilogue,
            op.x_zero,
            self._wanted(w, problem.dtype),
        )
        config, kernel = choice.config, choice.tactic.kernel
        symbol = self._kernel(self.tuner.text(problem, choice.tactic, config))
        constants = kernel.pack(w, problem, config, op.epilogue, op.x_zero)
        layer = conv_layer(op, placed, problem, choice, candidates, constants.size)
        note = self.floats.get(op.name, "") if problem.dtype == "float32" else ""
        if problem.dtype == "bfloat16" and not problem.depthwise:
            floats = self._in_float32(op, placed, (w, groups), choice)
            layer = replace(layer, candidates=(*candidates, *floats))
        self.layers.append(replace(layer, notes=(*layer.notes, note)) if note else layer)
        assert isinstance(placed.x, Tensor)
        x_offset = placed.x.at(*op.window.pads[:2])
        pieces, panels = kernel.work(problem, config)
        images = placed.x.open_batch
        count: Count = pieces if images is None else pieces // images.usual * images
        return _Kernel(symbol, constants, count, panels, x_offset, choice.by_panels)

    def _in_float32(
        self, op: ConvOp, placed: Placed, weights: tuple[Array, int], choice: Choice
    ) -> tuple[Candidate, ...]:
        """What the float32 form of a product takes; nothing where nothing is timed."""
        if choice.time_us is None:
            return ()
        assert isinstance(placed.x, Tensor)
        wide = placed.x.in_float32(op.window.stride[1])
        problem = conv_problem(op, replace(placed, x=wide), *weights)
        form = FloatForm(op, replace(problem, open_rows=False), weights[0], placed.x, wide)
        return self.rivals.time(form, choice.time_us, self._wanted(weights[0], "float32"))

    def _wanted(self, w: Array, dtype: str) -> Callable[[Tactic], str]:
        """Why a tactic is ruled out by the user's choice of sparsity."""
        sparse = is_pattern(w, "2:4") or is_pattern(w, "4:8")

        def wanted(tactic: Tactic) -> str:
            if tactic.pattern and self.sparsity == "disable":
                return "sparse kernels were ruled out: --sparsity disable"
            possible = sparse and (dtype == "int8" or self.tuner.target.isa == "avx512vnni")
            if not tactic.pattern and self.sparsity == "force" and possible:
                return "dense kernels were ruled out: --sparsity force"
            return ""

        return wanted

    def _pool(self, op: PoolOp, placed: Placed) -> _Kernel:
        x, y = placed.x, placed.y
        assert isinstance(x, Tensor)
        y_strides = (
            y.strides
            if isinstance(y, Tensor)
            else Strides(x.channels * 4, x.channels * 4, x.channels * 4)
        )
        out = y.kind if isinstance(y, Tensor) else "float32"
        problem = PoolProblem(
            op.op,
            x.batch,
            x.height,
            x.width,
            x.channels,
            x.kind,
            x.strides,
            y_strides,
            op.window,
            out,
            op.include_pad,
        )
        pixels = x.height * x.width
        if op.op == "average":
            constants = pack_average(op.scale, op.x_zero, op.y_zero, op.window)
        else:
            constants = pack_mean(op.scale / pixels, pixels * op.x_zero, op.y_zero)
        symbol = self._kernel(emit_pool("kernel", problem))
        self.layers.append(plain_layer(op, placed, "pool"))
        pieces = problem.pieces // x.batch * x.count
        return _Kernel(symbol, constants, pieces, problem.blocks, x.at())

    def _pool_chain(self, op: PoolOp, placed: Placed) -> Call:
        """Maxima of maxima: their operands are entries of a table."""
        x, *results = map(tensor, (placed.x, placed.y, *placed.also))
        size = (x.batch, x.height, x.width, x.channels)
        y, *further = (result.strides for result in results)
        problem = PoolProblem(op.op, *size, x.kind, x.strides, y, op.window, further=tuple(further))
        symbol = self._kernel(emit_pool_chain("kernel", problem))
        self.layers.append(plain_layer(op, placed, "pool"))
        table = tuple(Operand(ARENA, place.at()) for place in (x, *results))
        w = Operand(WEIGHTS)
        return Call(symbol, table[0], w, table[1], table[1], x.count, problem.blocks, table)

    def _resize(self, op: ResizeOp, placed: Placed) -> _Kernel:
        x, y = tensor(placed.x), tensor(placed.y)
        problem = ResizeProblem(x.batch, y.height, y.width, x.channels, x.strides, y.strides)
        symbol = self._kernel(emit_resize("kernel", problem))
        self.layers.append(plain_layer(op, placed, "resize"))
        constants = pack_resize(problem, op.rows, op.columns)
        return _Kernel(symbol, constants, x.count * y.height, 1, x.at())

    def _map(self, op: MapOp, placed: Placed) -> _Kernel:
        before, after = op.channel_pads
        x_view, y_view = _view(placed.x), _view(placed.y)
        batch, height, width, channels = extent_of(placed.y)
        x_view = replace(x_view, row=x_view.row * op.steps[0], pixel=x_view.pixel * op.steps[1])
        problem = MapProblem(
            op.op,
            batch,
            height,
            width,
            channels - before - after,
            x_view,
            y_view,
            _second(placed.r, (height, width)) if placed.r is not None else None,
            op.activation.name,
            before,
            after,
        )
        symbol = self._kernel(emit_map("kernel", problem), vectorize=True)
        if op.op_type == "Cast":
            held = [len(self.layers)] if isinstance(placed.x, Tensor) else []
            self.rivals.casts.setdefault(op.y, []).extend(held)
        self.layers.append(plain_layer(op, placed, "pointwise"))
        x_at = placed.x.at() if isinstance(placed.x, Tensor) else 0
        pieces = images_of(placed.y) * height
        return _Kernel(symbol, op.constants.pack(), pieces, 1, x_at)

    def _norm(self, op: NormOp, placed: Placed) -> _Kernel:
        problem = norm_problem(op, placed)
        constants = pack_norm(op.gamma, op.beta, MapConstants(y_scale=op.scale, y_zero=op.zero))
        symbol = self._kernel(emit_norm("kernel", problem, self.tuner.target.isa))
        self.layers.append(plain_layer(op, placed, "norm"))
        x = tensor(placed.x)
        return _Kernel(symbol, constants, x.count * (x.height * x.width), 1, x.at())

    def _rows(self, op: RowsOp, placed: Placed) -> _Kernel:
        symbol = self._kernel(emit_rows("kernel", rows_problem(op, placed)))
        self.layers.append(plain_layer(op, placed, "rows"))
        pieces, panels = rows_work(op, placed)
        none = np.zeros(0, np.uint8)
        return _Kernel(symbol, none, pieces, panels, tensor(placed.x).at(), by_panels=panels > 1)

    def _require_workspace(self, name: str, needed: int) -> None:
        """Refuses a kernel that takes more memory of its own than the user allows."""
        if self.workspace_bytes is not None and needed > self.workspace_bytes:
            raise UnsupportedError(
                f"no tactic for {name!r} within the workspace",
                [f"it needs {needed} bytes, {self.workspace_bytes} are allowed"],
                f"allow more: --workspace {needed}",
            )

    def _attention(self, op: AttentionOp, placed: Placed) -> _Kernel:
        problem, offsets = attention_problem(op, placed)
        self._require_workspace(op.name, problem.plan(self.tuner.target.isa).scratch_bytes)
        symbol = self._kernel(emit_attention("kernel", problem, self.tuner.target.isa))
        heads = f"{op.heads} heads of {problem.d}"
        macs, scores = attention_macs(problem), attention_scores(problem)
        self.layers.append(plain_layer(op, placed, "attention", heads, macs, scores))
        constants = pack_attention(op.scales, offsets)
        return _Kernel(symbol, constants, problem.pieces, 1, tensor(placed.x).at())

    def _nd(self, op: NdOp, placed: Placed, bindings: dict[str, int]) -> Call:
        """A small operator: all its operands are entries of a table."""
        text, pieces = nd_text(op, placed)
        symbol = self._kernel(text, vectorize=True)
        table = nd_table(op, placed, bindings, self._keep_once)
        precision, work = precision_of(placed.y), Work(walked_bytes(op))
        self.layers.append(
            Layer(op.name, op.op_type, "nd", shape=nd_shape(op), precision=precision, work=work)
        )
        first, last, w = table[0], table[-2], Operand(WEIGHTS)
        return Call(symbol, first, w, last, last, pieces, 1, table)

    def _keep_once(self, constant: Array) -> int:
        """The offset of a constant that several operators may read."""
        held = np.ascontiguousarray(constant).reshape(-1).view(np.uint8)
        key = hashlib.sha256(held.data).hexdigest()
        if key not in self._kept:
            self._kept[key] = self._keep(held)
        return self._kept[key]


def _second(place: Place, size: tuple[int, int]) -> View:
    """The second operand; one pixel is that of every place of an image."""
    _, height, width, _ = extent_of(place)
    view = _view(place)
    return view if (height, width) == size else replace(view, row=0, pixel=0)


def _view(place: Place) -> View:
    """A place as the pointwise kernels see it."""
    if isinstance(place, Tensor):
        return place.view
    _, height, width, channels = extent_of(place)
    return View.plain(place.dtype, channels, height, width)
