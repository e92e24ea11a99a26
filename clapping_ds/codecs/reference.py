"""The codecs in plain torch: the truth that the Triton kernels are tested against, and the CPU path.

Every public function has the signature of its Triton twin, writes the same arguments, and gives the
same bits; the formulas stand in the docstrings of `quant` and `sparse`. Arithmetic is fp32.

Suffixes: G groups (`topk`: blocks), S values of one, K values kept of one, P codes per word, W words.
"""

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from clapping_ds.codecs.memory import limit

if TYPE_CHECKING:
    from clapping_ds.codecs.quant import Quantizer
    from clapping_ds.codecs.sparse import TopK

TINY = 2.0**-100
LARGEST_SCALE = 2.0**127
NAN_BFLOAT16_BITS = 0x7FC0
LARGEST_BFLOAT16 = torch.finfo(torch.bfloat16).max


def copy_(source: torch.Tensor, target: torch.Tensor, memory: torch.Tensor) -> None:
    """target <- source; memory <- source where that is finite."""
    target.copy_(source)
    bound = limit(source, memory)
    memory.copy_(torch.where(source.isfinite(), source.clamp(-bound, bound).to(memory.dtype), memory))


def quant_encode_(
    codec: "Quantizer",
    value: torch.Tensor,
    memory: torch.Tensor | None,
    codes: torch.Tensor,
    scales: torch.Tensor,
    carry: bool,
) -> None:
    """Writes codes and scales of value - base, and steps the memory as the receiver will."""
    x_GS, base_GS, finite_G = _differences(value, memory if carry else None, codec.group_size)
    half_G = _half_steps(codec, x_GS, value.numel())
    inverse_G = torch.where(half_G > 0, 0.5 / half_G, 0.0)
    level_GS = (x_GS * inverse_G[:, None]).floor_().add_(1 << (codec.bits - 1))
    code_GS = level_GS.clamp_(0, (1 << codec.bits) - 1).to(torch.int32)

    codes.copy_(_packed(codec, code_GS))
    scales.copy_(half_G)
    scales.view(torch.int16).masked_fill_(~finite_G, NAN_BFLOAT16_BITS)
    if memory is not None:
        memory_GS = _stepped(base_GS, _dequantized(codec, code_GS, half_G), limit(value, memory))
        _keep_(memory, memory_GS, finite_G)


def quant_decode_(
    codec: "Quantizer",
    codes: torch.Tensor,
    scales: torch.Tensor,
    memory: torch.Tensor | None,
    out: torch.Tensor,
    carry: bool,
) -> None:
    """Steps the memory by what codes and scales say; `out` gets the result, NaN where not finite."""
    half_G = scales.float()
    sent_GS = _dequantized(codec, _unpacked(codec, codes, scales.numel()), half_G)
    base_GS = _grouped(memory, codec.group_size) if memory is not None and carry else None
    memory_GS = _stepped(base_GS, sent_GS, limit(out, memory))
    _deliver_(memory, out, memory_GS, half_G.isfinite())


def topk_encode_(
    codec: "TopK",
    value: torch.Tensor,
    memory: torch.Tensor | None,
    values: torch.Tensor,
    indexes: torch.Tensor,
    carry: bool,
) -> None:
    """Writes the k largest of each block of value - base, and steps the memory by them."""
    x_GS, base_GS, finite_G = _differences(value, memory if carry else None, codec.block)
    index_GK = _largest(x_GS, codec.k)
    kept_GK = x_GS.gather(1, index_GK).clamp_(-LARGEST_BFLOAT16, LARGEST_BFLOAT16).bfloat16()
    sent_GS = torch.zeros_like(x_GS).scatter_(1, index_GK, kept_GK.float())

    values.copy_(kept_GK.view(-1))
    values.view(torch.int16).view(-1, codec.k)[:, 0].masked_fill_(~finite_G, NAN_BFLOAT16_BITS)
    indexes.copy_(index_GK.view(-1))
    if memory is not None:
        _keep_(memory, _stepped(base_GS, sent_GS, limit(value, memory)), finite_G)


def topk_decode_(
    codec: "TopK",
    values: torch.Tensor,
    indexes: torch.Tensor,
    memory: torch.Tensor | None,
    out: torch.Tensor,
    carry: bool,
) -> None:
    """Steps the memory by the values received; `out` gets the result, NaN where not finite."""
    kept_GK = values.view(-1, codec.k).float()
    finite_G = kept_GK[:, 0].isfinite()
    sent_GS = kept_GK.new_zeros(kept_GK.shape[0], codec.block)
    sent_GS.scatter_(1, indexes.view(-1, codec.k).to(torch.int64), kept_GK)
    base_GS = _grouped(memory, codec.block) if memory is not None and carry else None
    _deliver_(memory, out, _stepped(base_GS, sent_GS, limit(out, memory)), finite_G)


def _grouped(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """fp32 [G, S] of the flattened tensor, the last group padded with zeros."""
    flat = tensor.reshape(-1).float()
    return pad(flat, (0, -flat.numel() % size)).view(-1, size)


def _differences(
    value: torch.Tensor, memory: torch.Tensor | None, size: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """x_GS = value - base with non-finite groups zeroed, base_GS, and which groups are finite."""
    value_GS = _grouped(value, size)
    base_GS = None if memory is None else _grouped(memory, size)
    x_GS = value_GS if base_GS is None else value_GS - base_GS
    finite_G = x_GS.isfinite().all(1)
    if not finite_G.all():
        x_GS = x_GS.where(finite_G[:, None], 0.0)
    return x_GS, base_GS, finite_G


def _half_steps(codec: "Quantizer", x_GS: torch.Tensor, num_values: int) -> torch.Tensor:
    """fp32 [G] half step of each group, already rounded to bfloat16."""
    magnitude_GS = x_GS.abs()
    largest_G = magnitude_GS.amax(1).clamp_(max=LARGEST_SCALE)
    largest_G = largest_G.where(largest_G >= TINY, 0.0)
    if codec.name != "sign":
        return (largest_G * (1.0 / ((1 << codec.bits) - 1))).bfloat16().float()
    unit_G = 65536.0 / largest_G.where(largest_G > 0, 1.0)
    total_G = (magnitude_GS * unit_G[:, None]).to(torch.int32).sum(1, dtype=torch.int32).float()
    count_G = torch.full_like(total_G, codec.group_size)
    count_G[-1] -= x_GS.numel() - num_values
    mean_G = total_G / (count_G * 65536.0) * largest_G
    return mean_G.clamp_(max=LARGEST_SCALE).bfloat16().float()


def _dequantized(codec: "Quantizer", code_GS: torch.Tensor, half_G: torch.Tensor) -> torch.Tensor:
    """fp32 [G, S]: (2 * code - (2^b - 1)) * h, exact."""
    return (2 * code_GS - ((1 << codec.bits) - 1)).float().mul_(half_G[:, None])


def _packed(codec: "Quantizer", code_GS: torch.Tensor) -> torch.Tensor:
    """uint8 of the codes, in the byte layout that `quant` states."""
    num_codes = codec.codes_per_word
    code_GPW = code_GS.view(code_GS.shape[0], num_codes, -1)
    word_GW = code_GPW[:, 0].clone()
    for part in range(1, num_codes):
        word_GW |= code_GPW[:, part] << (part * codec.bits)
    rows = range(codec.bits * num_codes // 8)
    return torch.stack([(word_GW >> (8 * row)) & 0xFF for row in rows], 1).to(torch.uint8).view(-1)


def _unpacked(codec: "Quantizer", codes: torch.Tensor, num_groups: int) -> torch.Tensor:
    """int32 [G, S], the inverse of `_packed`."""
    num_codes = codec.codes_per_word
    num_rows = codec.bits * num_codes // 8
    byte_GRW = codes.view(num_groups, num_rows, codec.group_size // num_codes).to(torch.int32)
    word_GW = byte_GRW[:, 0]
    for row in range(1, num_rows):
        word_GW = word_GW | (byte_GRW[:, row] << (8 * row))
    mask = (1 << codec.bits) - 1
    parts = [(word_GW >> (part * codec.bits)) & mask for part in range(num_codes)]
    return torch.stack(parts, 1).view(num_groups, codec.group_size)


def _largest(x_GS: torch.Tensor, k: int) -> torch.Tensor:
    """int64 [G, K]: indexes of the k largest magnitudes, largest first; of equals a positive one
    first, then the one with the lower index."""
    bits_GS = x_GS.view(torch.int32).to(torch.int64)
    size = x_GS.shape[1]
    order_S = torch.arange(size - 1, -1, -1, device=x_GS.device)
    key_GS = ((bits_GS & 0x7FFFFFFF) << 17) | ((bits_GS >= 0).to(torch.int64) << 16) | order_S
    return size - 1 - (key_GS.topk(k, dim=1, sorted=True).values & 0xFFFF)


def _stepped(base_GS: torch.Tensor | None, sent_GS: torch.Tensor, bound: float) -> torch.Tensor:
    """fp32 [G, S]: base + sent, saturated at `bound`."""
    return (sent_GS + (0.0 if base_GS is None else base_GS)).clamp_(-bound, bound)


def _keep_(memory: torch.Tensor, memory_GS: torch.Tensor, finite_G: torch.Tensor) -> None:
    """memory <- memory_GS, rounded, in the groups that are finite."""
    flat = memory.view(-1)
    rounded = memory_GS.view(-1)[: flat.numel()].to(memory.dtype)
    if not finite_G.all():
        finite = finite_G.repeat_interleave(memory_GS.shape[1])[: flat.numel()]
        rounded = rounded.where(finite, flat)
    flat.copy_(rounded)


def _deliver_(
    memory: torch.Tensor | None, out: torch.Tensor, memory_GS: torch.Tensor, finite_G: torch.Tensor
) -> None:
    """Keeps the stepped memory and hands it to the receiving stage."""
    if memory is not None:
        _keep_(memory, memory_GS, finite_G)
        memory_GS = memory_GS.to(memory.dtype)
    delivered_GS = memory_GS.where(finite_G[:, None], torch.nan)
    out.view(-1).copy_(delivered_GS.view(-1)[: out.numel()])
