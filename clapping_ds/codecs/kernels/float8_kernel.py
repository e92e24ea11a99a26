"""8-bit floats for Triton: the twin of `float8_reference`. 23 and 127 are the bits of fp32's mantissa and the
bias of its exponent."""

import triton
import triton.language as tl

from clapping_ds.codecs.kernels import numerics as num

TWO_TO_23_BITS = tl.constexpr(0x4B000000)
SIGN_BIT = tl.constexpr(0x80)
"""Of a code."""


@triton.jit
def encode_groups(
    b_y, b_count, b_noise,
    CONSTANTS: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Codes and scales. CONSTANTS: `float8_reference.Constants`."""
    MANTISSA: tl.constexpr = CONSTANTS.mantissa_bits
    BIAS: tl.constexpr = CONSTANTS.bias
    DROPPED: tl.constexpr = 23 - MANTISSA
    SMALLEST_NORMAL_BITS: tl.constexpr = (128 - BIAS) << 23
    b_scale = tl.max(tl.abs(b_y), 1) * (1.0 / CONSTANTS.largest)
    b_scale = num.from_bf16_bits(num.to_bf16_bits(b_scale))
    b_inverse = tl.where(b_scale > 0, tl.div_rn(1.0, tl.where(b_scale > 0, b_scale, 1.0)), 0.0)
    b_float = num.saturate(b_y * b_inverse[:, None], CONSTANTS.largest)

    b_bits = num.to_magnitude_bits(b_float)
    b_rounded = (b_bits + ((1 << (DROPPED - 1)) - 1) + ((b_bits >> DROPPED) & 1)) >> DROPPED
    b_normal = b_rounded - ((127 - BIAS) << MANTISSA)
    # In units of the smallest subnormal, plus 2^23: an fp32 whose low bits are the rounded integer.
    b_units = tl.abs(b_float) * (1 << (BIAS + MANTISSA - 1)) + num.TWO_TO_23
    b_subnormal = b_units.to(tl.int32, bitcast=True) - TWO_TO_23_BITS
    b_code = tl.where(b_bits < SMALLEST_NORMAL_BITS, b_subnormal, b_normal)
    return b_code | ((b_float.to(tl.int32, bitcast=True) >> 24) & SIGN_BIT), b_scale


@triton.jit
def decode_level(b_code, CONSTANTS: tl.constexpr):
    MANTISSA: tl.constexpr = CONSTANTS.mantissa_bits
    BIAS: tl.constexpr = CONSTANTS.bias
    b_magnitude = b_code & (SIGN_BIT - 1)
    b_normal = ((b_magnitude << (23 - MANTISSA)) + ((127 - BIAS) << 23)).to(tl.float32, bitcast=True)
    b_subnormal = b_magnitude.to(tl.float32) * (1.0 / (1 << (BIAS + MANTISSA - 1)))
    b_level = tl.where(b_magnitude < (1 << MANTISSA), b_subnormal, b_normal)
    return tl.where(b_code >= SIGN_BIT, -b_level, b_level)
