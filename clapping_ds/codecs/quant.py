"""The codecs `int8`, `int4`, `int3`, `int2` and `sign`: uniform b-bit codes.

A code c in 0 .. 2^b - 1 stands for the level q = 2c - (2^b - 1), an odd multiple of the group's half
step h. So all 2^b codes are used, the levels lie symmetrically about zero, and `sign` is the member of
the family with b = 1. Rounding is to the nearest level, or at random to one of the two nearest, so that
the mean over messages is right (`stochastic`):

    q = clamp(2 * round(y / 2h + offset) + 1, -(2^b - 1), 2^b - 1)     offset = -1/2, or random in [-1, 0)

    h = max|y| / (2^b - 1)      "maximum": int8, int4, and wherever rounding is stochastic
    h = mean|y|                 sign
    h = <y, q0> / <q0, q0>      "least_squares": int3, int2; q0: levels of y at the lesser of
                                START * mean|y| and the maximum's h

h is rounded to bfloat16, upwards where rounding is stochastic, so that no value is clamped. Rounding
of x = fp32(v - m) with "maximum": |x - D(x)| <= h * (1 + 2^-7), stochastic 2h; `grouped` has the rest.
"""

from typing import Any, Literal, Self

import triton
import triton.language as tl
from pydantic import model_validator

from clapping_ds.codecs import memory as mem
from clapping_ds.codecs.grouped import Family, GroupedCodec
from clapping_ds.codecs.random_bits import tree_sum
from clapping_ds.codecs.reference import quant as reference

START = {3: 0.363, 2: 0.627}
"""Half step over mean magnitude that the least-squares fit starts from: the best for a Gaussian."""


@triton.jit
def level(b_code, CONSTANTS: tl.constexpr):
    return (2 * b_code - ((1 << CONSTANTS[0]) - 1)).to(tl.float32)


@triton.jit
def levels(b_y, b_half, b_offset, TOP: tl.constexpr):
    """fp32: odd multiples of `b_half` near y, the nearest ones where the offset is -1/2."""
    b_inverse = tl.where(b_half > 0, tl.div_rn(0.5, tl.where(b_half > 0, b_half, 1.0)), 0.0)
    b_level = 2.0 * mem.nearest(b_y * b_inverse[:, None] + b_offset) + 1.0
    return mem.saturated(b_level, TOP)


@triton.jit
def encoded(
    b_y, b_count, b_noise,
    CONSTANTS: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Codes and half steps. CONSTANTS: bits, scale, START, whether rounding is stochastic."""
    TOP: tl.constexpr = (1 << CONSTANTS[0]) - 1
    b_largest = tl.max(tl.abs(b_y), 1) * (1.0 / TOP)
    if CONSTANTS[1] == "maximum":
        b_half = b_largest
    else:
        b_half = tl.div_rn(tree_sum(tl.abs(b_y), BLOCK_G, GROUP, LEVELS), b_count)
        if CONSTANTS[1] == "least_squares":
            b_level = levels(b_y, tl.minimum(b_half * CONSTANTS[2], b_largest), -0.5, TOP)
            # Padding has levels of 1 or -1.
            b_square = tree_sum(b_level * b_level, BLOCK_G, GROUP, LEVELS) - (GROUP - b_count)
            b_half = tl.div_rn(tree_sum(b_y * b_level, BLOCK_G, GROUP, LEVELS), b_square)
    if CONSTANTS[3]:
        b_half_bits = (b_half.to(tl.int32, bitcast=True) + 0xFFFF) >> 16
        b_offset = b_noise
    else:
        b_half_bits = mem.bf16_bits(b_half)
        b_offset = -0.5
    b_half = mem.from_bf16_bits(b_half_bits)
    b_level = levels(b_y, b_half, b_offset, TOP)
    return mem.as_integer((b_level + TOP) * 0.5), b_half


class Quantizer(GroupedCodec):
    """Uniform b-bit codes with one bfloat16 half step per group of `group_size` values."""

    name: Literal["int8", "int4", "int3", "int2", "sign"]
    rotate: bool = False
    """Whether groups are rotated at random first (Hadamard matrix, signs fresh per message), so that
    an outlier is spread over its group. Source: TAH-Quant, arXiv 2506.01352; signs as EDEN's."""
    stochastic: bool = False
    """Whether rounding is random and unbiased."""
    scale: Literal["maximum", "least_squares"] | None = None
    """How the half step is chosen. Default: least squares for int3 and int2, maximum for the others and
    where rounding is stochastic. `sign` always takes the mean."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.name == "sign":
            for field in ("rotate", "stochastic", "scale"):
                if getattr(self, field):
                    raise ValueError(f"{field} = {getattr(self, field)!r} with sign; accepted: int8 to int2")
        if self.scale == "least_squares" and (self.stochastic or self.bits not in START):
            raise ValueError(
                "scale = 'least_squares' is for int3 and int2 without stochastic rounding, which must not "
                "clamp; accepted: 'maximum'"
            )
        return self

    @property
    def bits(self) -> int:
        return 1 if self.name == "sign" else int(self.name.removeprefix("int"))

    @property
    def rotates(self) -> bool:
        return self.rotate

    @property
    def draws_noise(self) -> bool:
        return self.stochastic

    @property
    def family(self) -> Family:
        if self.name == "sign":
            scale = "mean"
        elif self.scale is not None:
            scale = self.scale
        else:
            scale = "least_squares" if self.bits in START and not self.stochastic else "maximum"
        constants: tuple[Any, ...] = (self.bits, scale, START.get(self.bits, 0.0), self.stochastic)
        return Family(reference.UNIFORM, encoded, level, constants)
