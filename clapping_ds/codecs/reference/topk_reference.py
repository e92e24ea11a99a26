"""The largest of each block: `clapping_ds.codecs.topk` in plain torch."""

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

SMALLEST_SCALE = 2.0**-100


class Selection(NamedTuple):
    """What of each block is sent, and how."""

    k: int
    block: int
    is_int8: bool


class Sections(NamedTuple):
    """Views of a payload. `scales` is empty with bfloat16 values."""

    indexes: torch.Tensor
    scales: torch.Tensor
    values: torch.Tensor
    padding: torch.Tensor


def encode_(selection: Selection, value: torch.Tensor, sections: Sections, context: Context) -> None:
    """Writes the k largest of each block of value - base, and updates the memory by them."""
    num_blocks = sections.indexes.numel() // selection.k
    x_GS, base_GS, finite_G = subtract_base(value, context.base, num_blocks, selection.block)
    x_GS = x_GS.clamp(-LARGEST_BFLOAT16, LARGEST_BFLOAT16)
    index_GK = _find_largest(x_GS, selection.k)
    kept_GK = x_GS.gather(1, index_GK)
    sections.indexes.copy_(index_GK.view(-1))
    if selection.is_int8:
        scale_G = (x_GS.abs().amax(1) * (1.0 / 127)).bfloat16().float()
        inverse_G = torch.where(scale_G >= SMALLEST_SCALE, 1.0 / scale_G, 0.0)
        code_GK = (kept_GK * inverse_G[:, None] + 0.5).floor().clamp(-127, 127).to(torch.int8)
        sections.values.copy_(code_GK.view(-1))
        sections.scales.copy_(scale_G)
        sections.scales.view(torch.int16).masked_fill_(~finite_G, NAN_BFLOAT16_BITS)
        kept_GK = code_GK.float() * scale_G[:, None]
    else:
        sections.values.copy_(kept_GK.view(-1))
        first_G = sections.values.view(torch.int16).view(-1, selection.k)[:, 0]
        first_G.masked_fill_(~finite_G, NAN_BFLOAT16_BITS)
        kept_GK = kept_GK.bfloat16().float()
    if context.memory is not None:
        sent_GS = torch.zeros_like(x_GS).scatter_(1, index_GK, kept_GK)
        keep_(context.memory, update(base_GS, sent_GS, limit(value, context.memory)), finite_G)


def decode_(selection: Selection, sections: Sections, out: torch.Tensor, context: Context) -> None:
    """Updates the memory by the values received; `out` gets the result, NaN where not finite."""
    kept_GK = sections.values.view(-1, selection.k).float()
    if selection.is_int8:
        scale_G = sections.scales.float()
        finite_G = scale_G.isfinite()
        kept_GK = kept_GK * scale_G[:, None]
    else:
        finite_G = kept_GK[:, 0].isfinite()
    sent_GS = kept_GK.new_zeros(kept_GK.shape[0], selection.block)
    sent_GS.scatter_(1, sections.indexes.view(-1, selection.k).to(torch.int64), kept_GK)
    deliver_(out, sent_GS, finite_G, context)


def _find_largest(x_GS: torch.Tensor, k: int) -> torch.Tensor:
    """int64 [G, K]: indexes of the k largest magnitudes in bfloat16, ascending; of equals the first."""
    rank_GS = x_GS.abs().bfloat16().view(torch.int16).to(torch.int64)
    size = x_GS.shape[1]
    order_S = torch.arange(size - 1, -1, -1, device=x_GS.device)
    chosen_GK = ((rank_GS << 16) | order_S).topk(k, dim=1, sorted=False).values & 0xFFFF
    return (size - 1 - chosen_GK).sort(1).values
