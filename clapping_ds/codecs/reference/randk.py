"""Random values of each block: `clapping_ds.codecs.randk` in plain torch."""

from typing import TYPE_CHECKING

import torch

from clapping_ds.codecs.memory import limit
from clapping_ds.codecs.protocol import Context
from clapping_ds.codecs.reference.random_bits import group_keys, mixed
from clapping_ds.codecs.reference.steps import (
    LARGEST_BFLOAT16,
    NAN_BFLOAT16_BITS,
    deliver_,
    differences,
    grouped,
    keep_,
    stepped,
)

if TYPE_CHECKING:
    from clapping_ds.codecs.randk import RandK


def encode_(codec: "RandK", value: torch.Tensor, values: torch.Tensor, context: Context) -> None:
    """Writes the values of value - base that were drawn, and steps the memory by them."""
    base = context.memory if context.carry else None
    x_GS, base_GS, finite_G = differences(value, base, values.numel() // codec.k, codec.block)
    place_GS = places(codec, x_GS.shape[0], context.seed, value.device)
    kept_GS = x_GS.clamp(-LARGEST_BFLOAT16, LARGEST_BFLOAT16).bfloat16()
    values.copy_(torch.empty_like(kept_GS).scatter_(1, place_GS, kept_GS)[:, : codec.k].reshape(-1))
    first_G = values.view(torch.int16).view(-1, codec.k)[:, 0]
    first_G.masked_fill_(~finite_G, NAN_BFLOAT16_BITS)
    if context.memory is not None:
        sent_GS = kept_GS.float().where(place_GS < codec.k, 0.0)
        keep_(context.memory, stepped(base_GS, sent_GS, limit(value, context.memory)), finite_G)


def decode_(codec: "RandK", values: torch.Tensor, out: torch.Tensor, context: Context) -> None:
    """Steps the memory by the values received; `out` gets the result, NaN where not finite."""
    kept_GK = values.view(-1, codec.k).float()
    place_GS = places(codec, kept_GK.shape[0], context.seed, out.device)
    sent_GS = kept_GK.gather(1, place_GS.clamp(max=codec.k - 1)).where(place_GS < codec.k, 0.0)
    base_GS = torch.zeros_like(sent_GS)
    if context.memory is not None and context.carry:
        base_GS = grouped(context.memory, *sent_GS.shape)
    memory_GS = stepped(base_GS, sent_GS, limit(out, context.memory))
    deliver_(context.memory, out, memory_GS, kept_GK[:, 0].isfinite())


def places(codec: "RandK", num_blocks: int, seed: int, device: torch.device) -> torch.Tensor:
    """int64 [G, S]: a random permutation of each block; the first k places are sent."""
    mask, half = codec.block - 1, codec.half
    key_G1 = group_keys(torch.arange(num_blocks, device=device), seed)[:, None]
    place_GS = torch.arange(codec.block, device=device) ^ (key_G1 & mask)
    for _ in range(3):
        key_G1 = mixed(key_G1)
        place_GS = (place_GS * ((key_G1 & mask) | 1) + (key_G1 >> 16)) & mask
        place_GS = place_GS ^ (place_GS >> half)
    return place_GS
