"""Holds masks on tensors as training leaves them: whole, or a part of each on every process.

Under FSDP2 (`torch.distributed.fsdp.fully_shard`) a parameter is a `DTensor`: each process has a
part. The mask stays whole on all of them, as it is in the checkpoint, and the part of it that
belongs to the local values is cut out where it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from twofour.core import patterns
from twofour.core.errors import InputError, UnsupportedError
from twofour.train.layers import WeightRef, find_weights
from twofour.train.ranks import from_first_rank, several

_CACHED_VALUES = 1 << 16
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def whole(tensor: Tensor) -> Tensor:
    """The values of all processes; of a plain tensor, itself. Every process has to call it.

    Args:
        tensor: [N, C, ...].
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def zero_removed(tensor: Tensor, mask: Tensor) -> None:
    """Sets to zero, in place, what the mask removes; NaN too.

    Bits times 0 or 1, on a CPU as many rows at a time as fit its cache: there `masked_fill_` takes
    ten times as long, more than many an optimizer's step.

    Args:
        tensor: float, a weight or a state of an optimizer; of a `DTensor`, the local part.
        mask: bool, the whole tensor's shape.
    """
    if isinstance(tensor, DTensor):
        mask = local_part(mask, tensor)
        tensor = tensor.to_local()
    mask = mask.to(tensor.device)
    rows = max(1, len(tensor))
    if tensor.device.type == "cpu" and tensor.numel():
        rows = max(1, _CACHED_VALUES * rows // tensor.numel())
    bits = tensor.detach().view(_INTEGERS[tensor.element_size()])
    for part, kept in zip(torch.split(bits, rows), torch.split(mask, rows), strict=True):
        part.mul_(kept.to(part.dtype))


def local_part(mask: Tensor, like: DTensor) -> Tensor:
    """The part of a whole mask that belongs to this process's part of a tensor.

    Args:
        mask: the shape of the whole tensor.
        like: the tensor.

    Raises:
        UnsupportedError: it is placed in another way than sharded along axes or replicated.
    """
    mesh = like.device_mesh
    coordinates = mesh.get_coordinate()
    if coordinates is None:
        return mask.new_empty((0, *mask.shape[1:]))
    for axis, placement in enumerate(like.placements):
        if type(placement) is Shard:
            parts = mask.chunk(mesh.size(axis), placement.dim)
            i = coordinates[axis]
            mask = parts[i] if i < len(parts) else mask.narrow(placement.dim, 0, 0)
        elif type(placement) is not Replicate:
            raise UnsupportedError(
                f"cannot hold a mask on a tensor that is placed {placement} on axis {axis} of "
                f"its device mesh",
                ["expected Shard or Replicate"],
                "use fully_shard on a mesh of one axis, or replicate and shard on one of two",
            )
    return mask


def reshard(model: nn.Module) -> None:
    """Drops the gathered copies that FSDP2 keeps after a forward pass: the parts are the weights.

    Args:
        model: of which modules may have been given to `fully_shard`.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def hold(weights: Iterable[WeightRef], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Sets to zero what the masks remove: of weights, and of what an optimizer keeps for them.

    Args:
        weights: those without a mask are left alone.
        optimizer: its states of a weight's shape (momentum, averages of squares) are masked too.
    """
    on_gpus: list[tuple[Tensor, Tensor]] = []
    for tensor, mask in _held(weights, optimizer):
        if tensor.is_cuda and mask.is_cuda and not isinstance(tensor, DTensor):
            on_gpus.append((tensor, mask))
        else:
            zero_removed(tensor, mask)
    if on_gpus:
        zero_together(on_gpus)


@torch.no_grad()
def zero_together(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """`zero_removed` for many tensors: on a GPU it is the starts of kernels that take the time.

    Args:
        pairs: plain tensors, each with its mask, on one device.
    """
    bits = [tensor.detach().view(_INTEGERS[tensor.element_size()]) for tensor, _ in pairs]
    torch._foreach_mul_(bits, [mask for _, mask in pairs])


def _held(
    weights: Iterable[WeightRef], optimizer: torch.optim.Optimizer | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor that a mask is held on, with the mask."""
    for weight in weights:
        mask = weight.mask
        if mask is None:
            continue
        parameter = weight.parameter
        yield parameter, mask
        states = {} if optimizer is None else optimizer.state.get(parameter, {})
        for value in states.values():
            if not isinstance(value, Tensor) or value.shape != mask.shape:
                continue
            if value.is_floating_point():  # what is quantized may have no zero
                yield value, mask


def set_mask(weight: WeightRef, mask: Tensor) -> None:
    """Keeps the mask as a buffer of the weight's module, in place if it has one already.

    Args:
        weight: gets the mask.
        mask: bool, the weight's shape.
    """
    held = weight.mask
    if held is None:
        parameter = weight.parameter
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        held = mask.detach().to(device=local.device, copy=True).contiguous()
        weight.module.register_buffer(weight.mask_name, held)
    else:
        held.copy_(mask)


def drop_mask(weight: WeightRef) -> None:
    """Removes the mask's buffer, if there is one; the weight stays as it is."""
    if weight.mask is not None:
        delattr(weight.module, weight.mask_name)


def agree(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of process 0 on every process of `torch.distributed`; alone, those given.

    Calibration data differs between processes, and so would masks chosen from it.

    Args:
        masks: name -> bool; the same names and shapes on every process.

    Raises:
        InputError: processes have masks for other weights than process 0.
    """
    masks = dict(masks)
    if not several():
        return masks
    shapes = [(name, tuple(mask.shape)) for name, mask in masks.items()]
    everywhere: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, shapes)
    others = [i for i, theirs in enumerate(everywhere) if theirs != everywhere[0]]
    if others:  # seen by all processes, so that none waits for the others
        raise InputError(
            "processes mask different weights",
            [f"process {i} has {everywhere[i]}" for i in (0, others[0])],
            "prune the same model with the same options on every process",
        )
    sent = [mask.to(torch.uint8) for mask in masks.values()]
    from_first_rank(sent)
    return {name: mask.to(torch.bool) for name, mask in zip(masks, sent, strict=True)}


def digest(mask: Tensor) -> str:
    """A hash of a mask's values and shape, the same on every device.

    Args:
        mask: bool.
    """
    hashed = hashlib.blake2b(repr(tuple(mask.shape)).encode(), digest_size=16)
    hashed.update(mask.detach().to("cpu").contiguous().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def find_copies(weights: Iterable[WeightRef], model: nn.Module) -> dict[str, WeightRef]:
    """The same weights in a copy of the model.

    Args:
        weights: of the model.
        model: the copy; wrappers such as an `AveragedModel` are looked into.

    Raises:
        InputError: the copy lacks a weight, or has it in another shape.
    """
    there = {weight.name: weight for weight in find_weights(model)}
    found, reasons = {}, []
    for weight in weights:
        copied = there.get(weight.name)
        if copied is None:
            reasons.append(f"{weight.name}: it has no such weight")
        elif copied.shape != weight.shape:
            reasons.append(f"{weight.name}: expected shape {weight.shape}, got {copied.shape}")
        else:
            found[weight.name] = copied
    if reasons:
        raise InputError(
            f"this {type(model).__name__} is no copy of the pruned model",
            reasons,
            "make it by copy.deepcopy(model) or torch.optim.swa_utils.AveragedModel(model)",
        )
    return found


def follow(weights: Iterable[WeightRef], copies: Mapping[str, WeightRef]) -> None:
    """Gives the copies the masks of the weights, and applies them there.

    Args:
        weights: those without a mask are left alone.
        copies: by name, as from `find_copies`.
    """
    for weight in weights:
        if weight.mask is not None:
            set_mask(copies[weight.name], weight.mask)
    hold(copies.values())


def why_no_mask(mask: object, shape: tuple[int, ...], pattern: patterns.Pattern) -> str | None:
    """Why this cannot be the mask of a weight, in words; None if it can.

    Args:
        mask: should be bool, of the weight's shape.
        shape: of the weight.
        pattern: that the mask has to have.
    """
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        return f"expected a mask of dtype torch.bool, got {got}"
    if tuple(mask.shape) != shape:
        return f"expected a mask of shape {shape}, got {tuple(mask.shape)}"
    violation = patterns.first_violation(mask.detach().cpu().numpy(), pattern)
    return None if violation is None else f"mask is not {pattern}: {violation}"


def why_broken(weight: Tensor, mask: Tensor, pattern: patterns.Pattern) -> str | None:
    """The first place where a weight breaks its pattern or its mask, in words, or None.

    Args:
        weight: [N, C, ...]; under FSDP2 every process has to call this.
        mask: bool, the same shape.
        pattern: of both.
    """
    nonzero = (whole(weight.detach()) != 0).cpu()
    violation = patterns.first_violation(nonzero.numpy(), pattern)
    if violation is not None:
        return f"weight is not {pattern}: {violation}"
    no_mask = why_no_mask(mask, tuple(nonzero.shape), pattern)
    if no_mask is not None:
        return no_mask
    return why_stray(weight, mask)


def why_stray(weight: Tensor, mask: Tensor) -> str | None:
    """Where a weight is not zero although its mask removes it, in words, or None.

    Args:
        weight: [N, C, ...]; under FSDP2 every process has to call this.
        mask: bool, the same shape.
    """
    stray = (whole(weight.detach()) != 0).cpu() & ~mask.cpu()
    if not stray.any():
        return None
    row, channel, *tap = (int(i) for i in stray.nonzero()[0])
    where = f"output channel {row}, " + (f"tap ({','.join(map(str, tap))}), " if tap else "")
    return (
        f"{int(stray.sum())} values are not zero where the mask is, first {where}channel {channel}"
    )
