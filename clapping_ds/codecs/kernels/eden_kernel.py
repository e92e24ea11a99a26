"""Lloyd-Max codes for Triton: the twin of `eden_reference`."""

import triton
import triton.language as tl

from clapping_ds.codecs.kernels import numerics as num
from clapping_ds.codecs.kernels.rotation import sum_pairwise

SIGN_BIT = tl.constexpr(-(1 << 31))
"""Of an int32."""


@triton.jit
def decode_level(b_code, CONSTANTS: tl.constexpr):
    """Made of shifts and masks: a comparison per value and level would need more predicates than there
    are. `(rank - x) >> 31` has all bits set where x > rank."""
    NUM_RANKS: tl.constexpr = len(CONSTANTS.levels)
    b_rank = b_code & (NUM_RANKS - 1)
    b_bits = tl.full(b_code.shape, CONSTANTS.transitions[0], tl.int32)
    for rank in tl.static_range(1, NUM_RANKS):
        b_bits ^= ((rank - 1 - b_rank) >> 31) & CONSTANTS.transitions[rank]
    b_bits |= (b_code & NUM_RANKS) * (SIGN_BIT // NUM_RANKS)
    return b_bits.to(tl.float32, bitcast=True)


@triton.jit
def encode_groups(
    b_y, b_count, b_noise,
    CONSTANTS: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Codes and scales. CONSTANTS: `eden_reference.Constants`."""
    NUM_RANKS: tl.constexpr = len(CONSTANTS.levels)
    b_square = sum_pairwise(b_y * b_y, BLOCK_G, GROUP, LEVELS)
    b_root = tl.sqrt_rn(b_square * (1.0 / GROUP))
    b_inverse = tl.where(b_root > 0, tl.div_rn(1.0, tl.where(b_root > 0, b_root, 1.0)), 0.0)
    b_magnitude = tl.abs(b_y * b_inverse[:, None])
    b_code = (b_y.to(tl.int32, bitcast=True) >> 31) & NUM_RANKS
    for rank in tl.static_range(NUM_RANKS - 1):
        b_code -= (CONSTANTS.thresholds[rank] - b_magnitude).to(tl.int32, bitcast=True) >> 31

    b_level = decode_level(b_code, CONSTANTS)
    b_product = sum_pairwise(b_y * b_level, BLOCK_G, GROUP, LEVELS)
    if CONSTANTS.is_unbiased:
        b_scale = tl.div_rn(b_square, tl.where(b_product > 0, b_product, 1.0))
    else:
        b_scale = tl.div_rn(b_product, sum_pairwise(b_level * b_level, BLOCK_G, GROUP, LEVELS))
    return b_code, num.from_bf16_bits(num.to_bf16_bits(b_scale))
