"""A loaded version in words: for Triton's clients, and for metrics and the status page."""

from __future__ import annotations

from typing import Any

from twofour.core.plan import Plan
from twofour.serve.models.fleet import Fleet
from twofour.serve.models.rows import Layout
from twofour.serve.models.tally import Histogram
from twofour.serve.models.version import Version, tensors
from twofour.serve.protocol.messages import TensorMetadata
from twofour.serve.readings import VersionReading
from twofour.serve.repository.config import Instance, ModelConfig, Queue, VersionPolicy


def model_config(name: str, plan: Plan, layout: Layout, config: ModelConfig) -> dict[str, Any]:
    """The fields of Triton's ModelConfig (model_config.proto) that have a meaning here.

    Shapes are without the rows where requests are batched, as Triton has them.

    Args:
        name: of the model.
        plan: of its engine.
        layout: how its requests are joined.
        config: of the model.
    """
    batches = layout.batches
    inputs, outputs = tensors(plan, rows=batches)
    found: dict[str, Any] = {
        "name": name,
        "platform": "twofour",
        "backend": "twofour",
        "version_policy": _policy(config.versions),
        "max_batch_size": layout.most_rows if batches else 0,
        "input": [_tensor(each, batches) for each in inputs],
        "output": [_tensor(each, batches) for each in outputs],
        "instance_group": [
            {"name": f"{name}_{i}", "count": 1, **instance_kind(plan, each)}
            for i, each in enumerate(config.instances)
        ],
        "parameters": {k: {"string_value": v} for k, v in config.parameters.items()},
    }
    if batches:
        found["dynamic_batching"] = {
            "preferred_batch_size": list(config.batching.preferred_sizes),
            "max_queue_delay_microseconds": config.batching.max_delay_us,
            "preserve_ordering": False,
            "priority_levels": config.queue.levels if config.queue.levels > 1 else 0,
            "default_priority_level": config.queue.usual_level if config.queue.levels > 1 else 0,
            "default_queue_policy": _queue(config.queue),
        }
    return found


def instance_kind(plan: Plan, instance: Instance) -> dict[str, Any]:
    """What Triton calls the place that an instance runs on; it has no word for a UUID."""
    if not plan.target.on_gpu:
        return {"kind": "KIND_CPU"}
    gpus = [instance.gpu] if isinstance(instance.gpu, int) else []
    return {"kind": "KIND_GPU", "gpus": gpus}


def model_statistics(version: Version) -> dict[str, Any]:
    """Triton's ModelStatistics (grpc_service.proto): counts, and sums in nanoseconds."""
    tally = version.tally
    none = {"count": 0, "ns": 0}
    failures = {"count": sum(tally.failures.values()), "ns": round(tally.failed_s * 1e9)}
    return {
        "name": version.model,
        "version": str(version.number),
        "last_inference": tally.last_ms,
        "inference_count": round(tally.rows.total),
        "execution_count": tally.rows.count,
        "inference_stats": {
            "success": _sum(tally.total),
            "fail": failures,
            "queue": _sum(tally.queue),
            "compute_input": _sum(tally.assembly),
            "compute_infer": _sum(tally.compute),
            "compute_output": _sum(tally.output),
            "cache_hit": none,
            "cache_miss": none,
        },
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": none,
                "compute_infer": {"count": runs, "ns": round(seconds * 1e9)},
                "compute_output": none,
            }
            for rows, (runs, seconds) in sorted(tally.runs.items())
        ],
        "memory_usage": [
            {"type": "CPU", "id": 0, "byte_size": version.memory_bytes},
        ],
    }


def _sum(times: Histogram) -> dict[str, int]:
    return {"count": times.count, "ns": round(times.total * 1e9)}


def _tensor(of: TensorMetadata, batches: bool) -> dict[str, Any]:
    dims = of.shape[1:] if batches else of.shape
    return {"name": of.name, "data_type": f"TYPE_{of.datatype}", "dims": list(dims)}


def _policy(policy: VersionPolicy) -> dict[str, Any]:
    if policy.all:
        return {"all": {}}
    if policy.specific:
        return {"specific": {"versions": list(policy.specific)}}
    return {"latest": {"num_versions": policy.latest or 1}}


def _queue(queue: Queue) -> dict[str, Any]:
    return {
        "timeout_action": "REJECT",
        "default_timeout_microseconds": (queue.timeout_ms or 0) * 1000,
        "allow_timeout_override": True,
        "max_queue_size": queue.length,
    }


def version_readings(fleet: Fleet, name: str) -> list[VersionReading]:
    """Every version of a model that the server knows."""
    model = fleet.models.get(name)
    found = []
    for number, state in fleet.states(name).items():
        live = model.live.get(number) if model is not None else None
        if model is None or live is None:
            idle = model is None or number not in model.states
            reading = VersionReading(name, str(number), None, state.name, state.reason, idle=idle)
            found.append(reading)
            continue
        reading = VersionReading(
            name,
            str(number),
            live.tally,
            state.name,
            state.reason,
            model.share(number),
            len(live.queue),
            len(live.config.instances),
            live.busy,
            live.memory_bytes,
        )
        found.append(reading)
    return found
