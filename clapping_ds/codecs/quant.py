"""The codecs `int8`, `int4`, `int3`, `int2` and `sign`: uniform b-bit codes.

A code c in 0 .. 2^b - 1 stands for the level 2c - (2^b - 1), an odd multiple of the group's half step
h. So all 2^b codes are used, the levels lie symmetrically about zero, and `sign` is the member of the
family with b = 1. Rounding is to the nearest level, or at random to one of the two nearest, so that
the mean over messages is right (`stochastic`):

    c = clamp(floor(y / 2h + noise - 1/2) + 2^(b-1), 0, 2^b - 1)       noise = 1/2, or random in [0, 1)

    h = max|y| / (2^b - 1)      "maximum": int8, int4, and wherever rounding is stochastic
    h = mean|y|                 sign
    h = <y, q> / <q, q>         "least_squares": int3, int2; q: levels of y at the better of two starts,
                                the maximum's h and START * mean|y|

The better start is the one with the larger <y, q>^2 / <q, q>, by which the fitted h lowers the squared
error; so in exact arithmetic the result is never worse than the maximum's.

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
def code_of(b_y, b_half, b_offset, BITS: tl.constexpr):
    """int32: the level's code for y at half step h."""
    b_inverse = tl.where(b_half > 0, tl.div_rn(0.5, tl.where(b_half > 0, b_half, 1.0)), 0.0)
    b_steps = tl.floor(b_y * b_inverse[:, None] + b_offset) + (1 << (BITS - 1))
    return tl.minimum(tl.maximum(b_steps, 0.0), (1 << BITS) - 1).to(tl.int32)


@triton.jit
def fit(
    b_y, m_y, b_half,
    CONSTANTS: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """<y, q> and <q, q> for the levels q of y at `b_half`."""
    b_level = tl.where(m_y, level(code_of(b_y, b_half, 0.0, CONSTANTS[0]), CONSTANTS), 0.0)
    b_square = tree_sum(b_level * b_level, BLOCK_G, GROUP, LEVELS)
    return tree_sum(b_y * b_level, BLOCK_G, GROUP, LEVELS), tl.maximum(b_square, 1.0)


@triton.jit
def encoded(
    b_y, m_y, b_noise,
    CONSTANTS: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Codes and half steps. CONSTANTS: bits, scale, START, whether rounding is stochastic."""
    BITS: tl.constexpr = CONSTANTS[0]
    b_half = tl.max(tl.abs(b_y), 1) * (1.0 / ((1 << BITS) - 1))
    if CONSTANTS[1] != "maximum":
        b_count = tl.maximum(tl.sum(m_y.to(tl.float32), 1), 1.0)
        b_mean = tl.div_rn(tree_sum(tl.abs(b_y), BLOCK_G, GROUP, LEVELS), b_count)
        if CONSTANTS[1] == "mean":
            b_half = b_mean
        else:
            b_yq, b_qq = fit(b_y, m_y, b_half, CONSTANTS, BLOCK_G, GROUP, LEVELS)
            b_yq2, b_qq2 = fit(b_y, m_y, b_mean * CONSTANTS[2], CONSTANTS, BLOCK_G, GROUP, LEVELS)
            b_better = tl.div_rn(b_yq2 * b_yq2, b_qq2) > tl.div_rn(b_yq * b_yq, b_qq)
            b_half = tl.div_rn(tl.where(b_better, b_yq2, b_yq), tl.where(b_better, b_qq2, b_qq))
    if CONSTANTS[3]:
        b_bits = (b_half.to(tl.int32, bitcast=True) + 0xFFFF) >> 16
        b_half = mem.from_bf16_bits(b_bits)
        b_code = code_of(b_y, b_half, b_noise - 0.5, BITS)
    else:
        b_half = mem.from_bf16_bits(mem.bf16_bits(b_half))
        b_code = code_of(b_y, b_half, 0.0, BITS)
    return b_code, b_half


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
