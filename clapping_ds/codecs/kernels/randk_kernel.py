"""Random values of each block for Triton: the twin of `randk_reference`."""

from typing import Any

import torch
import triton
import triton.language as tl

from clapping_ds.codecs.base import Context
from clapping_ds.codecs.kernels import numerics as num
from clapping_ds.codecs.kernels import rotation
from clapping_ds.codecs.reference.randk_reference import Selection

TILE = 2048


@triton.jit
def permute(o_block, seed_low, seed_high, BLOCK: tl.constexpr, HALF: tl.constexpr):
    """uint32 [blocks, BLOCK]: a random permutation of each block."""
    b_key = rotation.make_group_keys(o_block, seed_low, seed_high)[:, None]
    b_place = tl.arange(0, BLOCK).to(tl.uint32)[None, :] ^ (b_key & (BLOCK - 1))
    for _ in tl.static_range(3):
        b_key = rotation.mix(b_key)
        b_place = (b_place * ((b_key & (BLOCK - 1)) | 1) + (b_key >> 16)) & (BLOCK - 1)
        b_place = b_place ^ (b_place >> HALF)
    return b_place.to(tl.int32)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def encode_kernel(
    value, memory, values, num_values, seed_low, seed_high,
    K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr, HALF: tl.constexpr,
    CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    o_block = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    o_value = o_block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_value = o_value < num_values
    b_value = num.load(value + o_value, m_value)
    b_base = num.load(memory + o_value, m_value) if CARRY else tl.zeros_like(b_value)
    b_x = b_value - b_base
    b_finite = num.are_finite(tl.max(num.to_magnitude_bits(b_x), 1, keep_dims=True))
    b_bits = num.to_bf16_bits(num.saturate(tl.where(b_finite, b_x, 0.0), num.LARGEST_BFLOAT16))

    b_place = permute(o_block, seed_low, seed_high, BLOCK, HALF)
    m_kept = b_place < K
    if HAS_MEMORY:
        b_memory = num.update(b_base, tl.where(m_kept, num.from_bf16_bits(b_bits), 0.0), LIMIT)
        num.store(memory + o_value, b_memory, m_value & b_finite)
    b_bits = tl.where((b_place == 0) & ~b_finite, num.NAN_BFLOAT16_BITS, b_bits).to(tl.int16)
    m_block = (o_block * BLOCK < num_values)[:, None]
    tl.store(values + o_block[:, None] * K + b_place, b_bits, m_kept & m_block)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def decode_kernel(
    values, memory, out, num_values, seed_low, seed_high,
    K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr, HALF: tl.constexpr,
    CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    o_block = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    o_value = o_block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_value = o_value < num_values
    m_block = (o_block * BLOCK < num_values)[:, None]
    b_place = permute(o_block, seed_low, seed_high, BLOCK, HALF)
    b_bits = tl.load(values + o_block[:, None] * K + b_place, (b_place < K) & m_block, other=0)
    b_first = num.from_bf16_bits(tl.load(values + o_block[:, None] * K, m_block, other=0))
    b_base = num.load(memory + o_value, m_value) if CARRY else tl.zeros((BLOCK_G, BLOCK), tl.float32)
    b_finite = b_first == b_first
    b_sent = tl.where(b_finite, num.from_bf16_bits(b_bits), 0.0)
    b_memory = num.round_to_dtype(memory, num.update(b_base, b_sent, LIMIT))
    num.store_both(memory, out, o_value, b_memory, m_value, b_finite, HAS_MEMORY)


def choose_launch(selection: Selection, num_values: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the constants and options that both kernels take."""
    num_blocks = max(1, TILE // selection.block)
    constants = {
        "K": selection.k, "BLOCK": selection.block, "BLOCK_G": num_blocks, "HALF": selection.half,
        "num_warps": num.choose_num_warps(TILE),
    }  # fmt: skip
    return (triton.cdiv(num_values, num_blocks * selection.block),), constants


def encode_(selection: Selection, value: torch.Tensor, values: torch.Tensor, context: Context) -> None:
    """As `randk_reference.encode_`, in one pass on the GPU."""
    grid, constants = choose_launch(selection, value.numel())
    memory, of_memory = num.make_memory_arguments(value, context)
    encode_kernel[grid](
        value, memory, values.view(torch.int16), value.numel(), *rotation.split_seed(context.seed),
        **constants, **of_memory,
    )  # fmt: skip


def decode_(selection: Selection, values: torch.Tensor, out: torch.Tensor, context: Context) -> None:
    """As `randk_reference.decode_`, in one pass on the GPU."""
    grid, constants = choose_launch(selection, out.numel())
    memory, of_memory = num.make_memory_arguments(out, context)
    decode_kernel[grid](
        values.view(torch.int16), memory, out, out.numel(), *rotation.split_seed(context.seed),
        **constants, **of_memory,
    )  # fmt: skip
