"""What a model computes, as a graph of the PyTorch functions that its forward calls.

The model is run once, as it is, and every function is noted: who called it, what it read and what
it gave. The model stays the user's own. A function is known by its site (`watch.py`), which is the
same in each run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twofour.core.errors import InputError
from twofour.train.batches import device_of, to_device
from twofour.train.batches import forward as call_with
from twofour.train.calibration import as_it_was
from twofour.train.explicit_attention import WRITTEN_OUT, why_composite
from twofour.train.watch import Frames, Place, Site, Watch, modules_that_call, name_of

# In eval mode they give what they got.
_SAME = frozenset(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout clone contiguous to "
    "float type type_as detach requires_grad".split()
)
# Of a size that inputs decide: never constant.
_SIZED = ("expand", "expand_as", "broadcast_to", "repeat")


@dataclass(eq=False)
class Value:
    """A tensor between calls.

    Attributes:
        shape: in the traced run.
        floating: whether it holds real numbers.
        constant: it depends on no input of the model.
        parameter: its name, if it is one of the model's parameters.
        producer: what computed it, None for inputs and what the model owns.
        output: which of the producer's results.
        readers: who reads it, and where.
        returned: whether the model returns it.
    """

    shape: tuple[int, ...]
    floating: bool
    constant: bool
    parameter: str | None = None
    producer: Call | None = None
    output: int = 0
    readers: list[tuple[Call, Place]] = field(default_factory=list)
    returned: bool = False


@dataclass(eq=False)
class Call:
    """One function that was called with tensors and gave some.

    Attributes:
        site: where.
        inputs: place -> tensor, in order.
        outputs: its results, and what it changed in place.
        settings: all arguments that are no tensors.
        changed: the places of arguments that it changed in place.
    """

    site: Site
    inputs: dict[Place, Value]
    outputs: list[Value]
    settings: dict[Place, Any]
    changed: tuple[Place, ...] = ()

    @property
    def function(self) -> str:
        """Its name."""
        return self.site.function

    def input(self, place: int, name: str = "input") -> Value | None:
        """The tensor given there or by that name."""
        return self.inputs.get((place,)) or self.inputs.get((name,))

    def setting(self, place: int, name: str, default: Any = None) -> Any:
        """What is no tensor, given there or by that name."""
        for key in ((place,), (name,)):
            if key in self.settings:
                return self.settings[key]
        return default


@dataclass
class Graph:
    """The calls of one run that lead to its results, in order.

    Attributes:
        calls: all of them.
        inputs: the tensors that the model was given.
        sites: all of them, also of calls that lead nowhere -> the module that was called last
            before, by the one that the site is in.
        modules: how often each module was called, by path.
        composite: site -> why a function that could be several stays one.
    """

    calls: list[Call]
    inputs: list[Value]
    sites: Mapping[Site, str]
    modules: dict[str, int]
    composite: dict[Site, str]


def trace(model: nn.Module, example_inputs: Any, attention: bool = True) -> Graph:
    """Runs the model once in eval mode, without gradients, and notes what it calls.

    Args:
        model: not wrapped; left as it was.
        example_inputs: a batch as for `batches.forward`; a tuple holds all arguments.
        attention: `scaled_dot_product_attention` is written out as products and a softmax.

    Raises:
        InputError: the model returns nothing that depends on its inputs.
    """
    recorder = _Recorder(model, attention)
    inputs = to_device(example_inputs, device_of(model))
    for tensor in tensors_in(inputs):
        recorder.take_input(tensor)
    with as_it_was(model), torch.no_grad(), _framed(model, recorder), Watch(recorder):
        outputs = call(model, inputs)
    graph = recorder.graph(outputs)
    if not graph.calls:
        raise InputError(
            f"{type(model).__name__} computes nothing from its inputs",
            ["no function of PyTorch leads from the example inputs to what it returns"],
            "give example inputs as the model takes them",
        )
    return graph


def call(model: nn.Module, inputs: Any) -> Any:
    """The model with example inputs: a tuple or a list holds all its arguments."""
    return model(*inputs) if isinstance(inputs, (tuple, list)) else call_with(model, inputs)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """All tensors of nested tuples, lists, mappings and dataclasses."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from tensors_in(value)
    elif is_dataclass(tree) and not isinstance(tree, type):
        for each in fields(tree):
            yield from tensors_in(getattr(tree, each.name))


@contextmanager
def _framed(model: nn.Module, frames: Frames) -> Iterator[None]:
    """Inside, each module tells when it begins and ends."""
    handles = []
    for path, module in modules_that_call(model):
        handles.append(module.register_forward_pre_hook(lambda m, x, path=path: frames.begin(path)))
        handles.append(module.register_forward_hook(lambda m, x, y: frames.end()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(Frames):
    """Notes each call with what it read and gave."""

    def __init__(self, model: nn.Module, attention: bool) -> None:
        super().__init__()
        self._written_out = {"multi_head_attention_forward"}
        if attention:
            self._written_out.add("scaled_dot_product_attention")
        self._kept: list[Tensor] = []  # an id is one tensor's as long as that lives
        self._values: dict[int, Value] = {}
        self._sharing: dict[int, list[int]] = {}  # memory -> the tensors in it
        self._calls: list[Call] = []
        self._inputs: list[Value] = []
        self._sites: dict[Site, str] = {}
        self._composite: dict[Site, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) not in self._values:
                self._take(parameter, constant=True).parameter = name
        for module in model.modules():
            for tensor in tensors_in((dict(module._buffers), dict(vars(module)))):
                if id(tensor) not in self._values:
                    self._take(tensor, constant=True)

    def take_input(self, tensor: Tensor) -> None:
        """Notes a tensor that the model is given."""
        self._inputs.append(self._take(tensor, constant=False))

    def called(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], watch: Watch
    ) -> Any:
        """Runs the function, or what it is written out as, and notes it."""
        name = name_of(func)
        if name in self._written_out:
            reason = why_composite(*args, **kwargs) if name.startswith("multi") else None
            if reason is None:
                with watch:
                    return WRITTEN_OUT[name](*args, **kwargs)
            site = self.next_site(name)
            if site is not None:
                self._composite[site] = reason
        else:
            site = self.next_site(name)
        given = dict(_flat(args, kwargs))
        before = {place: x._version for place, x in given.items() if isinstance(x, Tensor)}
        result = func(*args, **kwargs)
        if site is not None:
            self._note(site, given, before, result)
        return result

    def _note(self, site: Site, given: dict[Place, Any], before: dict[Place, int], y: Any) -> None:
        self._sites[site] = self.last
        tensors = {place: given[place] for place in before}
        changed = tuple(place for place, x in tensors.items() if x._version != before[place])
        results = [x for x in tensors_in(y) if id(x) not in map(id, tensors.values())]
        if not results and not changed:
            return
        first = next(iter(tensors.values()), None)
        if site.function in _SAME and first is not None and len(results) == 1 and not changed:
            if results[0].shape == first.shape and results[0].dtype == first.dtype:
                self._take(results[0], known=self._value(first))
                return
        inputs = {place: self._value(x) for place, x in tensors.items()}
        settings = {place: x for place, x in given.items() if place not in tensors}
        call = Call(site, inputs, [], settings, changed)
        constant = all(v.constant for v in inputs.values()) and site.function not in _SIZED
        for x in results:
            self._produce(call, x, constant)
        for place in changed:
            for each in self._sharing[_memory(tensors[place])]:
                self._produce(call, next(x for x in self._kept if id(x) == each), constant)
        for place, value in inputs.items():
            value.readers.append((call, place))
        self._calls.append(call)

    def _produce(self, call: Call, tensor: Tensor, constant: bool) -> None:
        value = self._take(tensor, constant=constant)
        value.producer, value.output = call, len(call.outputs)
        call.outputs.append(value)

    def _value(self, tensor: Tensor) -> Value:
        known = self._values.get(id(tensor))
        return self._take(tensor, constant=False) if known is None else known

    def _take(self, tensor: Tensor, constant: bool = False, known: Value | None = None) -> Value:
        """A new value for what the tensor holds now."""
        if id(tensor) not in self._values:
            self._kept.append(tensor)
            self._sharing.setdefault(_memory(tensor), []).append(id(tensor))
        floating = tensor.dtype.is_floating_point
        value = known or Value(tuple(tensor.shape), floating, constant)
        self._values[id(tensor)] = value
        return value

    def graph(self, outputs: Any) -> Graph:
        """What was noted, without what leads to no result."""
        found = [self._values[id(x)] for x in tensors_in(outputs) if id(x) in self._values]
        wanted = list(found)
        alive: set[Call] = set()
        while wanted:
            producer = wanted.pop().producer
            if producer is not None and producer not in alive:
                alive.add(producer)
                wanted += producer.inputs.values()
        calls = [call for call in self._calls if call in alive]
        for value in found:
            value.returned = True
        for value in {v for call in calls for v in (*call.inputs.values(), *call.outputs)}:
            value.readers = [(call, place) for call, place in value.readers if call in alive]
        return Graph(calls, self._inputs, self._sites, self.calls, self._composite)


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Place, Any]]:
    """Each argument with its place; those of a list or tuple of tensors one by one."""
    every: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in every:
        if isinstance(value, (tuple, list)) and any(isinstance(x, Tensor) for x in value):
            for index, each in enumerate(value):
                yield (key, index), each
        else:
            yield (key,), value


def _memory(tensor: Tensor) -> int:
    """What tensors that share their memory have in common."""
    return id(tensor) if tensor.is_sparse else tensor.untyped_storage().data_ptr() or id(tensor)
