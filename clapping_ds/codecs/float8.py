"""The codecs `fp8_e4m3` and `fp8_e5m2`: 8-bit floats (OCP 8-bit floating point specification, 2023).

The largest magnitude of a group is scaled to the largest finite float, 448 or 57344; rounding is to the
nearest, ties to even. Codes are the bits of torch.float8_e4m3fn and torch.float8_e5m2. The conversion
is made of integer arithmetic, so that it is the same on GPUs without 8-bit floats.
"""

from typing import Any, Literal

import triton
import triton.language as tl

from clapping_ds.codecs import memory as mem
from clapping_ds.codecs.grouped import Family, GroupedCodec
from clapping_ds.codecs.reference import float8 as reference


@triton.jit
def encoded(
    b_y, b_count, b_noise,
    CONSTANTS: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Codes and scales. CONSTANTS: bits of the mantissa, bias of the exponent, largest finite float."""
    MANTISSA: tl.constexpr = CONSTANTS[0]
    BIAS: tl.constexpr = CONSTANTS[1]
    DROPPED: tl.constexpr = 23 - MANTISSA
    SMALLEST_NORMAL_BITS: tl.constexpr = (128 - BIAS) << 23
    b_scale = tl.max(tl.abs(b_y), 1) * (1.0 / CONSTANTS[2])
    b_scale = mem.from_bf16_bits(mem.bf16_bits(b_scale))
    b_inverse = tl.where(b_scale > 0, tl.div_rn(1.0, tl.where(b_scale > 0, b_scale, 1.0)), 0.0)
    b_float = mem.saturated(b_y * b_inverse[:, None], CONSTANTS[2])

    b_bits = mem.magnitude_bits(b_float)
    b_rounded = (b_bits + ((1 << (DROPPED - 1)) - 1) + ((b_bits >> DROPPED) & 1)) >> DROPPED
    b_normal = b_rounded - ((127 - BIAS) << MANTISSA)
    # In units of the smallest subnormal, plus 2^23: an fp32 whose low bits are the rounded integer.
    b_units = tl.abs(b_float) * (1 << (BIAS + MANTISSA - 1)) + 8388608.0
    b_subnormal = b_units.to(tl.int32, bitcast=True) - 0x4B000000
    b_code = tl.where(b_bits < SMALLEST_NORMAL_BITS, b_subnormal, b_normal)
    return b_code | ((b_float.to(tl.int32, bitcast=True) >> 24) & 0x80), b_scale


@triton.jit
def level(b_code, CONSTANTS: tl.constexpr):
    MANTISSA: tl.constexpr = CONSTANTS[0]
    BIAS: tl.constexpr = CONSTANTS[1]
    b_magnitude = b_code & 0x7F
    b_normal = ((b_magnitude << (23 - MANTISSA)) + ((127 - BIAS) << 23)).to(tl.float32, bitcast=True)
    b_subnormal = b_magnitude.to(tl.float32) * (1.0 / (1 << (BIAS + MANTISSA - 1)))
    b_level = tl.where(b_magnitude < (1 << MANTISSA), b_subnormal, b_normal)
    return tl.where(b_code >= 0x80, -b_level, b_level)


class Float8(GroupedCodec):
    """8-bit floats with one bfloat16 scale per group of `group_size` values."""

    name: Literal["fp8_e4m3", "fp8_e5m2"]

    @property
    def bits(self) -> int:
        return 8

    @property
    def family(self) -> Family:
        constants: tuple[Any, ...] = (3, 7, 448.0) if self.name == "fp8_e4m3" else (2, 15, 57344.0)
        return Family(reference.FLOAT8, encoded, level, constants)
