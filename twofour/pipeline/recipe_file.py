"""A recipe as a file: read, checked as a whole, its paths made absolute."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from twofour.core.errors import Error, InputError
from twofour.core.machine import usable_cores
from twofour.core.target import ISAS
from twofour.core.tensorrt import is_tensorrt
from twofour.evaluate.metrics import METRICS
from twofour.pipeline.faults import Fault, fault_at, refusal
from twofour.pipeline.identity import is_function, module_file
from twofour.pipeline.recipe import Recipe, recipe_of
from twofour.pipeline.yaml_lines import Document, read_document
from twofour.pipeline.yaml_lines import Path as FieldPath

DENSE_BASELINE = "dense"
USUAL_DROP = 1.5
"""Points that the metric may fall by where the recipe does not say."""
_CPU = "cpu"
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_LAYER = re.compile(r"(dense|\d+:\d+(/pair|/2d)?) (f32|bf16|int8)")


@dataclass(frozen=True)
class RecipeFile:
    """A recipe that has been read.

    Attributes:
        recipe: all of it.
        path: of the file, absolute.
        content: of the file.
    """

    recipe: Recipe
    path: Path
    content: bytes

    @property
    def home(self) -> Path:
        """Where its paths begin, and its modules are looked for first."""
        return self.path.parent

    def place(self, text: str) -> str:
        """A path, absolute; a module:function or a URL as it is."""
        whole = str(self.home / text)
        return text if is_place(text) and not Path(whole).exists() else whole

    @cached_property
    def max_drop(self) -> float | None:
        """That the gate allows; None: the metric is not judged."""
        recipe = self.recipe
        if recipe.gate is None or recipe.gate.max_drop is not None:
            return None if recipe.gate is None else recipe.gate.max_drop
        metric = METRICS.get(recipe.metric)
        judged = recipe.data.evaluate is not None and metric is not None and metric.unit == "%"
        return USUAL_DROP if judged else None


def is_place(text: str) -> bool:
    """Whether it is a module:function or a URL by its form."""
    return is_function(text) or _URL.match(text) is not None


def read_recipe(path: Path) -> RecipeFile:
    """Reads a recipe and checks all of it that can be checked before anything runs.

    Raises:
        InputError: it cannot be read, a field is wrong, fields do not fit each other, or a file or
            module that it names is not there; each with its line.
    """
    try:
        content = path.read_bytes()
    except OSError as e:
        fix = "name a recipe; docs/pipeline.md says how to write one"
        raise InputError(f"cannot read recipe {path}", [str(e)], fix) from e
    document = read_document(content, str(path))
    found = RecipeFile(recipe_of(document), path.resolve(), content)
    faults = list(_Checks(found, document).faults())
    if faults:
        raise refusal(document, faults)
    return found


@dataclass(frozen=True)
class _Checks:
    """What a recipe has to hold beyond the form of each field."""

    file: RecipeFile
    document: Document

    @property
    def recipe(self) -> Recipe:
        return self.file.recipe

    def faults(self) -> Iterator[Fault]:
        yield from self._model()
        yield from self._training()
        yield from self._data()
        yield from self._layers()
        yield from self._build()
        yield from self._gate()
        yield from self._places()

    def _at(self, *path: str | int) -> Callable[..., Fault]:
        """Makes faults at one place, of what is wrong and how it is mended."""
        return partial(fault_at, self.document, path)

    def _model(self) -> Iterator[Fault]:
        model = self.recipe.model
        if (model.onnx is None) == (model.torch is None):
            got = "both" if model.onnx else "none"
            fix = "write model: {onnx: FILE} or model: {torch: module:function, example: ...}"
            yield self._at("model")(f"expected one of onnx and torch, got {got}", fix)
        elif model.torch is not None and model.example is None:
            fix = "add example: module:function, which returns a batch of inputs"
            yield self._at("model", "example")("a torch model needs example inputs, got none", fix)
        elif model.onnx is not None:
            for name in ("example", "checkpoint"):
                if getattr(model, name) is not None:
                    what = "only a torch model has it, and this one is an ONNX file"
                    yield self._at("model", name)(what, f"leave {name} out")

    def _training(self) -> Iterator[Fault]:
        recipe = self.recipe
        for name in ("finetune", "qat"):
            section = getattr(recipe, name)
            if section is None:
                continue
            if recipe.model.torch is None:
                fix = f"leave {name} out, or give model: {{torch: module:function, example: ...}}"
                yield self._at(name)("an ONNX file cannot be trained", fix)
            elif recipe.data.train is None:
                fix = "add data: {train: module:function}, which takes the epoch's number"
                yield self._at(name)("it needs data.train, got none", fix)
            if section.final_lr > section.lr:
                what = f"expected at most lr, which is {section.lr:g}, got {section.final_lr:g}"
                yield self._at(name, "final_lr")(what)
        if recipe.sparsify and recipe.sparsify.permute and recipe.model.torch is None:
            fix = "leave permute out; method: sparsegpt loses less"
            yield self._at("sparsify", "permute")("only torch models are permuted", fix)

    def _data(self) -> Iterator[Fault]:
        recipe, data = self.recipe, self.recipe.data
        add = "add data: {calibrate: samples.npz}"
        if recipe.sparsify and recipe.sparsify.method != "magnitude" and not data.calibrate:
            what = f"{recipe.sparsify.method} needs data.calibrate, got none"
            yield self._at("sparsify", "method")(what, f"{add}, or choose magnitude")
        for name in ("quantize", "qat"):
            if getattr(recipe, name) is not None and not data.calibrate:
                yield self._at(name)("it needs data.calibrate, got none", add)
        if recipe.quantize and recipe.quantize.max_drop is not None and not data.evaluate:
            fix = "add data: {evaluate: test.npz}, with labels"
            yield self._at("quantize", "max_drop")("it needs data.evaluate, got none", fix)
        if recipe.sensitivity is not None and not data.evaluate:
            fix = "add data: {evaluate: test.npz}, with labels"
            yield self._at("sensitivity")("it needs data.evaluate, got none", fix)
        if ":" not in recipe.metric and recipe.metric not in METRICS:
            what = f"expected one of {', '.join(METRICS)}, or module:function"
            yield self._at("metric")(f"{what}, got {recipe.metric!r}")

    def _layers(self) -> Iterator[Fault]:
        recipe = self.recipe
        if not recipe.layers:
            return
        for name in ("finetune", "qat"):
            if getattr(recipe, name) is not None:
                yield self._at(name)("choices for single layers are not trained", f"remove {name}")
        int8 = any(choice.endswith("int8") for choice in recipe.layers.values())
        if int8 and not recipe.data.calibrate:
            fix = "add data: {calibrate: samples.npz}"
            yield self._at("layers")("int8 needs data.calibrate, got none", fix)
        for name, choice in recipe.layers.items():
            if not _LAYER.fullmatch(choice):
                what = f"expected words such as 2:4 int8, dense f32, 4:8 bf16, got {choice!r}"
                yield self._at("layers", name)(what)

    def _build(self) -> Iterator[Fault]:
        recipe, known = self.recipe, [_CPU, *(f"{_CPU}:{isa}" for isa in ISAS)]
        for index, target in enumerate(recipe.build.targets):
            if target not in known and not is_tensorrt(target):
                more = "tensorrt or tensorrt:sm89"
                what = f"expected one of {', '.join(known)}, {more}, got {target!r}"
                yield self._at("build", "targets", index)(what)
        if len(set(recipe.build.targets)) < len(recipe.build.targets):
            yield self._at("build", "targets")("expected each target once", "remove the second")
        if recipe.threads > usable_cores():
            what = f"expected at most {usable_cores()}, the cores here, got {recipe.threads}"
            yield self._at("threads")(what)

    def _gate(self) -> Iterator[Fault]:
        recipe, gate = self.recipe, self.recipe.gate
        if gate is not None and gate.max_drop is not None and recipe.data.evaluate is None:
            fix = "add data: {evaluate: test.npz}, with labels; or leave max_drop out"
            yield self._at("gate", "max_drop")("it needs data.evaluate, got none", fix)
        if recipe.publish is not None and gate is None:
            fix = "add gate: {max_drop: 1.5, min_speedup: 1.0}"
            yield self._at("publish")("only what has passed a gate is published, got none", fix)

    def _places(self) -> Iterator[Fault]:
        """Files and modules that are not there."""
        recipe = self.recipe
        files: dict[FieldPath, str | None] = {
            ("model", "onnx"): recipe.model.onnx,
            ("model", "checkpoint"): recipe.model.checkpoint,
            ("data", "calibrate"): recipe.data.calibrate,
            ("data", "evaluate"): recipe.data.evaluate,
        }
        if recipe.gate is not None and recipe.gate.baseline != DENSE_BASELINE:
            files["gate", "baseline"] = recipe.gate.baseline
        if recipe.publish is not None:
            files["publish", "key"] = recipe.publish.key
        for path, text in files.items():
            if text is None or (path[0] == "data" and is_function(self.file.place(text))):
                continue
            if not Path(self.file.place(text)).exists():
                what = f"expected a file, got {text!r}: there is none at {self.file.home / text}"
                yield self._at(*path)(what, "check the path; it begins at the recipe's folder")
        yield from self._modules()

    def _modules(self) -> Iterator[Fault]:
        for path, text in self._functions():
            module = text.partition(":")[0]
            try:
                found = module_file(module, self.file.home)
            except (Error, OSError, ValueError):
                found = None
            if found is None:
                what = f"there is no module {module!r} beside the recipe or in Python's path"
                yield self._at(*path)(
                    what, f"write {module.replace('.', '/')}.py beside the recipe"
                )

    def _functions(self) -> Iterator[tuple[FieldPath, str]]:
        recipe = self.recipe
        named: dict[FieldPath, str | None] = {
            ("model", "torch"): recipe.model.torch,
            ("model", "example"): recipe.model.example,
            ("data", "calibrate"): recipe.data.calibrate,
            ("data", "evaluate"): recipe.data.evaluate,
            ("data", "train"): recipe.data.train,
            ("metric",): recipe.metric,
            ("finetune", "loss"): recipe.finetune.loss if recipe.finetune else None,
            ("qat", "loss"): recipe.qat.loss if recipe.qat else None,
        }
        for path, text in named.items():
            if text is not None and is_function(self.file.place(text)):
                yield path, text
