"""What every codec does with values and memories, by groups, in plain torch."""

import torch
from torch.nn.functional import pad

from clapping_ds.codecs.base import Context, limit

LARGEST_BFLOAT16 = torch.finfo(torch.bfloat16).max
NAN_BFLOAT16_BITS = 0x7FC0


def pad_end(x: torch.Tensor, size: int) -> torch.Tensor:
    """With zeros, to `size` in the last dimension; the tensor itself where it is that long."""
    return pad(x, (0, size - x.shape[-1])) if size > x.shape[-1] else x


def to_tiles(tensor: torch.Tensor, num_groups: int, size: int) -> torch.Tensor:
    """[G, S] of the contiguous tensor in its own dtype: a view where it fills the groups, else a copy
    padded with zeros, which `untile_` writes back."""
    return pad_end(tensor.view(-1), num_groups * size).view(num_groups, size)


def untile_(tensor: torch.Tensor, tiles_GS: torch.Tensor) -> None:
    """tensor <- its tiles, unless they are a view of it."""
    if tiles_GS.numel() != tensor.numel():
        tensor.view(-1).copy_(tiles_GS.view(-1)[: tensor.numel()])


def to_groups(tensor: torch.Tensor, num_groups: int, size: int) -> torch.Tensor:
    """fp32 [G, S] of the flattened tensor, padded with zeros."""
    return pad_end(tensor.reshape(-1).float(), num_groups * size).view(num_groups, size)


def subtract_base(
    value: torch.Tensor, base: torch.Tensor | None, num_groups: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_GS = value - base with non-finite groups zeroed, base_GS, and which groups are finite."""
    value_GS = to_groups(value, num_groups, size)
    base_GS = torch.zeros_like(value_GS) if base is None else to_groups(base, num_groups, size)
    x_GS = value_GS - base_GS
    finite_G = x_GS.isfinite().all(1)
    return x_GS.where(finite_G[:, None], 0.0), base_GS, finite_G


def update(base_GS: torch.Tensor, sent_GS: torch.Tensor, bound: float) -> torch.Tensor:
    """fp32 [G, S]: base + sent, saturated at `bound`."""
    return (base_GS + sent_GS).clamp(-bound, bound)


def keep_(memory: torch.Tensor, memory_GS: torch.Tensor, finite_G: torch.Tensor) -> None:
    """memory <- memory_GS, rounded, in the groups that are finite."""
    flat = memory.view(-1)
    finite_GS = finite_G[:, None].expand_as(memory_GS)
    rounded = memory_GS.to(memory.dtype).view(-1)[: flat.numel()]
    flat.copy_(rounded.where(finite_GS.reshape(-1)[: flat.numel()], flat))


def load_base_like(sent_GS: torch.Tensor, context: Context) -> torch.Tensor:
    """fp32 [G, S]: what `sent_GS` is the difference to; zeros where that is nothing."""
    return torch.zeros_like(sent_GS) if context.base is None else to_groups(context.base, *sent_GS.shape)


def deliver_(out: torch.Tensor, sent_GS: torch.Tensor, finite_G: torch.Tensor, context: Context) -> None:
    """Updates the memory by what was sent and hands the result to the receiving stage; groups that are not
    finite arrive as NaN and leave the memory as it was."""
    memory = context.memory
    memory_GS = update(load_base_like(sent_GS, context), sent_GS, limit(out, memory))
    if memory is not None:
        keep_(memory, memory_GS, finite_G)
        memory_GS = memory_GS.to(memory.dtype)
    delivered_GS = memory_GS.where(finite_G[:, None], torch.nan)
    out.view(-1).copy_(delivered_GS.view(-1)[: out.numel()])
