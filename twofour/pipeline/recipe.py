"""RECIPE.yaml: what a run does, every field with a default where one makes sense.

    name: resnet20
    model: {onnx: resnet20.onnx}
    data: {calibrate: train.npz, evaluate: test.npz}
    sparsify: {pattern: 2:4, method: sparsegpt}
    quantize: {recipe: balanced}
    gate: {max_drop: 1.5, min_speedup: 1.0}

Paths are relative to the recipe; `module:function` is looked for beside it first. docs/pipeline.md
lists all fields. Unknown ones are errors, and each error names file, line and field.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from twofour.core.errors import InputError
from twofour.pipeline.faults import FUNCTION, NAME, fault_of, refusal
from twofour.pipeline.own_module import with_own_module
from twofour.pipeline.yaml_lines import Document

_SIZE = r"^\d+[kMG]?$"


Count = Annotated[int, Field(ge=1, le=1 << 40)]
Rate = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Amount = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
Function = Annotated[str, Field(pattern=FUNCTION, max_length=4096)]


def _bytes(value: Any) -> Any:
    if type(value) is int and value > 0:
        return value
    if isinstance(value, str) and re.fullmatch(_SIZE, value):
        return value
    raise ValueError("a size such as 200M (k, M or G of 1024)")


def _shape(value: Any) -> Any:
    """Sizes, or three lists of as many sizes."""
    if isinstance(value, tuple) and value:
        lists = value if all(isinstance(each, tuple) for each in value) else (value,)
        sizes = [size for each in lists for size in each]
        if len(lists) in (1, 3) and len({len(each) for each in lists}) == 1:
            if lists[0] and all(type(size) is int and size > 0 for size in sizes):
                return value
    raise ValueError("sizes [1, 3, 32, 32], or three such lists: smallest, usual, largest")


def _warmup(value: Any) -> Any:
    if (type(value) is int and value >= 0) or (type(value) is float and 0 <= value < 1):
        return value
    raise ValueError("a whole number of steps, or a share of them below 1.0")


Bytes = Annotated[int | str, BeforeValidator(_bytes)]
Shape = Annotated[tuple[Any, ...], BeforeValidator(_shape)]
Warmup = Annotated[int | float, BeforeValidator(_warmup)]


class Section(BaseModel):
    """A part of the recipe: unknown fields are refused, types are not guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(Section):
    """What is carried to production.

    Attributes:
        onnx: a file; or else
        torch: function() -> torch.nn.Module.
        example: of `torch`: function() -> a tensor, or a tuple of them; axis 0 is the batch.
        checkpoint: of `torch`: a state dict to load, as `torch.save` writes it.
        inputs: of `torch`: names of the inputs.
        outputs: of `torch`: names of the outputs.
        dynamic: of `torch`: names of the first axes of inputs, which stay open.
    """

    onnx: Text | None = None
    torch: Function | None = None
    example: Function | None = None
    checkpoint: Text | None = None
    inputs: tuple[Text, ...] = ("x",)
    outputs: tuple[Text, ...] = ("y",)
    dynamic: tuple[Text, ...] = ("batch",)


class Data(Section):
    """Samples: .npz, a folder of .npy, or module:function.

    Attributes:
        calibrate: some hundred, as the model will see; pruning by data and quantizing need them.
        evaluate: with labels, which neither training nor calibration saw.
        train: function(epoch) -> batches; fine-tuning needs it.
    """

    calibrate: Text | None = None
    evaluate: Text | None = None
    train: Function | None = None


class Sparsify(Section):
    """Pruning.

    Attributes:
        pattern: 2:4, 4:8, 2:4/pair, 2:4/2d.
        method: how weights are chosen; wanda and sparsegpt read data.calibrate.
        include: shell patterns of names of layers or weights; others stay dense.
        exclude: of those that stay dense.
        permute: order channels first so that less is lost; of torch models.
        samples: of data.calibrate used at most.
        memory: for what is kept of the inputs of layers, such as 1G; of ONNX files.
        correct: give convolutions their mean and deviation again, after magnitude or wanda; of ONNX
            files, where there is data.calibrate.
    """

    pattern: Literal["2:4", "4:8", "2:4/pair", "2:4/2d"] = "2:4"
    method: Literal["magnitude", "wanda", "sparsegpt"] = "magnitude"
    include: tuple[Text, ...] = ()
    exclude: tuple[Text, ...] = ()
    permute: bool = False
    samples: Count = 512
    memory: Bytes = "1G"
    correct: bool = True


class Scan(Section):
    """Each layer pruned alone, for the report's heat map; see `twofour sensitivity`.

    Attributes:
        patterns: by default that of `sparsify`.
        samples: of data.evaluate used at most.
        jobs: processes that judge.
    """

    patterns: tuple[Literal["2:4", "4:8", "2:4/pair", "2:4/2d"], ...] = ()
    samples: Count | None = None
    jobs: Annotated[int, Field(ge=1, le=1024)] = 1


class Training(Section):
    """A training stage of a torch model; see `twofour.train.Schedule` and `Distiller`.

    Attributes:
        epochs: passes over data.train.
        lr: the highest rate.
        warmup: steps if a whole number, a share of all steps if below 1.
        final_lr: what the cosine falls to.
        optimizer: sgd (Nesterov) or adamw.
        momentum: of sgd.
        weight_decay: of both; by default each one's own.
        label_smoothing: of the cross entropy.
        clip_norm: gradients are scaled down to it; 0 does not.
        ema: decay of an average of the weights; 0 keeps none.
        bf16: forward passes in bfloat16.
        fp16: in float16, with scaled gradients.
        loss: module:function (model, batch) -> scalar; by default cross entropy.
        distil: learn from the dense model too.
        temperature: of distillation.
        share: of distillation's loss, beside that of the labels.
        hidden: module name -> weight of what it adds to the loss, for layers inside.
        outputs: what the model gives, which decides how outputs are compared.
        processes: above 1: through torchrun.
        parallel: how several processes share the work.
    """

    epochs: Annotated[int, Field(ge=0, le=100_000)] = 10
    lr: Rate = 0.02
    warmup: Warmup = 0
    final_lr: Amount = 0.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Share = 0.9
    weight_decay: Amount | None = None
    label_smoothing: Share = 0.0
    clip_norm: Amount = 0.0
    ema: Share = 0.0
    bf16: bool = False
    fp16: bool = False
    loss: Function | None = None
    distil: bool = True
    temperature: Rate = 4.0
    share: Annotated[float, Field(ge=0, le=1)] = 0.9
    hidden: dict[str, Amount] = {}
    outputs: Literal["logits", "mse", "cosine"] = "logits"
    processes: Annotated[int, Field(ge=1, le=1024)] = 1
    parallel: Literal["ddp", "fsdp2"] = "ddp"


class Finetune(Training):
    """What makes up for pruning, the masks held."""


class Qat(Training):
    """Training with fake quantization; see `twofour.train.QuantizerOptions`.

    Attributes:
        method: how ranges are chosen from what calibration saw.
        activation: uint8 (asymmetric) or int8.
        exclude: shell patterns of layers, modules or functions that stay float.
        learned_scales: scales are trained like weights.
        samples: of data.calibrate used at most.
        dense: train the dense model so, too: for the table, not for the result.
    """

    epochs: Annotated[int, Field(ge=0, le=100_000)] = 3
    lr: Rate = 0.002
    method: Literal["mse", "entropy", "minmax", "percentile"] = "mse"
    activation: Literal["uint8", "int8"] = "uint8"
    exclude: tuple[Text, ...] = ()
    learned_scales: bool = False
    samples: Count = 512
    dense: bool = False


class Quantize(Section):
    """INT8 after training; see `twofour quantize`.

    Attributes:
        recipe: which steps beside calibration: fast has none.
        method: how ranges are chosen.
        activation: uint8 or int8; by default the former.
        include: shell patterns of layers that are quantized; others stay float.
        exclude: of those that stay float.
        samples: of data.calibrate used at most.
        max_drop: leave the fewest layers float that keep the metric within this drop.
        evaluations: networks judged for that at most.
        jobs: processes that judge.
    """

    recipe: Literal["fast", "balanced", "best"] = "balanced"
    method: Literal["mse", "entropy", "minmax", "percentile"] = "mse"
    activation: Literal["uint8", "int8"] | None = None
    include: tuple[Text, ...] = ()
    exclude: tuple[Text, ...] = ()
    samples: Count | None = None
    max_drop: Amount | None = None
    evaluations: Annotated[int, Field(ge=8, le=1 << 20)] = 64
    jobs: Annotated[int, Field(ge=1, le=1024)] = 1


class Build(Section):
    """Engines.

    Attributes:
        targets: cpu (this machine), cpu:avx512vnni, cpu:avx2, cpu:vector, tensorrt, tensorrt:sm89;
            the first is judged.
        tuning_effort: 0 (nothing is timed) to 3.
        sparsity: enable (sparse kernels compete), force, disable.
        bf16: float layers may compute in bfloat16.
        batch: size of the first axis where the model leaves it open.
        workspace: most memory that a kernel may take of its own, such as 1M.
        race: keep ONNX Runtime where it runs the whole model faster.
        cells: all: the dense and the sparse network, float32 and quantized, for the table; gate:
            only the result, and the dense float32 network it is compared with.
    """

    targets: Annotated[tuple[Text, ...], Field(min_length=1, max_length=16)] = ("cpu",)
    tuning_effort: Annotated[int, Field(ge=0, le=3)] = 2
    sparsity: Literal["enable", "force", "disable"] = "enable"
    bf16: bool = False
    batch: Annotated[int, Field(ge=1, le=65536)] | None = None
    workspace: Bytes | None = None
    race: bool = True
    cells: Literal["all", "gate"] = "all"


class Evaluate(Section):
    """Judging.

    Attributes:
        samples: the first so many of data.evaluate; by default all.
    """

    samples: Count | None = None


class Benchmark(Section):
    """Timing, all engines in turns.

    Attributes:
        duration: seconds that all contestants share.
        vs: onnxruntime, openvino.
        memory: measure each engine's peak resident memory.
        energy: measure joules, where the machine has counters.
    """

    duration: Annotated[float, Field(gt=0, le=86_400)] = 5.0
    vs: tuple[Literal["onnxruntime", "openvino"], ...] = ("onnxruntime",)
    memory: bool = True
    energy: bool = True


class Gate(Section):
    """What the result has to hold.

    Attributes:
        max_drop: of the metric, in its own unit (points where it is percent); if not said, 1.5
            points where the metric is percent and there is data.evaluate.
        min_speedup: times as fast as the baseline.
        max_memory: peak resident memory of a process that runs it, such as 200M.
        max_memory_share: the same in units of the baseline's.
        undecided: what becomes of a result of which more measuring could not tell.
        baseline: dense: the dense float32 engine of this run; or the run.json of another.
        confidence: of the intervals.
    """

    max_drop: Amount | None = None
    min_speedup: Rate | None = 1.0
    max_memory: Bytes | None = None
    max_memory_share: Rate | None = None
    undecided: Literal["fail", "pass"] = "fail"
    baseline: Text = "dense"
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95


class Publish(Section):
    """Where the result goes once the gate has passed.

    Attributes:
        repository: folder or URL that `twofour serve` reads.
        name: of the model there; by default the recipe's.
        key: file of the private key that signs.
        promote: let it be served at once.
    """

    repository: Text
    name: Text | None = None
    key: Text | None = None
    promote: bool = True


class Recipe(Section):
    """All of a recipe; see docs/pipeline.md."""

    name: Annotated[str, Field(pattern=NAME, max_length=100)]
    model: Model
    data: Data = Data()
    metric: Text = "top1"
    metric_output: Text | None = None
    shapes: dict[str, Shape] = {}
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    sensitivity: Scan | None = None
    sparsify: Sparsify | None = None
    finetune: Finetune | None = None
    qat: Qat | None = None
    quantize: Quantize | None = None
    layers: dict[str, Text] = {}
    build: Build = Build()
    evaluate: Evaluate = Evaluate()
    benchmark: Benchmark = Benchmark()
    gate: Gate | None = None
    publish: Publish | None = None


def recipe_of(document: Document) -> Recipe:
    """Checks each field of a recipe by itself.

    Raises:
        InputError: all that is wrong, each with its line.
    """
    if not isinstance(document.plain, dict):
        got = f"{document.name}:1: expected fields such as name and model, got {document.plain!r}"
        raise InputError(f"{document.name} is no recipe", [got], "see docs/pipeline.md")
    try:
        return Recipe.model_validate(with_own_module(document.plain))
    except ValidationError as e:
        faults = [fault_of(document, each, Recipe) for each in e.errors(include_url=False)]
    raise refusal(document, faults)
