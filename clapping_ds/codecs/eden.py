"""The codecs `eden1` to `eden4`: random rotation, then the Lloyd-Max code of a Gaussian.

A group rotated at random looks like Gaussian noise whatever it was, so one fixed code that is best for
a Gaussian is good for every group. Source: EDEN (Vargaftik et al., ICML 2022, arXiv 2108.08842); the
codes are those of Max (1960), table I, levels rounded to 8 significant bits.

    y = H(s * u)                                    as in `grouped`; s: random signs
    k = number of thresholds below |y| / rms(y)     code: k, plus 2^(b-1) where y is negative
    q = sign(y) * LEVELS[b][k]
    scale = <y, q> / <q, q>      "least_squares": the smallest error of this message
          = <y, y> / <y, q>      "unbiased": the mean over signs is the value itself (EDEN, theorem 2.1)

The signs are new in every message. With fixed signs the same error is made again and again where
values change slowly, and training moves the weights along it: low error is not enough.
"""

from itertools import pairwise
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from clapping_ds.codecs import memory as mem
from clapping_ds.codecs.grouped import Family, GroupedCodec
from clapping_ds.codecs.random_bits import tree_sum
from clapping_ds.codecs.reference import eden as reference

LEVELS = {
    1: (0.796875,),
    2: (0.453125, 1.5078125),
    3: (0.2451171875, 0.7578125, 1.34375, 2.15625),
    4: (0.1279296875, 0.388671875, 0.65625, 0.94140625, 1.2578125, 1.6171875, 2.0625, 2.734375),
}
THRESHOLDS = {
    1: (),
    2: (0.9816,),
    3: (0.5005, 1.05, 1.7479),
    4: (0.2582, 0.5224, 0.7995, 1.0993, 1.4371, 1.8435, 2.4008),
}


@triton.jit
def level(b_code, CONSTANTS: tl.constexpr):
    """Made of shifts and masks: a comparison per value and level would need more predicates than there
    are. `(rank - x) >> 31` has all bits set where x > rank."""
    NUM_RANKS: tl.constexpr = len(CONSTANTS[0])
    b_rank = b_code & (NUM_RANKS - 1)
    b_bits = tl.full(b_code.shape, CONSTANTS[3][0], tl.int32)
    for rank in tl.static_range(1, NUM_RANKS):
        b_bits ^= ((rank - 1 - b_rank) >> 31) & CONSTANTS[3][rank]
    b_bits |= (b_code & NUM_RANKS) * (-2147483648 // NUM_RANKS)
    return b_bits.to(tl.float32, bitcast=True)


@triton.jit
def encoded(
    b_y, b_count, b_noise,
    CONSTANTS: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Codes and scales. CONSTANTS: levels, thresholds, whether the scale is unbiased, `transitions`."""
    NUM_RANKS: tl.constexpr = len(CONSTANTS[0])
    b_square = tree_sum(b_y * b_y, BLOCK_G, GROUP, LEVELS)
    b_root = tl.sqrt_rn(b_square * (1.0 / GROUP))
    b_inverse = tl.where(b_root > 0, tl.div_rn(1.0, tl.where(b_root > 0, b_root, 1.0)), 0.0)
    b_magnitude = tl.abs(b_y * b_inverse[:, None])
    b_code = (b_y.to(tl.int32, bitcast=True) >> 31) & NUM_RANKS
    for rank in tl.static_range(NUM_RANKS - 1):
        b_code -= (CONSTANTS[1][rank] - b_magnitude).to(tl.int32, bitcast=True) >> 31

    b_level = level(b_code, CONSTANTS)
    b_product = tree_sum(b_y * b_level, BLOCK_G, GROUP, LEVELS)
    if CONSTANTS[2]:
        b_scale = tl.div_rn(b_square, tl.where(b_product > 0, b_product, 1.0))
    else:
        b_scale = tl.div_rn(b_product, tree_sum(b_level * b_level, BLOCK_G, GROUP, LEVELS))
    return b_code, mem.from_bf16_bits(mem.bf16_bits(b_scale))


def transitions(levels: tuple[float, ...]) -> tuple[int, ...]:
    """The fp32 bits of the first level, and which bits change from each level to the next."""
    bits = torch.tensor(levels, dtype=torch.float32).view(torch.int32).tolist()
    return (bits[0], *(before ^ after for before, after in pairwise(bits)))


class Eden(GroupedCodec):
    """Random rotation and b-bit Lloyd-Max codes, one bfloat16 scale per group of `group_size` values."""

    name: Literal["eden1", "eden2", "eden3", "eden4"]
    scale: Literal["least_squares", "unbiased"] = "least_squares"
    """Least squares: the smallest error, for error feedback. Unbiased: right on average over messages."""

    @property
    def bits(self) -> int:
        return int(self.name.removeprefix("eden"))

    @property
    def rotates(self) -> bool:
        return True

    @property
    def family(self) -> Family:
        levels = LEVELS[self.bits]
        constants: tuple[Any, ...] = (
            levels,
            THRESHOLDS[self.bits],
            self.scale == "unbiased",
            transitions(levels),
        )
        return Family(reference.LLOYD_MAX, encoded, level, constants)
