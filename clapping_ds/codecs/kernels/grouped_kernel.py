"""One fused kernel to encode and one to decode for all codecs with one scale per group: `codecs.grouped`.

ENCODE_GROUPS and DECODE_LEVEL are the functions of a family: `quant_kernel`, `eden_kernel`, `float8_kernel`.
"""

from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl

from clapping_ds.codecs.base import Context
from clapping_ds.codecs.kernels import numerics as num
from clapping_ds.codecs.kernels import rotation
from clapping_ds.codecs.reference import grouped_reference
from clapping_ds.codecs.reference.grouped_reference import Scheme

TILE = 2048
"""Values of one segment per program."""
MOST_UNROLLED = 4
"""Segments; with 8 and two at a time, registers spill."""
LARGEST_GROUP = 1024
VALUES_PER_THREAD_OF_LARGEST = 8
"""To encode with rotation and noise. With 16, int8 spills on sm_90 (fp32 values, fp16 memory); with 8, codes
are stored 8 bytes at a time."""
LARGEST = tl.constexpr(grouped_reference.LARGEST)
SMALLEST_EXPONENT = tl.constexpr(grouped_reference.SMALLEST_EXPONENT)
LARGEST_EXPONENT = tl.constexpr(239)
"""Biased, of `LARGEST`."""


@triton.jit
def locate_tile(segment, num_rows, num_values, GROUP: tl.constexpr, BLOCK_G: tl.constexpr):
    """This program's groups of a segment: number of the first, offset of its first value, which groups
    exist, offsets of values from there, and which values exist. Only the scalars need 64 bits."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_G
    first_group = segment * num_rows + first_row
    first_value = first_group * GROUP
    o_group = tl.arange(0, BLOCK_G)
    o_value = o_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    m_group = (o_group < num_rows - first_row) & (o_group * GROUP < num_values - first_value)
    m_value = (o_value < (num_rows - first_row) * GROUP) & (o_value < num_values - first_value)
    return first_group, first_value, m_group, o_value, m_value


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def encode_kernel(
    value, memory, codes, scales, num_values, seed_low, seed_high,
    ENCODE_GROUPS: tl.constexpr, DECODE_LEVEL: tl.constexpr, CONSTANTS: tl.constexpr,
    BITS: tl.constexpr, SEGMENTS: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_G: tl.constexpr, ROTATE: tl.constexpr, STOCHASTIC: tl.constexpr, UNROLL: tl.constexpr,
    CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    num_values = tl.cast(num_values, tl.int64)
    num_rows = tl.cdiv(tl.cdiv(num_values, GROUP), SEGMENTS)
    o_group = tl.arange(0, BLOCK_G)
    b_word = tl.zeros((BLOCK_G, GROUP), tl.int32)
    for segment in tl.range(0, SEGMENTS, loop_unroll_factor=UNROLL):
        group, first, m_group, o_value, m_value = locate_tile(segment, num_rows, num_values, GROUP, BLOCK_G)
        b_value = num.load(value + first + o_value, m_value)
        b_base = num.load(memory + first + o_value, m_value) if CARRY else tl.zeros_like(b_value)
        b_x = b_value - b_base
        b_peak = tl.max(num.to_magnitude_bits(b_x), 1)
        b_finite = num.are_finite(b_peak)
        b_y = num.saturate(tl.where(b_finite[:, None], b_x, 0.0), LARGEST)

        b_exponent = tl.minimum(b_peak >> num.FP32_MANTISSA, LARGEST_EXPONENT)
        m_tiny = (b_exponent < SMALLEST_EXPONENT) | ~b_finite
        b_down = tl.where(m_tiny, 0, (2 * num.FP32_BIAS - b_exponent) << num.FP32_MANTISSA).to(
            tl.float32, bitcast=True
        )
        b_up = tl.where(m_tiny, 0, b_exponent << num.FP32_MANTISSA).to(tl.float32, bitcast=True)
        b_y = b_y * b_down[:, None]
        b_key = rotation.make_group_keys(group + o_group, seed_low, seed_high)
        b_count = tl.minimum(tl.maximum(num_values - first - o_group * GROUP, 1), GROUP).to(tl.float32)
        if ROTATE:
            b_y = rotation.flip_signs(b_y, b_key, BLOCK_G, GROUP)
            b_y = rotation.apply_hadamard(b_y, BLOCK_G, GROUP, LEVELS)
            b_count = tl.full((BLOCK_G,), GROUP, tl.float32)
            b_up = b_up * (1.0 / GROUP)
        b_noise = rotation.draw_noise(b_key, GROUP) if STOCHASTIC else b_y
        b_code, b_scale = ENCODE_GROUPS(b_y, b_count, b_noise, CONSTANTS, BLOCK_G, GROUP, LEVELS)
        b_scale_bits = num.to_bf16_bits(b_scale * b_up)

        if HAS_MEMORY:
            b_sent = DECODE_LEVEL(b_code, CONSTANTS) * num.from_bf16_bits(b_scale_bits)[:, None]
            if ROTATE:
                b_sent = rotation.apply_hadamard(b_sent, BLOCK_G, GROUP, LEVELS)
                b_sent = rotation.flip_signs(b_sent, b_key, BLOCK_G, GROUP)
            b_memory = num.saturate(b_base + b_sent if CARRY else b_sent, LIMIT)
            num.store(memory + first + o_value, b_memory, m_value & b_finite[:, None])
        b_word |= b_code << (segment * BITS)
        b_scale_bits = tl.where(b_finite, b_scale_bits, num.NAN_BFLOAT16_BITS)
        tl.store(scales + group + o_group, b_scale_bits.to(tl.int16), m_group)

    for row in tl.static_range(BITS * SEGMENTS // 8):
        _, first, _, o_code, m_code = locate_tile(row, num_rows, (row + 1) * num_rows * GROUP, GROUP, BLOCK_G)
        b_byte = ((b_word >> (8 * row)) & 0xFF).to(tl.uint8)
        tl.store(codes + first + o_code, b_byte, m_code)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def decode_kernel(
    codes, scales, memory, out, num_values, seed_low, seed_high,
    DECODE_LEVEL: tl.constexpr, CONSTANTS: tl.constexpr,
    BITS: tl.constexpr, SEGMENTS: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_G: tl.constexpr, ROTATE: tl.constexpr, UNROLL: tl.constexpr,
    CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    num_values = tl.cast(num_values, tl.int64)
    num_rows = tl.cdiv(tl.cdiv(num_values, GROUP), SEGMENTS)
    o_group = tl.arange(0, BLOCK_G)
    b_word = tl.zeros((BLOCK_G, GROUP), tl.int32)
    for row in tl.static_range(BITS * SEGMENTS // 8):
        _, first, _, o_code, m_code = locate_tile(row, num_rows, (row + 1) * num_rows * GROUP, GROUP, BLOCK_G)
        b_byte = tl.load(codes + first + o_code, m_code, other=0)
        b_word |= b_byte.to(tl.int32) << (8 * row)

    for segment in tl.range(0, SEGMENTS, loop_unroll_factor=UNROLL):
        group, first, m_group, o_value, m_value = locate_tile(segment, num_rows, num_values, GROUP, BLOCK_G)
        b_scale = num.from_bf16_bits(tl.load(scales + group + o_group, m_group, other=0))
        m_finite = (b_scale == b_scale)[:, None]
        b_code = (b_word >> (segment * BITS)) & ((1 << BITS) - 1)
        b_sent = DECODE_LEVEL(b_code, CONSTANTS) * b_scale[:, None]
        if ROTATE:
            b_key = rotation.make_group_keys(group + o_group, seed_low, seed_high)
            b_sent = rotation.apply_hadamard(b_sent, BLOCK_G, GROUP, LEVELS)
            b_sent = rotation.flip_signs(b_sent, b_key, BLOCK_G, GROUP)
        if CARRY:
            b_sent = num.load(memory + first + o_value, m_value) + b_sent
        b_memory = num.round_to_dtype(memory, num.saturate(b_sent, LIMIT))
        num.store_both(memory + first, out + first, o_value, b_memory, m_value, m_finite, HAS_MEMORY)


def choose_launch(family: ModuleType, scheme: Scheme, num_values: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the constants and options that both kernels take."""
    block_groups = TILE // scheme.group_size
    num_rows = triton.cdiv(triton.cdiv(num_values, scheme.group_size), scheme.num_segments)
    constants = {
        "DECODE_LEVEL": family.decode_level,
        "CONSTANTS": scheme.constants,
        "BITS": scheme.bits,
        "SEGMENTS": scheme.num_segments,
        "GROUP": scheme.group_size,
        "LEVELS": scheme.group_size.bit_length() - 1,
        "BLOCK_G": block_groups,
        "ROTATE": scheme.rotates,
        "UNROLL": 1 if scheme.num_segments > MOST_UNROLLED else 2,
        "num_warps": num.choose_num_warps(TILE),
        "enable_fp_fusion": False,
    }
    return (triton.cdiv(num_rows, block_groups),), constants


def encode_(
    family: ModuleType,
    scheme: Scheme,
    value: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    context: Context,
) -> None:
    """As `grouped_reference.encode_`, in one pass on the GPU."""
    grid, constants = choose_launch(family, scheme, value.numel())
    if scheme.rotates and scheme.draws_noise and scheme.group_size == LARGEST_GROUP:
        constants["num_warps"] = num.choose_num_warps(TILE, VALUES_PER_THREAD_OF_LARGEST)
    memory, of_memory = num.make_memory_arguments(value, context)
    encode_kernel[grid](
        value, memory, codes, scales.view(torch.int16), value.numel(), *rotation.split_seed(context.seed),
        **constants, **of_memory, ENCODE_GROUPS=family.encode_groups, STOCHASTIC=scheme.draws_noise,
    )  # fmt: skip


def decode_(
    family: ModuleType,
    scheme: Scheme,
    codes: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    context: Context,
) -> None:
    """As `grouped_reference.decode_`, in one pass on the GPU."""
    grid, constants = choose_launch(family, scheme, out.numel())
    memory, of_memory = num.make_memory_arguments(out, context)
    decode_kernel[grid](
        codes, scales.view(torch.int16), memory, out, out.numel(), *rotation.split_seed(context.seed),
        **constants, **of_memory,
    )  # fmt: skip
