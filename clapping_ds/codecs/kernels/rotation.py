"""Random numbers, rotation and ordered sums of groups, as Triton helpers; `rotation_reference` has
the same in plain torch.

Shapes: [groups, values of a group]. Keys are uint32 [groups].
"""

import triton
import triton.language as tl

from clapping_ds.codecs.reference import rotation_reference

FIRST_FACTOR = tl.constexpr(rotation_reference.FIRST_FACTOR)
SECOND_FACTOR = tl.constexpr(rotation_reference.SECOND_FACTOR)
WORD_STRIDE = tl.constexpr(rotation_reference.WORD_STRIDE)
NOISE_SALT = tl.constexpr(rotation_reference.NOISE_SALT)
LOW_HALF = tl.constexpr(rotation_reference.MASK)
SIGN_BIT = tl.constexpr(0x80000000)
ONE_BITS = tl.constexpr(0x3F800000)


@triton.jit
def mix(b_word):
    """A bijection of uint32 that flips about half of the bits for every bit of its argument."""
    b_word ^= b_word >> 16
    b_word *= FIRST_FACTOR
    b_word ^= b_word >> 15
    b_word *= SECOND_FACTOR
    return b_word ^ (b_word >> 15)


@triton.jit
def make_group_keys(o_group, seed_low, seed_high):
    """A key for each group number (int64) and message; the seed comes as two signed halves."""
    b_low = (o_group & LOW_HALF).to(tl.uint32)
    b_high = (o_group >> 32).to(tl.uint32)
    b_key = mix(b_low + seed_low.to(tl.uint32))
    return mix((b_key ^ seed_high.to(tl.uint32)) + b_high)


@triton.jit
def draw_words(b_key, COUNT: tl.constexpr):
    """uint32 [groups, COUNT] random words."""
    o_word = tl.arange(1, COUNT + 1).to(tl.uint32)
    return mix(b_key[:, None] + (o_word * WORD_STRIDE)[None, :])


@triton.jit
def flip_signs(b_x, b_key, BLOCK_G: tl.constexpr, GROUP: tl.constexpr):
    """`b_x` with the sign of every value changed at random. Its own inverse."""
    WIDTH: tl.constexpr = GROUP if GROUP < 32 else 32
    b_word = draw_words(b_key, GROUP // WIDTH)
    o_bit = (31 - tl.arange(0, WIDTH)).to(tl.uint32)
    b_sign = (b_word[:, :, None] << o_bit[None, None, :]) & SIGN_BIT
    b_bits = b_x.to(tl.uint32, bitcast=True) ^ tl.reshape(b_sign, [BLOCK_G, GROUP])
    return b_bits.to(tl.float32, bitcast=True)


@triton.jit
def draw_noise(b_key, GROUP: tl.constexpr):
    """fp32 [groups, GROUP], uniform in [-1, 0), multiples of 2^-23."""
    b_word = draw_words(mix(b_key ^ NOISE_SALT), GROUP)
    return ((b_word >> 9) | ONE_BITS).to(tl.float32, bitcast=True) - 2.0


@triton.jit
def apply_hadamard(b_x, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr):
    """Each group times the Hadamard matrix: pairs (a, b) at distance 1, 2, 4 ... become (a + b, a - b).

    A value's partner is the integer sum of both bit patterns less its own, and the product with 1 or -1
    is exact: between threads that compiles to one shuffle and one multiply-add.
    """
    b_factor = (1.0 - 2.0 * tl.arange(0, 2))[None, None, :, None]
    for level in tl.static_range(LEVELS):
        b_pair = tl.reshape(b_x, [BLOCK_G, GROUP >> (level + 1), 2, 1 << level])
        b_bits = b_pair.to(tl.int32, bitcast=True)
        b_partner = (tl.sum(b_bits, 2, keep_dims=True) - b_bits).to(tl.float32, bitcast=True)
        b_pair = tl.fma(b_pair, tl.broadcast_to(b_factor, b_pair.shape), b_partner)
        b_x = tl.reshape(b_pair, [BLOCK_G, GROUP])
    return b_x


@triton.jit
def sum_pairwise(b_x, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr):
    """fp32 [groups]: sums of neighbours, then of neighbouring sums, and so on."""
    for level in tl.static_range(LEVELS):
        b_x = tl.sum(tl.reshape(b_x, [BLOCK_G, GROUP >> (level + 1), 2]), 2)
    return tl.reshape(b_x, [BLOCK_G])


def split_seed(seed: int) -> tuple[int, int]:
    """The low and the high 32 bits of a seed as signed numbers, which Triton passes as int32."""
    return _to_signed(seed & rotation_reference.MASK), _to_signed(seed >> 32 & rotation_reference.MASK)


def _to_signed(half: int) -> int:
    return half - ((half >> 31) << 32)
