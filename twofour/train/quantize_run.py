"""Rounds what a running forward reads, at the sites that were traced.

Hooks on the model's modules tell which module runs. The outermost one enters a mode, which sees
every PyTorch function that is called and replaces the arguments that are to be rounded. So the
model keeps its modules, parameters and names. What is needed at run time hangs on the model: a copy
of it has its own quantizers, and a part of it that is called by itself is rounded too.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode

from twofour.core.errors import InputError
from twofour.core.ranges import RangeOptions
from twofour.train.explicit_attention import WRITTEN_OUT, why_composite
from twofour.train.fake_quant import FakeQuant
from twofour.train.observe import Observer
from twofour.train.operators import WEIGHTED
from twofour.train.quantize_plan import Places, QuantizerOptions, Read
from twofour.train.trace import Graph
from twofour.train.watch import Frames, Place, Site, Watch, modules_that_call, name_of

State = Literal["off", "collect", "on"]
NAME = "quantizers"
"""Of the submodule that holds them."""

_CONTAINERS = nn.Sequential | nn.ModuleList | nn.ModuleDict


class Quantizers(nn.ModuleDict):
    """The quantizers of a model by name, and the plan of where they round.

    Args:
        places: the plan.
        graph: the traced run.
        options: of the Quantizer.

    Attributes:
        state: what a forward does: nothing, collect, or round.
        observers: name of a tensor -> what was collected.
        run: the forward that is under way; one at a time.
    """

    def __init__(
        self,
        places: Places,
        graph: Graph,
        options: QuantizerOptions,
    ) -> None:
        """Makes a quantizer for each scale."""
        learned, symmetric = options.learned_scales, RangeOptions("minmax", "int8")
        super().__init__(
            {
                name: FakeQuant(
                    symmetric if place.symmetric else options.ranges,
                    learned=learned and place.known is None,
                )
                for name, place in places.scales.items()
            }
            | {
                name: FakeQuant(symmetric, place.axis, learned)
                for name, place in places.weights.items()
            }
        )
        self.places = places
        self.sites = graph.sites
        self.modules_called = dict(graph.modules)
        self.written_out = {"multi_head_attention_forward"}
        if options.attention:
            self.written_out.add("scaled_dot_product_attention")
        self.state: State = "off"
        self.run: _Run | None = None
        self.observers: dict[str, Observer] = {}
        self.reads_of = Counter(r.origin for reads in places.reads.values() for r in reads)
        self.names: dict[str, frozenset[str]] = {
            path: WEIGHTED | {site.function for site in places.reads if site.path == path}
            for path in graph.modules
        }

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not under way."""
        return {**self.__dict__, "run": None}

    def get(self, name: str) -> FakeQuant:
        """The quantizer of a name."""
        found = self[name]
        assert isinstance(found, FakeQuant)
        return found

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *a: Any) -> None:
        """With scales from a checkpoint a model is rounded."""
        if any(name.startswith(prefix) for name in state_dict):
            self.state = "on"
        super()._load_from_state_dict(state_dict, prefix, *a)


class _Begin:
    """A hook before a module's forward."""

    def __init__(self, path: str, quantizers: Quantizers) -> None:
        self.path, self.quantizers = path, quantizers

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: object) -> None:
        run = self.quantizers.run
        if run is not None and not run.under_way():
            run.leave()
            run = None
        if run is None:
            if self.quantizers.state == "off":
                return
            _require_alone(self.quantizers, self.path)
            run = self.quantizers.run = _Run(self.quantizers, _caller())
            run.enter()
        run.begin(self.path)


class _End:
    """A hook after it, also when it failed."""

    def __init__(self, path: str, quantizers: Quantizers) -> None:
        self.path, self.quantizers = path, quantizers

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: object, outputs: object) -> None:
        run = self.quantizers.run
        if run is None or run.path != self.path:
            return
        run.end()
        if run.path is None:
            run.leave()


def attach(model: nn.Module, quantizers: Quantizers) -> None:
    """Makes the quantizers part of the model, and lets its modules tell when they run."""
    holder = next((m for m in model.modules() if not isinstance(m, _CONTAINERS)), model)
    for path, module in modules_that_call(model):
        module.register_forward_pre_hook(_Begin(path, quantizers))
        module.register_forward_hook(_End(path, quantizers), always_call=True)
    holder.add_module(NAME, quantizers)


def detach(model: nn.Module) -> None:
    """Undoes `attach`, in a copy of the model too."""
    for module in list(model.modules()):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            ours = [key for key, hook in hooks.items() if isinstance(hook, (_Begin, _End))]
            for key in ours:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
        if isinstance(module._modules.get(NAME), Quantizers):
            delattr(module, NAME)


def quantizers_of(model: nn.Module) -> Quantizers | None:
    """Those of a model, wrapped or not."""
    return next((m for m in model.modules() if isinstance(m, Quantizers)), None)


def _caller() -> FrameType:
    """The frame of PyTorch that calls a hook, behind the wrapper that keeps it uncompiled."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_globals.get("__name__") == __name__
        or str(frame.f_globals.get("__name__")).startswith("torch._dynamo")
    ):
        frame = frame.f_back
    return frame


def _require_alone(quantizers: Quantizers, path: str) -> None:
    """Refuses a part that runs several times in the model, and so has several sets of scales."""
    within = (s for s in quantizers.places.reads if path and f"{s.path}.".startswith(f"{path}."))
    if any(site.call for site in within):
        raise InputError(
            f"{path} was called by itself, and runs several times in the model",
            ["each of its calls there has scales of its own, and which are meant cannot be told"],
            "call the model; do not recompute this part in activation checkpoints",
        )


class _Run(Frames):
    """One forward of a model, or of the part of it that was called.

    Args:
        quantizers: of the model.
        frame: the Python frame that it lasts as long as.
    """

    def __init__(self, quantizers: Quantizers, frame: FrameType) -> None:
        super().__init__()
        self.quantizers = quantizers
        self._watch = Watch(self)
        self._frame = frame
        self._rounded: dict[str, tuple[Tensor, Tensor, int, object]] = {}

    def under_way(self) -> bool:
        """Whether the call that began it has not ended: PyTorch tells no hook of Ctrl-C."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None

    def enter(self) -> None:
        """Begins it."""
        self._watch.__enter__()  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """Ends it; where it cannot be taken away, since others began later, it does nothing."""
        self.quantizers.run = None
        if _get_current_function_mode() is self._watch:  # type: ignore[no-untyped-call]
            self._watch.__exit__(None, None, None)

    def called(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], watch: Watch
    ) -> Any:
        """Runs the function on rounded arguments."""
        name, written_out = name_of(func), self.quantizers.written_out
        watched = name in written_out or name in self.quantizers.names.get(self.path or "", ())
        if not watched or not self.under_way():
            return func(*args, **kwargs)
        if name in written_out:
            if name.startswith("scaled") or why_composite(*args, **kwargs) is None:
                with watch:
                    return WRITTEN_OUT[name](*args, **kwargs)
        site = self.next_site(name)
        if site is None:
            return func(*args, **kwargs)
        self._require_known(site)
        reads = self.quantizers.places.reads.get(site)
        if reads is None:
            return func(*args, **kwargs)
        changed = self.quantizers.places.changes.get(site, ())
        given: list[Any] = list(args)
        named = dict(kwargs)
        sources: list[tuple[Tensor, Tensor]] = []
        for read in reads:
            x = _argument(given, named, read.place, site)
            rounded = self._round(read, x, fresh=read.place in changed)
            _replace(given, named, read.place, rounded)
            if read.place in changed and rounded is not x:
                sources.append((x, rounded))
        result = func(*given, **named)
        for x, rounded in sources:  # what the function changed in place is the model's tensor
            x.copy_(rounded)
            result = x if result is rounded else result
        return result

    def _round(self, read: Read, x: Tensor, fresh: bool) -> Tensor:
        quantizer = self.quantizers.get(read.quantizer)
        if self.quantizers.state == "collect":
            self._collect(read, quantizer, x)
            return x
        readers = self.quantizers.reads_of[read.origin]
        if not read.origin or readers == 1 or fresh:
            rounded: Tensor = quantizer(x)
            return rounded
        kept = _what_is_kept()
        source, rounded, left, before = self._rounded.pop(read.origin, (None, x, readers, kept))
        if source is not x or before != kept:
            rounded = quantizer(x)
        if left > 1:
            self._rounded[read.origin] = (x, rounded, left - 1, kept)
        return rounded

    def _collect(self, read: Read, quantizer: FakeQuant, x: Tensor) -> None:
        if not read.origin:
            quantizer.set_from(x)
            return
        if self._rounded.get(read.origin, (None,))[0] is x:
            return
        self._rounded[read.origin] = (x, x, 0, None)
        known = self.quantizers.observers
        if read.origin not in known:
            known[read.origin] = Observer(x.device)
        known[read.origin].add(x)

    def _require_known(self, site: Site) -> None:
        """Refuses a place in the forward that the traced run did not come to."""
        known = self.quantizers.sites.get(site)
        often = self.quantizers.modules_called.get(site.path, 0)
        if site in self.quantizers.places.reads and known != self.last:
            got = f"after {self.last or 'no module'}, not after {known or 'none'}"
        elif known is None and often and site.function in WEIGHTED:
            got = "which was not called then"
        else:
            return
        raise InputError(
            f"the model left the path it was traced on at {site}, {got}",
            [
                f"expected {often} calls of {site.path or 'the model'}, and in each the "
                "functions of the example inputs",
                "got another one: the forward depends on sizes, values or the mode",
            ],
            "make the Quantizer with example inputs that take this path",
        )


def _what_is_kept() -> tuple[bool, object]:
    """What is kept for the gradient: an activation checkpoint has hooks of its own for it."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), hooks


def _argument(args: list[Any], kwargs: dict[str, Any], place: Place, site: Site) -> Tensor:
    """The tensor at a place."""
    held: Any = kwargs if isinstance(place[0], str) else args
    try:
        for key in place:
            held = held[key]
    except (IndexError, KeyError):
        held = None
    if isinstance(held, Tensor):
        return held
    raise InputError(
        f"the model left the path it was traced on at {site}",
        [f"expected a tensor as argument {place}, got {type(held).__name__}"],
        "make the Quantizer with example inputs that take this path",
    )


def _replace(args: list[Any], kwargs: dict[str, Any], place: Place, x: Tensor) -> None:
    held: Any = kwargs if isinstance(place[0], str) else args
    if len(place) == 2:
        inner = list(held[place[0]])
        inner[int(place[1])] = x
        held[place[0]] = inner
    else:
        held[place[0]] = x
