"""Uniform codes for Triton: the twin of `quant_reference`."""

import triton
import triton.language as tl

from clapping_ds.codecs.kernels import numerics as num
from clapping_ds.codecs.kernels.rotation import sum_pairwise


@triton.jit
def decode_level(b_code, CONSTANTS: tl.constexpr):
    return (2 * b_code - ((1 << CONSTANTS.bits) - 1)).to(tl.float32)


@triton.jit
def round_to_levels(b_y, b_half, b_offset, TOP: tl.constexpr):
    """fp32: odd multiples of `b_half` near y, the nearest ones where the offset is -1/2."""
    b_inverse = tl.where(b_half > 0, tl.div_rn(0.5, tl.where(b_half > 0, b_half, 1.0)), 0.0)
    b_level = 2.0 * num.round_to_nearest(b_y * b_inverse[:, None] + b_offset) + 1.0
    return num.saturate(b_level, TOP)


@triton.jit
def encode_groups(
    b_y, b_count, b_noise,
    CONSTANTS: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Codes and half steps. CONSTANTS: `quant_reference.Constants`."""
    TOP: tl.constexpr = (1 << CONSTANTS.bits) - 1
    b_largest = tl.max(tl.abs(b_y), 1) * (1.0 / TOP)
    if CONSTANTS.scale == "maximum":
        b_half = b_largest
    else:
        b_half = tl.div_rn(sum_pairwise(tl.abs(b_y), BLOCK_G, GROUP, LEVELS), b_count)
        if CONSTANTS.scale == "least_squares":
            b_level = round_to_levels(b_y, tl.minimum(b_half * CONSTANTS.start, b_largest), -0.5, TOP)
            # Padding has levels of 1 or -1.
            b_square = sum_pairwise(b_level * b_level, BLOCK_G, GROUP, LEVELS) - (GROUP - b_count)
            b_half = tl.div_rn(sum_pairwise(b_y * b_level, BLOCK_G, GROUP, LEVELS), b_square)
    if CONSTANTS.is_stochastic:
        b_half_bits = (b_half.to(tl.int32, bitcast=True) + num.LOW_HALF) >> 16
        b_offset = b_noise
    else:
        b_half_bits = num.to_bf16_bits(b_half)
        b_offset = -0.5
    b_half = num.from_bf16_bits(b_half_bits)
    b_level = round_to_levels(b_y, b_half, b_offset, TOP)
    return num.to_integer((b_level + TOP) * 0.5), b_half
