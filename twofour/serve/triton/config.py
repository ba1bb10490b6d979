"""`config.pbtxt`: Triton's configuration of a model, as plain data and as text.

The plain data is what Triton's clients get as JSON; the text is protobuf's text format.

    {"name": "m", "max_batch_size": 8}   ->   name: "m"
                                              max_batch_size: 8

Source: Triton Inference Server, docs/user_guide/model_configuration.md, and model_config.proto.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from twofour.core.errors import UnsupportedError
from twofour.core.plan import Plan
from twofour.serve.describe import instance_kind, model_config
from twofour.serve.models.rows import Layout
from twofour.serve.repository.config import Instance, ModelConfig, Queue

SETTINGS = "twofour"
"""The parameter that holds what model.py has to know, as JSON."""
_WORDS = ("data_type", "kind", "timeout_action")  # enumerations: no quotes around their values

Plain = dict[str, Any]


def python_config(name: str, plan: Plan, config: ModelConfig) -> Plain:
    """What Triton has to know to serve an engine with its Python backend as `config` has it.

    Args:
        name: of the model.
        plan: of the engine.
        config: of the model here.

    Raises:
        InputError: the configuration asks for rows or lengths that the engine has not.
        UnsupportedError: Triton cannot say this; with all reasons.
    """
    layout = Layout(plan, config.batching)
    reasons = [*_inexpressible(config, layout), *_unwritable(plan, layout)]
    if reasons:
        fix = "change these in config.yaml, or give another one with --config"
        raise UnsupportedError(f"Triton cannot serve {name!r} as configured", reasons, fix)
    plain = model_config(name, plan, layout, config)
    del plain["platform"]
    lengths = config.batching.lengths
    for each in plain["input"]:
        if layout.batches and lengths and each["name"] in lengths.inputs:
            each["allow_ragged_batch"] = True
    for index, each in enumerate(plain["output"]):
        if each["name"] in config.labels:
            each["label_filename"] = label_file(index)
    groups = _groups(config)
    plain["instance_group"] = [
        {"name": group, "count": count, **_kind(plan, one)}
        for group, (one, count) in groups.items()
    ]
    settings = {
        "batching": config.batching.model_dump(mode="json", exclude_defaults=True),
        "instances": {
            group: one.model_dump(mode="json", exclude_none=True)
            for group, (one, _) in groups.items()
        },
        "warm_up_rounds": config.warm_up.rounds,
    }
    text = json.dumps(settings, separators=(",", ":"))
    plain["parameters"][SETTINGS] = {"string_value": text}
    return plain | {"backend": "python"}


def notes(plan: Plan, config: ModelConfig) -> list[str]:
    """What is not quite the same behind Triton, a line each."""
    queue, said = config.queue, []
    if queue.timeout_ms and queue.timeout_ms != queue.max_timeout_ms:
        said.append(
            f"a request may ask for less than queue.timeout_ms {queue.timeout_ms}, not for more: "
            "Triton shortens only"
        )
    if not Layout(plan, config.batching).batches:
        said.append(
            "requests run one by one, and the queue has no limit: Triton's is the batcher's"
        )
    if config.warm_up.data:
        said.append("warm-up runs are of zeros, not of warm_up.data")
    if config.load == "first":
        said.append(
            "load: first is not there; start tritonserver with --model-control-mode=explicit"
        )
    return said


def as_text(plain: Mapping[str, Any], indent: str = "") -> str:
    """Plain data in protobuf's text format, a field a line."""
    lines = []
    for name, value in plain.items():
        if name == "parameters":  # a map: its entries are messages of key and value
            value = [{"key": key, "value": each} for key, each in value.items()]
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                lines.append(f"{indent}{name} {{\n{as_text(each, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{name}: {_scalar(name, each)}\n")
    return "".join(lines)


def label_file(index: int) -> str:
    """The file beside config.pbtxt with the labels of an output, a line each."""
    return f"labels_{index}.txt"


def _scalar(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str) or name in _WORDS:
        return str(value)
    plain = {'"': '\\"', "\\": "\\\\"}
    characters = [
        plain.get(chr(byte), chr(byte)) if 32 <= byte < 127 else f"\\{byte:03o}"
        for byte in value.encode()
    ]
    return f'"{"".join(characters)}"'


def _inexpressible(config: ModelConfig, layout: Layout) -> Iterator[str]:
    """What the configuration asks for and Triton has no word for."""
    traffic, queue = config.traffic, config.queue
    if traffic.split:
        yield "traffic.split: Triton gives requests without a version to the latest one"
    if traffic.shadow is not None:
        yield "traffic.shadow: Triton has no shadow traffic"
    if queue.max_timeout_ms and not queue.timeout_ms:
        yield "queue.max_timeout_ms without timeout_ms: Triton's only limit is the default"
    if queue.max_timeout_ms and queue.timeout_ms and queue.max_timeout_ms < queue.timeout_ms:
        yield "queue.max_timeout_ms is below timeout_ms: Triton's only limit is the default"
    if SETTINGS in config.parameters:
        yield f"parameters: {SETTINGS!r} is the name under which model.py finds its settings"
    if not layout.batches and queue != Queue(length=queue.length):
        yield "queue: only models that batch have priorities and timeouts in Triton"


def _unwritable(plan: Plan, layout: Layout) -> Iterator[str]:
    """Tensors whose dimensions Triton's configuration has no form for."""
    first = 1 if layout.batches else 0
    for of in ("inputs", "outputs"):
        for index, info in enumerate(getattr(plan, of)):
            each = [getattr(profile, of)[index] for profile in plan.profiles]
            ranks = {len(one.dims) for one in each}
            if not all(one.known for one in each):
                yield f"{info.name}: its shape depends on the data; Triton asks for its rank"
            elif len(ranks) > 1:
                yield f"{info.name}: profiles with another number of dimensions"
            elif ranks == {first}:
                yield f"{info.name}: it has no dimension{' beside the rows' if first else ''}"
            elif 0 in info.dims:
                yield f"{info.name}: a dimension of 0"


def _kind(plan: Plan, instance: Instance) -> Plain:
    """Where Triton starts an instance; model.py itself takes one with a UUID to its GPU."""
    kind = instance_kind(plan, instance)
    return {"kind": "KIND_CPU"} if isinstance(instance.gpu, str) else kind


def _groups(config: ModelConfig) -> dict[str, tuple[Instance, int]]:
    """Equal instances are a group of Triton's: its name, what each is, how many."""
    counts = Counter(config.instances).items()
    return {f"cpu{index}": (each, count) for index, (each, count) in enumerate(counts)}
