"""`config.yaml` of a model: what the server does with it; every field has a default.

    batching: {max_size: 32, preferred_sizes: [8, 16, 32], max_delay_us: 500}
    queue: {length: 256, timeout_ms: 1000}
    instances: [{threads: 1, cores: [0]}, {threads: 1, cores: [1]}]
    traffic: {3: 90, 4: 10}

Unknown fields are errors, and every error names the path to its field.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from twofour.core.errors import InputError

MOST_CONFIG_BYTES = 1 << 20

Version = Annotated[int, Field(ge=1, le=2**31 - 1)]
Size = Annotated[int, Field(ge=1, le=1 << 20)]
GpuName = Annotated[str, Field(pattern=r"^(GPU|MIG)-[0-9a-fA-F-]{4,36}$")]
Microseconds = Annotated[int, Field(ge=0, le=3_600_000_000)]
Milliseconds = Annotated[int, Field(ge=1, le=3_600_000)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VersionPolicy(_Section):
    """Which versions of the folder are served.

    Attributes:
        latest: the so many highest numbers; None where `specific` or `all` chooses.
        specific: these.
        all: every one.
    """

    latest: Annotated[int, Field(ge=1, le=1000)] | None = None
    specific: tuple[Version, ...] = ()
    all: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> VersionPolicy:
        if (self.latest is not None) + bool(self.specific) + self.all > 1:
            raise ValueError("name one of latest, specific, all")
        return self

    def choose(self, found: list[int]) -> list[int]:
        """The versions to serve of those in the folder, ascending."""
        if self.all:
            return sorted(found)
        if self.specific:
            return sorted(set(found) & set(self.specific))
        return sorted(found)[-(self.latest or 1) :]


class Lengths(_Section):
    """Sequences of unlike length in one batch: the shorter are padded up to a bucket's length.

    Attributes:
        inputs: input -> its axis of the length.
        outputs: output -> its axis of the length, which is cut back; None named: all
            whose dimension is the same open one.
        buckets: ascending; requests whose lengths round up to the same one share a batch. Empty:
            each length by itself.
        pad: input -> the value that fills; 0 where not named.
    """

    inputs: Annotated[dict[str, Annotated[int, Field(ge=1, le=8)]], Field(min_length=1)]
    outputs: dict[str, Annotated[int, Field(ge=1, le=8)]] = {}
    buckets: tuple[Size, ...] = ()
    pad: dict[str, float] = {}

    @model_validator(mode="after")
    def _ascending(self) -> Lengths:
        if list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError("buckets have to ascend")
        if unknown := sorted(set(self.pad) - set(self.inputs)):
            raise ValueError(f"pad names {', '.join(unknown)}, which `inputs` does not")
        return self


class Batching(_Section):
    """How requests are put together.

    Attributes:
        max_size: most rows of one run; 1: requests run one by one; None: what the engine takes.
        preferred_sizes: a batch of one of these sizes starts at once, ascending; empty: one of
            `max_size` does.
        max_delay_us: how long the first request of a batch may wait for others.
        pad: fill up to the next size that a profile of the engine has where it has fixed sizes.
        lengths: sequences of unlike length; None: only equal shapes share a batch.
    """

    max_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    preferred_sizes: tuple[Size, ...] = ()
    max_delay_us: Microseconds = 0
    pad: bool = True
    lengths: Lengths | None = None

    @model_validator(mode="after")
    def _within(self) -> Batching:
        sizes = list(self.preferred_sizes)
        if sizes != sorted(set(sizes)) or (self.max_size and sizes and sizes[-1] > self.max_size):
            raise ValueError("preferred_sizes have to ascend, up to max_size at most")
        return self


class Queue(_Section):
    """Requests that wait.

    Attributes:
        length: of each priority level; a request that finds it full is refused with 503.
        timeout_ms: how long a request may wait where it does not say; None: as long as it takes.
        max_timeout_ms: the most that a request may ask for; None: whatever it asks.
        levels: of priority; 1 is the highest.
        default_level: of requests that name none; None: the middle one.
    """

    length: Annotated[int, Field(ge=1, le=1 << 20)] = 512
    timeout_ms: Milliseconds | None = None
    max_timeout_ms: Milliseconds | None = None
    levels: Annotated[int, Field(ge=1, le=16)] = 1
    default_level: Annotated[int, Field(ge=1, le=16)] | None = None

    @model_validator(mode="after")
    def _level_exists(self) -> Queue:
        if self.default_level is not None and self.default_level > self.levels:
            raise ValueError(f"default_level is {self.default_level}, and there are {self.levels}")
        return self

    @property
    def usual_level(self) -> int:
        """Of requests that name none."""
        return self.default_level or (self.levels + 1) // 2


class Instance(_Section):
    """One copy of the model that runs batches, one after the other.

    Attributes:
        threads: of its session; None: as the engine was tuned.
        cores: it runs on these; empty: on any.
        gpu: of an engine for CUDA: which GPU or slice of one, by number or by UUID ("GPU-...",
            "MIG-..." as nvidia-smi -L shows it); None: the first that the engine fits.
        gpu_memory_mb: likewise: weights and activations may take so many MiB of its memory; None:
            what is free.
    """

    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    cores: tuple[Annotated[int, Field(ge=0, le=4095)], ...] = ()
    gpu: Annotated[int, Field(ge=0, le=1023, strict=True)] | GpuName | None = None
    gpu_memory_mb: Annotated[int, Field(ge=1, le=1 << 24)] | None = None

    @property
    def most_gpu_bytes(self) -> int | None:
        """`gpu_memory_mb` in bytes."""
        return None if self.gpu_memory_mb is None else self.gpu_memory_mb << 20


class Traffic(_Section):
    """Who gets which version where a request names none.

    Attributes:
        split: version -> share, in parts of their sum; empty: the highest version gets all.
        sticky_header: requests with the same value of this header (gRPC: metadata) get the same
            version; "": each request is drawn.
        shadow: this version computes a copy of the requests too, and its answers are compared and
            thrown away.
        shadow_percent: of the requests.
    """

    split: dict[Version, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    sticky_header: str = ""
    shadow: Version | None = None
    shadow_percent: Annotated[float, Field(gt=0, le=100)] = 100.0

    @model_validator(mode="after")
    def _some(self) -> Traffic:
        if self.split and sum(self.split.values()) <= 0:
            raise ValueError("the shares of split add up to nothing")
        return self


class WarmUp(_Section):
    """Requests that a version answers before it is ready.

    Attributes:
        rounds: of each shape that batches may have.
        data: an .npz file beside config.yaml, arrays named like the inputs; "": zeros.
    """

    rounds: Annotated[int, Field(ge=0, le=10_000)] = 3
    data: str = ""


class Build(_Section):
    """How an engine is made of the version's ONNX file where no engine fits this machine.

    Attributes:
        enabled: make one; else the version is refused.
        arguments: of `twofour build`, beside the model and -o: ["--shapes", "x:1x3x32x32:..."].
        timeout_s: a build that takes longer is given up.
    """

    enabled: bool = True
    arguments: tuple[str, ...] = ()
    timeout_s: Annotated[int, Field(ge=1, le=86_400)] = 3600


class Ray(_Section):
    """Copies of the model on a Ray cluster, where `twofour serve --ray` runs it; else of no effect.

    Attributes:
        min_replicas: processes that are always there; 0: none while nobody asks, and who asks first
            waits until there is one.
        max_replicas: at most.
        target_ongoing_requests: that each of them has, waiting and computing, on average: more make
            another one. It is sent twice that many at most; `queue.length` others wait in front.
            Below the size of a batch, batches are never full.
        upscale_delay_s: for so long there have to be more before another one starts.
        downscale_delay_s: and fewer, before one is stopped.
        num_cpus: that each reserves on its node; None: the threads of all instances.
        num_gpus: likewise, parts of one too; it sees no others.
    """

    min_replicas: Annotated[int, Field(ge=0, le=10_000)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=10_000)] = 1
    target_ongoing_requests: Annotated[float, Field(gt=0, le=1 << 20)] = 16.0
    upscale_delay_s: Annotated[float, Field(ge=0, le=86_400)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0, le=86_400)] = 300.0
    num_cpus: Annotated[float, Field(ge=0, le=4096)] | None = None
    num_gpus: Annotated[float, Field(ge=0, le=1024)] = 0.0

    @model_validator(mode="after")
    def _ascending(self) -> Ray:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas has to be min_replicas ({self.min_replicas}) or more")
        return self


class ModelConfig(_Section):
    """All of `config.yaml`.

    Attributes:
        versions: which are served.
        load: "start" with the server, "first" with the first request.
        execution: "thread": batches run in a thread of each instance; "inline": in the thread that
            reads requests, which saves two changes of threads; "auto": there those that take less
            than half a millisecond, measured at warm-up, with one instance and no cores.
        batching, queue, instances, traffic, warm_up, build, ray: see there. One `instances` entry
            is one copy.
        labels: output -> texts for its classes, for the classification extension.
        parameters: texts that the config endpoint shows.
    """

    versions: VersionPolicy = VersionPolicy()
    load: Literal["start", "first"] = "start"
    execution: Literal["auto", "thread", "inline"] = "auto"
    batching: Batching = Batching()
    queue: Queue = Queue()
    instances: Annotated[tuple[Instance, ...], Field(min_length=1, max_length=1024)] = (Instance(),)
    traffic: Traffic = Traffic()
    warm_up: WarmUp = WarmUp()
    build: Build = Build()
    ray: Ray = Ray()
    labels: dict[str, tuple[str, ...]] = {}
    parameters: dict[str, str] = {}


def read_config(text: bytes, where: str | Path) -> ModelConfig:
    """Reads and checks a `config.yaml`.

    Args:
        text: of the file; empty: all defaults.
        where: the file, for messages.

    Raises:
        InputError: too large, no YAML, or an unknown or wrong field: each with its path.
    """
    if len(text) > MOST_CONFIG_BYTES:
        limit = f"expected at most {MOST_CONFIG_BYTES} bytes, got {len(text)}"
        raise InputError(f"{where} is too large", [limit], "shorten it")
    try:
        plain: Any = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as e:
        raise InputError(f"{where} is no YAML", [str(e)], "see docs/serve.md") from e
    return config_of({} if plain is None else plain, where)


def config_of(plain: Any, where: str | Path) -> ModelConfig:
    """Checks a configuration given as plain data.

    Raises:
        InputError: names the path to each wrong field.
    """
    try:
        return ModelConfig.model_validate(plain)
    except ValidationError as e:
        reasons = [
            f"{'.'.join(map(str, each['loc'])) or 'the whole'}: {each['msg']}"
            for each in e.errors(include_url=False)
        ]
        fix = "mend these fields; docs/serve.md lists all"
        raise InputError(f"{where} cannot be used", reasons, fix) from e
    except RecursionError as e:
        raise InputError(f"{where} is nested too deep", [], "see docs/serve.md") from e
