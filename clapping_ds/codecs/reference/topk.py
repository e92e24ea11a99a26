"""The largest of each block: `clapping_ds.codecs.topk` in plain torch."""

from typing import TYPE_CHECKING

import torch

from clapping_ds.codecs.memory import limit
from clapping_ds.codecs.protocol import Context
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
    from clapping_ds.codecs.topk import Sections, TopK


def encode_(codec: "TopK", value: torch.Tensor, sections: "Sections", context: Context) -> None:
    """Writes the k largest of each block of value - base, and steps the memory by them."""
    base = context.memory if context.carry else None
    num_blocks = sections.indexes.numel() // codec.k
    x_GS, base_GS, finite_G = differences(value, base, num_blocks, codec.block)
    x_GS = x_GS.clamp(-LARGEST_BFLOAT16, LARGEST_BFLOAT16)
    index_GK = _largest(x_GS, codec.k)
    kept_GK = x_GS.gather(1, index_GK)
    sections.indexes.copy_(index_GK.view(-1))
    if codec.values == "int8":
        scale_G = (x_GS.abs().amax(1) * (1.0 / 127)).bfloat16().float()
        inverse_G = torch.where(scale_G >= 2.0**-100, 1.0 / scale_G, 0.0)
        code_GK = (kept_GK * inverse_G[:, None] + 0.5).floor().clamp(-127, 127).to(torch.int8)
        sections.values.copy_(code_GK.view(-1))
        sections.scales.copy_(scale_G)
        sections.scales.view(torch.int16).masked_fill_(~finite_G, NAN_BFLOAT16_BITS)
        kept_GK = code_GK.float() * scale_G[:, None]
    else:
        sections.values.copy_(kept_GK.view(-1))
        first_G = sections.values.view(torch.int16).view(-1, codec.k)[:, 0]
        first_G.masked_fill_(~finite_G, NAN_BFLOAT16_BITS)
        kept_GK = kept_GK.bfloat16().float()
    if context.memory is not None:
        sent_GS = torch.zeros_like(x_GS).scatter_(1, index_GK, kept_GK)
        keep_(context.memory, stepped(base_GS, sent_GS, limit(value, context.memory)), finite_G)


def decode_(codec: "TopK", sections: "Sections", out: torch.Tensor, context: Context) -> None:
    """Steps the memory by the values received; `out` gets the result, NaN where not finite."""
    kept_GK = sections.values.view(-1, codec.k).float()
    if codec.values == "int8":
        scale_G = sections.scales.float()
        finite_G = scale_G.isfinite()
        kept_GK = kept_GK * scale_G[:, None]
    else:
        finite_G = kept_GK[:, 0].isfinite()
    sent_GS = kept_GK.new_zeros(kept_GK.shape[0], codec.block)
    sent_GS.scatter_(1, sections.indexes.view(-1, codec.k).to(torch.int64), kept_GK)
    base_GS = torch.zeros_like(sent_GS)
    if context.memory is not None and context.carry:
        base_GS = grouped(context.memory, *sent_GS.shape)
    deliver_(context.memory, out, stepped(base_GS, sent_GS, limit(out, context.memory)), finite_G)


def _largest(x_GS: torch.Tensor, k: int) -> torch.Tensor:
    """int64 [G, K]: indexes of the k largest magnitudes in bfloat16, ascending; of equals the first."""
    rank_GS = x_GS.abs().bfloat16().view(torch.int16).to(torch.int64)
    size = x_GS.shape[1]
    order_S = torch.arange(size - 1, -1, -1, device=x_GS.device)
    chosen_GK = ((rank_GS << 16) | order_S).topk(k, dim=1, sorted=False).values & 0xFFFF
    return (size - 1 - chosen_GK).sort(1).values
