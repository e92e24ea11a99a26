"""Codes of `clapping_ds.codecs.transform` for Triton: the twin of `transform_reference`.

A tile is all blocks of a few rows, or LARGEST_BLOCKS of one: coordinates are gathered from, and scattered to,
places that only their order says, 4 bytes at a time, and a whole row at once lets the caches make whole
sectors of them.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from clapping_ds.codecs.base import Context, ceil_div
from clapping_ds.codecs.kernels import numerics as num
from clapping_ds.codecs.kernels import rotation
from clapping_ds.codecs.reference import transform_reference as reference
from clapping_ds.codecs.reference.transform_reference import LEVEL_UNIT, LEVELS, Arrived, Coding, invert

LARGEST_BLOCKS = 256
"""Of a tile."""
TILE = LARGEST_BLOCKS * reference.BLOCK
"""Values per program."""
BLOCK_N, BLOCK_D = 16, 128
"""Rows and channels, where rows are put where they belong."""
TILE_OF_PRODUCT = 2048
ROWS_OF_PRODUCT = 32
"""Rows of a plane are padded to a multiple: cuBLAS takes no fewer than 17, and wants multiples of 8."""

BLOCK = tl.constexpr(reference.BLOCK)
HADAMARD_LEVELS = tl.constexpr(reference.BLOCK.bit_length() - 1)
MOST_BITS = tl.constexpr(reference.MOST_BITS)
MOST_LEVELS = tl.constexpr(1 << (reference.MOST_BITS - 1))
"""Magnitudes of a code."""
STEPS_PER_UNIT = tl.constexpr(2.0 / LEVEL_UNIT)
"""A threshold is half a sum of two levels, so it is a whole number of steps."""
NUM_STEPS = tl.constexpr(2048)
"""All thresholds are below."""
LAST_STEP = tl.constexpr(2047.0)


@triton.jit
def locate_tile(num_rows, num_blocks, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """This program's groups, a block of a row each: row (int64), block, and whether they exist."""
    o_group = tl.arange(0, ROWS * BLOCKS)
    num_chunks = tl.cdiv(num_blocks, BLOCKS)
    o_row = (tl.program_id(0) // num_chunks).to(tl.int64) * ROWS + o_group // BLOCKS
    o_block = (tl.program_id(0) % num_chunks) * BLOCKS + o_group % BLOCKS
    return o_row, o_block, (o_row < num_rows) & (o_block < num_blocks)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def write_codes_kernel(
    z, order, inverses, bits, ends, magnitudes, codes,
    num_rows, num_blocks, num_words, seed_low, seed_high, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """order, inverses: of coordinates in that order. magnitudes: by bits and steps."""
    o_row, o_block, m_group = locate_tile(num_rows, num_blocks, ROWS, BLOCKS)
    o_bit = tl.arange(0, BLOCK)
    o_coordinate = o_block[:, None] * BLOCK + o_bit[None, :]
    m_value = m_group[:, None]
    b_channel = tl.load(order + o_coordinate, m_value, other=0)
    b_z = tl.load(z + o_row[:, None] * (num_blocks * BLOCK) + b_channel, m_value, other=0.0)
    b_y = b_z * tl.load(inverses + o_coordinate, m_value, other=0.0)

    b_key = rotation.make_group_keys(o_row * num_blocks + o_block, seed_low, seed_high)
    b_y = rotation.flip_signs(b_y, b_key, ROWS * BLOCKS, BLOCK)
    b_y = rotation.apply_hadamard(b_y, ROWS * BLOCKS, BLOCK, HADAMARD_LEVELS) * 0.25

    b_bits = tl.load(bits + o_block, m_group, other=0).to(tl.int32)
    b_step = tl.ceil(tl.minimum(tl.abs(b_y) * STEPS_PER_UNIT, LAST_STEP)).to(tl.int32)
    b_code = tl.load(magnitudes + b_bits[:, None] * NUM_STEPS + b_step).to(tl.int32)
    b_sign = (b_y.to(tl.int32, bitcast=True) >> 31) & 1
    b_code |= b_sign << tl.maximum(b_bits - 1, 0)[:, None]

    o_word = o_row * num_words + tl.load(ends + o_block, m_group, other=0) - b_bits
    most_bits = tl.max(b_bits, 0)
    for plane in tl.static_range(MOST_BITS):
        if plane < most_bits:
            b_word = tl.sum(((b_code >> plane) & 1) << o_bit[None, :], 1)
            tl.store(codes + o_word + plane, b_word.to(tl.int16), m_group & (plane < b_bits))


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def read_codes_kernel(
    codes, order, means, deviations, scales, bits, ends, levels, out,
    num_rows, num_blocks, num_words, seed_low, seed_high, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """order, means, deviations: of coordinates in that order. scales: of rows. levels: by bits and
    magnitude."""
    o_row, o_block, m_group = locate_tile(num_rows, num_blocks, ROWS, BLOCKS)
    o_bit = tl.arange(0, BLOCK)
    b_bits = tl.load(bits + o_block, m_group, other=0).to(tl.int32)
    o_word = o_row * num_words + tl.load(ends + o_block, m_group, other=0) - b_bits
    most_bits = tl.max(b_bits, 0)
    b_code = tl.zeros((ROWS * BLOCKS, BLOCK), tl.int32)
    for plane in tl.static_range(MOST_BITS):
        if plane < most_bits:
            b_word = tl.load(codes + o_word + plane, m_group & (plane < b_bits), other=0).to(tl.int32)
            b_code |= ((b_word[:, None] >> o_bit[None, :]) & 1) << plane

    b_sign_place = tl.maximum(b_bits - 1, 0)[:, None]
    b_sign = b_code >> b_sign_place
    b_magnitude = b_code - (b_sign << b_sign_place)
    b_level = tl.load(levels + b_bits[:, None] * MOST_LEVELS + b_magnitude)
    b_w = (b_level.to(tl.int32, bitcast=True) ^ (b_sign << 31)).to(tl.float32, bitcast=True)
    b_w = rotation.apply_hadamard(b_w, ROWS * BLOCKS, BLOCK, HADAMARD_LEVELS) * 0.25
    b_key = rotation.make_group_keys(o_row * num_blocks + o_block, seed_low, seed_high)
    b_w = rotation.flip_signs(b_w, b_key, ROWS * BLOCKS, BLOCK)

    o_coordinate = o_block[:, None] * BLOCK + o_bit[None, :]
    m_value = m_group[:, None]
    b_channel = tl.load(order + o_coordinate, m_value, other=0)
    b_mean = tl.load(means + o_coordinate, m_value, other=0.0)
    b_deviation = tl.load(deviations + o_coordinate, m_value, other=0.0)
    o_out = o_row[:, None] * (num_blocks * BLOCK) + b_channel
    b_scale = tl.load(scales + o_row, m_group, other=0.0)[:, None]
    tl.store(out + o_out, b_mean + (b_scale * b_deviation) * b_w, m_value)


@triton.jit
def apply_kernel(
    coded, gains, outliers, order, finite, memory, out,
    num_rows, num_coded, num_channels, size, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CARRY: tl.constexpr, HAS_MEMORY: tl.constexpr, HAS_OUT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """size: of a row of `coded`."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_channel = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_row, m_channel = o_row < num_rows, o_channel < num_channels
    m_value = m_row[:, None] & m_channel[None, :]
    m_coded = (o_row < num_coded)[:, None]
    b_gain = num.load(gains + o_row, o_row < num_coded)[:, None]
    b_coded = num.load(coded + o_row[:, None] * size + o_channel[None, :], m_value & m_coded)
    o_outlier = (o_row - num_coded)[:, None] * num_channels + o_channel[None, :]
    b_outlier = num.load(outliers + o_outlier, m_value & (o_row >= num_coded)[:, None])
    m_finite = tl.load(finite + o_row, m_row, other=0)[:, None] != 0
    b_sent = tl.where(m_finite, tl.where(m_coded, b_coded * b_gain, b_outlier), 0.0)
    o_value = tl.load(order + o_row, m_row, other=0)[:, None] * num_channels + o_channel[None, :]
    b_base = num.load(memory + o_value, m_value) if CARRY else tl.zeros_like(b_sent)
    b_memory = num.round_to_dtype(memory, num.update(b_base, b_sent, LIMIT))
    if HAS_OUT:
        num.store_both(memory, out, o_value, b_memory, m_value, m_finite, HAS_MEMORY)
    else:
        num.store(memory + o_value, b_memory, m_value & m_finite, EXACT=True)


@triton.jit
def split_kernel(integers, planes, num_values, num_padded, TILE: tl.constexpr):
    """q = 65536 high + 256 middle + low, each within int8; zeros from `num_values` on."""
    o_value = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    b_integer = tl.load(integers + o_value, o_value < num_values, other=0.0).to(tl.int32)
    b_middle = (b_integer + 128) >> 8
    b_high = (b_middle + 128) >> 8
    m_value = o_value < num_padded
    num_padded = tl.cast(num_padded, tl.int64)
    tl.store(planes + o_value, b_high.to(tl.int8), m_value)
    tl.store(planes + num_padded + o_value, (b_middle - (b_high << 8)).to(tl.int8), m_value)
    tl.store(planes + 2 * num_padded + o_value, (b_integer - (b_middle << 8)).to(tl.int8), m_value)


@triton.jit
def join_kernel(products, out, num_values, num_padded, TILE: tl.constexpr):
    """65536 high + 256 middle + low, exact, rounded once."""
    o_value = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m_value = o_value < num_values
    b_high = tl.load(products + o_value, m_value, other=0).to(tl.int64)
    num_padded = tl.cast(num_padded, tl.int64)
    b_middle = tl.load(products + num_padded + o_value, m_value, other=0).to(tl.int64)
    b_low = tl.load(products + 2 * num_padded + o_value, m_value, other=0).to(tl.int64)
    tl.store(out + o_value, ((b_high * 256 + b_middle) * 256 + b_low).to(tl.float32), m_value)


def choose_launch(num_rows: int, num_blocks: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the constants and options that both kernels take."""
    blocks = min(triton.next_power_of_2(num_blocks), LARGEST_BLOCKS)
    rows = LARGEST_BLOCKS // blocks
    options = {"num_warps": num.choose_num_warps(TILE), "enable_fp_fusion": False}
    grid = (ceil_div(num_rows, rows) * ceil_div(num_blocks, blocks),)
    return grid, {"ROWS": rows, "BLOCKS": blocks, **options}


def write_codes_(z_MC: torch.Tensor, coding: Coding, seed: int, code_MW: torch.Tensor) -> None:
    """As `transform_reference.write_codes_`, in one pass on the GPU."""
    if not code_MW.numel():
        return
    sizes = len(z_MC), len(coding.bits)
    grid, constants = choose_launch(*sizes)
    write_codes_kernel[grid](
        z_MC, coding.order.to(torch.int32), invert(coding.deviations)[coding.order], coding.bits, coding.ends,
        _magnitudes(z_MC.device), code_MW, *sizes, code_MW.shape[1], *rotation.split_seed(seed), **constants,
    )  # fmt: skip


def read_codes(code_MW: torch.Tensor, coding: Coding, scale_M: torch.Tensor, seed: int) -> torch.Tensor:
    """As `transform_reference.read_codes`, in one pass on the GPU."""
    out_MC = coding.means.new_empty(len(code_MW), len(coding.order))
    if not out_MC.numel():
        return out_MC
    sizes = len(code_MW), len(coding.bits)
    grid, constants = choose_launch(*sizes)
    read_codes_kernel[grid](
        code_MW, coding.order.to(torch.int32), coding.means[coding.order], coding.deviations[coding.order],
        scale_M, coding.bits, coding.ends, _levels(code_MW.device), out_MC, *sizes, code_MW.shape[1],
        *rotation.split_seed(seed), **constants,
    )  # fmt: skip
    return out_MC


def multiply(integer_MC: torch.Tensor, basis_CC: torch.Tensor) -> torch.Tensor:
    """As `transform_reference.multiply`: one product of int8 matrices, three planes as one, between a
    pass to split and one to join. Its int32 sums are at most 2^14 C in magnitude."""
    out_MC = torch.empty_like(integer_MC)
    if not out_MC.numel():
        return out_MC
    num_rows, size = integer_MC.shape
    num_padded = ceil_div(num_rows, ROWS_OF_PRODUCT) * ROWS_OF_PRODUCT * size
    plane_PC = torch.empty(3 * num_padded // size, size, dtype=torch.int8, device=integer_MC.device)
    sizes = num_rows * size, num_padded
    grid = (ceil_div(num_padded, TILE_OF_PRODUCT),)
    options = {"num_warps": num.choose_num_warps(TILE_OF_PRODUCT), "enable_fp_fusion": False}
    constants = {"TILE": TILE_OF_PRODUCT, **options}
    split_kernel[grid](integer_MC, plane_PC, *sizes, **constants)
    join_kernel[grid](torch._int_mm(plane_PC, basis_CC), out_MC, *sizes, **constants)
    return out_MC


def apply_(arrived: Arrived, like: torch.Tensor, out: torch.Tensor | None, context: Context) -> None:
    """As `transform_reference.apply_`, in one pass on the GPU."""
    num_rows, num_channels = len(arrived.order), arrived.outliers.shape[1]
    memory, of_memory = num.make_memory_arguments(like, context)
    apply_kernel[(triton.cdiv(num_rows, BLOCK_N), triton.cdiv(num_channels, BLOCK_D))](
        arrived.coded, arrived.gains, arrived.outliers, arrived.order.to(torch.int32),
        arrived.finite.view(torch.uint8), memory, like if out is None else out,
        num_rows, len(arrived.gains), num_channels, arrived.coded.shape[1], BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D,
        num_warps=num.choose_num_warps(BLOCK_N * BLOCK_D), enable_fp_fusion=False,
        **of_memory, HAS_OUT=out is not None,
    )  # fmt: skip


@cache
def _magnitudes(device: torch.device) -> torch.Tensor:
    """int8 [9, NUM_STEPS]: by bits and steps, how many thresholds are below."""
    step_S = torch.arange(NUM_STEPS.value, dtype=torch.float32) / STEPS_PER_UNIT.value
    table = torch.zeros(MOST_BITS.value + 1, NUM_STEPS.value, dtype=torch.int8)
    for bits, levels in LEVELS.items():
        level_L = torch.tensor(levels, dtype=torch.float32) * LEVEL_UNIT
        table[bits] = torch.bucketize(step_S, (level_L[1:] + level_L[:-1]) / 2)
    return table.to(device)


@cache
def _levels(device: torch.device) -> torch.Tensor:
    """fp32 [9, MOST_LEVELS]: by bits and magnitude."""
    table = torch.zeros(MOST_BITS.value + 1, MOST_LEVELS.value, dtype=torch.float32)
    for bits, levels in LEVELS.items():
        table[bits, : len(levels)] = torch.tensor(levels, dtype=torch.float32) * LEVEL_UNIT
    return table.to(device)
