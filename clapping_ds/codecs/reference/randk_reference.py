"""Random values of each block: `clapping_ds.codecs.randk` in plain torch."""

from typing import NamedTuple

import torch

from clapping_ds.codecs.base import Context, limit
from clapping_ds.codecs.reference.numerics_reference import (
    LARGEST_BFLOAT16,
    NAN_BFLOAT16_BITS,
    deliver_,
    keep_,
    subtract_base,
    update,
)
from clapping_ds.codecs.reference.rotation_reference import make_group_keys, mix


class Selection(NamedTuple):
    """How much of each block is sent."""

    k: int
    block: int

    @property
    def half(self) -> int:
        """Shift of the permutation's rounds: half the bits of an index."""
        return (self.block.bit_length() - 1) // 2 + 1


def encode_(selection: Selection, value: torch.Tensor, values: torch.Tensor, context: Context) -> None:
    """Writes the values of value - base that were drawn, and updates the memory by them."""
    x_GS, base_GS, finite_G = subtract_base(
        value, context.base, values.numel() // selection.k, selection.block
    )
    place_GS = permute(selection, x_GS.shape[0], context.seed, value.device)
    kept_GS = x_GS.clamp(-LARGEST_BFLOAT16, LARGEST_BFLOAT16).bfloat16()
    values.copy_(torch.empty_like(kept_GS).scatter_(1, place_GS, kept_GS)[:, : selection.k].reshape(-1))
    first_G = values.view(torch.int16).view(-1, selection.k)[:, 0]
    first_G.masked_fill_(~finite_G, NAN_BFLOAT16_BITS)
    if context.memory is not None:
        sent_GS = kept_GS.float().where(place_GS < selection.k, 0.0)
        keep_(context.memory, update(base_GS, sent_GS, limit(value, context.memory)), finite_G)


def decode_(selection: Selection, values: torch.Tensor, out: torch.Tensor, context: Context) -> None:
    """Updates the memory by the values received; `out` gets the result, NaN where not finite."""
    kept_GK = values.view(-1, selection.k).float()
    place_GS = permute(selection, kept_GK.shape[0], context.seed, out.device)
    sent_GS = kept_GK.gather(1, place_GS.clamp(max=selection.k - 1)).where(place_GS < selection.k, 0.0)
    deliver_(out, sent_GS, kept_GK[:, 0].isfinite(), context)


def permute(selection: Selection, num_blocks: int, seed: int, device: torch.device) -> torch.Tensor:
    """int64 [G, S]: a random permutation of each block; the first k places are sent."""
    mask, half = selection.block - 1, selection.half
    key_G1 = make_group_keys(torch.arange(num_blocks, device=device), seed)[:, None]
    place_GS = torch.arange(selection.block, device=device) ^ (key_G1 & mask)
    for _ in range(3):
        key_G1 = mix(key_G1)
        place_GS = (place_GS * ((key_G1 & mask) | 1) + (key_G1 >> 16)) & mask
        place_GS = place_GS ^ (place_GS >> half)
    return place_GS
