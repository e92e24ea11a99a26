"""The largest of each block for Triton: the twin of `topk_reference`.

The kernel finds the k-th largest by bisection of its 15 bits, so nothing is sorted, and the place of each
value that is kept by one prefix sum.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from clapping_ds.codecs.base import Context
from clapping_ds.codecs.kernels import numerics as num
from clapping_ds.codecs.reference.topk_reference import SMALLEST_SCALE as SMALLEST
from clapping_ds.codecs.reference.topk_reference import Sections, Selection

SMALLEST_SCALE = tl.constexpr(SMALLEST)
TOP_BIT = tl.constexpr(14)
"""Of a bfloat16 without its sign."""
LARGEST_INT8 = tl.constexpr(127.0)
VALUES_PER_WARP = 32 * num.WARP_SIZE


@triton.jit
def select_largest(b_rank, K: tl.constexpr):
    """Which of a block are the k of highest rank (int32 below 2^15), and their places among these."""
    b_cut = tl.zeros((1,), tl.int32)
    for bit in tl.static_range(TOP_BIT, -1, -1):
        b_higher = b_cut | (1 << bit)
        b_count = tl.sum((b_rank >= b_higher).to(tl.int32), 0, keep_dims=True)
        b_cut = tl.where(b_count >= K, b_higher, b_cut)
    b_above = (b_rank > b_cut).to(tl.int32)
    b_equal = (b_rank == b_cut).to(tl.int32)
    b_room = K - tl.sum(b_above, 0, keep_dims=True)
    b_before = tl.cumsum(b_above | (b_equal << 16), 0) - (b_above | (b_equal << 16))
    b_equal_before = b_before >> 16
    m_kept = (b_above == 1) | ((b_equal == 1) & (b_equal_before < b_room))
    return m_kept, (b_before & num.LOW_HALF) + tl.minimum(b_equal_before, b_room)


@triton.jit
def encode_kernel(
    value, memory, indexes, scales, values, num_values,
    K: tl.constexpr, BLOCK: tl.constexpr, INT8: tl.constexpr,
    CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """One block per program."""
    pid = tl.program_id(0).to(tl.int64)
    o_in_block = tl.arange(0, BLOCK)
    o_value = pid * BLOCK + o_in_block
    m_value = o_value < num_values

    b_value = num.load(value + o_value, m_value)
    b_base = num.load(memory + o_value, m_value) if CARRY else tl.zeros_like(b_value)
    b_x = b_value - b_base
    b_finite = num.are_finite(tl.max(num.to_magnitude_bits(b_x), 0, keep_dims=True))
    b_x = num.saturate(tl.where(b_finite, b_x, 0.0), num.LARGEST_BFLOAT16)
    m_kept, o_kept = select_largest(num.to_bf16_bits(tl.abs(b_x)), K)

    if INT8:
        b_scale_bits = num.to_bf16_bits(tl.max(tl.abs(b_x), 0, keep_dims=True) * (1.0 / LARGEST_INT8))
        b_scale = num.from_bf16_bits(b_scale_bits)
        m_scale = b_scale >= SMALLEST_SCALE
        b_inverse = tl.where(m_scale, tl.div_rn(1.0, tl.where(m_scale, b_scale, 1.0)), 0.0)
        b_code = num.saturate(tl.floor(b_x * b_inverse + 0.5), LARGEST_INT8)
        b_sent = b_code * b_scale
        tl.store(values + pid * K + o_kept, b_code.to(tl.int8), m_kept)
        b_flagged = tl.where(b_finite, b_scale_bits, num.NAN_BFLOAT16_BITS).to(tl.int16)
        tl.store(scales + pid + tl.arange(0, 1), b_flagged)
    else:
        b_bits = num.to_bf16_bits(b_x)
        b_sent = num.from_bf16_bits(b_bits)
        b_bits = tl.where((o_kept == 0) & ~b_finite, num.NAN_BFLOAT16_BITS, b_bits)
        tl.store(values + pid * K + o_kept, b_bits.to(tl.int16), m_kept)
    tl.store(indexes + pid * K + o_kept, o_in_block.to(tl.int16), m_kept)
    if HAS_MEMORY:
        b_memory = num.update(b_base, tl.where(m_kept, b_sent, 0.0), LIMIT)
        num.store(memory + o_value, b_memory, m_value & b_finite)


@triton.jit
def decode_kernel(
    indexes, scales, values, memory, out, num_values,
    K: tl.constexpr, K_POWER: tl.constexpr, BLOCK: tl.constexpr, INT8: tl.constexpr,
    CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """One block per program. The indexes ascend, so a value's place is the number of those below it."""
    pid = tl.program_id(0).to(tl.int64)
    m_kept = tl.arange(0, K_POWER) < K
    b_index = tl.load(indexes + pid * K + tl.arange(0, K_POWER), m_kept, other=0).to(tl.int32)
    b_is_sent = tl.histogram(b_index & num.LOW_HALF, BLOCK, mask=m_kept)
    o_place = tl.cumsum(b_is_sent, 0) - b_is_sent
    b_kept = tl.load(values + pid * K + o_place, b_is_sent == 1, other=0)
    if INT8:
        b_first = num.from_bf16_bits(tl.load(scales + pid + tl.arange(0, 1)))
        b_kept = b_kept.to(tl.float32) * b_first
    else:
        b_first = num.from_bf16_bits(tl.load(values + pid * K + tl.arange(0, 1)))
        b_kept = num.from_bf16_bits(b_kept)
    b_finite = b_first == b_first
    b_sent = tl.where(b_finite & (b_is_sent == 1), b_kept, 0.0)

    o_value = pid * BLOCK + tl.arange(0, BLOCK)
    m_value = o_value < num_values
    b_base = num.load(memory + o_value, m_value) if CARRY else tl.zeros((BLOCK,), tl.float32)
    b_memory = num.round_to_dtype(memory, num.update(b_base, b_sent, LIMIT))
    num.store_both(memory, out, o_value, b_memory, m_value, b_finite, HAS_MEMORY)


def choose_launch(selection: Selection, num_values: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the constants and options that both kernels take."""
    constants = {"K": selection.k, "BLOCK": selection.block, "INT8": selection.is_int8}
    options = {"num_warps": max(1, selection.block // VALUES_PER_WARP), "enable_fp_fusion": False}
    return (triton.cdiv(num_values, selection.block),), {**constants, **options}


def encode_(selection: Selection, value: torch.Tensor, sections: Sections, context: Context) -> None:
    """As `topk_reference.encode_`, in one pass on the GPU."""
    grid, constants = choose_launch(selection, value.numel())
    memory, of_memory = num.make_memory_arguments(value, context)
    encode_kernel[grid](
        value, memory, *_pointers(sections), value.numel(), **constants, **of_memory,
    )  # fmt: skip


def decode_(selection: Selection, sections: Sections, out: torch.Tensor, context: Context) -> None:
    """As `topk_reference.decode_`, in one pass on the GPU."""
    grid, constants = choose_launch(selection, out.numel())
    memory, of_memory = num.make_memory_arguments(out, context)
    decode_kernel[grid](
        *_pointers(sections), memory, out, out.numel(), **constants, **of_memory,
        K_POWER=triton.next_power_of_2(selection.k),
    )  # fmt: skip


def _pointers(sections: Sections) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indexes, scales and values as the kernels take them: bfloat16 and uint16 as int16."""
    values = sections.values
    if values.dtype == torch.bfloat16:
        values = values.view(torch.int16)
    return sections.indexes.view(torch.int16), sections.scales.view(torch.int16), values
