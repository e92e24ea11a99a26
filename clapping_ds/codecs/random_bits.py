"""Random numbers, rotation and ordered sums of groups, as Triton helpers; `reference.random_bits` has
the same in plain torch.

Random numbers are a function of (64-bit seed, number of the group, position), so both ends of a link
draw the same ones and nothing crosses the wire. The 32-bit hash is two rounds of multiply and
xor-shift (Wellons and Ettinger's search for low bias; constants below 2^31, so that torch can multiply
in int64).

`hadamard` is unnormalised: applied twice it multiplies by the size of the group. All its additions,
and those of `tree_sum`, have a fixed order, so that every implementation gives the same bits.

Shapes: [groups, values of a group]. Keys are uint32 [groups].
"""

import triton
import triton.language as tl


@triton.jit
def mixed(b_word):
    """A bijection of uint32 that flips about half of the bits for every bit of its argument."""
    b_word ^= b_word >> 16
    b_word *= 0x21F0AAAD
    b_word ^= b_word >> 15
    b_word *= 0x735A2D97
    return b_word ^ (b_word >> 15)


@triton.jit
def group_keys(o_group, seed_low, seed_high):
    """A key for each group number (int64) and message; the seed comes as two signed halves."""
    b_low = (o_group & 0xFFFFFFFF).to(tl.uint32)
    b_high = (o_group >> 32).to(tl.uint32)
    b_key = mixed(b_low + seed_low.to(tl.uint32))
    return mixed((b_key ^ seed_high.to(tl.uint32)) + b_high)


@triton.jit
def words(b_key, COUNT: tl.constexpr):
    """uint32 [groups, COUNT] random words."""
    o_word = tl.arange(1, COUNT + 1).to(tl.uint32)
    return mixed(b_key[:, None] + (o_word * 0x61C88647)[None, :])


@triton.jit
def with_signs(b_x, b_key, BLOCK_G: tl.constexpr, GROUP: tl.constexpr):
    """`b_x` with the sign of every value changed at random. Its own inverse."""
    WIDTH: tl.constexpr = GROUP if GROUP < 32 else 32
    b_word = words(b_key, GROUP // WIDTH)
    o_bit = (31 - tl.arange(0, WIDTH)).to(tl.uint32)
    b_sign = (b_word[:, :, None] << o_bit[None, None, :]) & 0x80000000
    b_bits = b_x.to(tl.uint32, bitcast=True) ^ tl.reshape(b_sign, [BLOCK_G, GROUP])
    return b_bits.to(tl.float32, bitcast=True)


@triton.jit
def noise(b_key, GROUP: tl.constexpr):
    """fp32 [groups, GROUP], uniform in [-1, 0), multiples of 2^-23."""
    b_word = words(mixed(b_key ^ 0x2545F491), GROUP)
    return ((b_word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 2.0


@triton.jit
def hadamard(b_x, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr):
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
def tree_sum(b_x, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr):
    """fp32 [groups]: sums of neighbours, then of neighbouring sums, and so on."""
    for level in tl.static_range(LEVELS):
        b_x = tl.sum(tl.reshape(b_x, [BLOCK_G, GROUP >> (level + 1), 2]), 2)
    return tl.reshape(b_x, [BLOCK_G])


def halves(seed: int) -> tuple[int, int]:
    """The low and the high 32 bits of a seed as signed numbers, which Triton passes as int32."""
    return _signed(seed & 0xFFFFFFFF), _signed(seed >> 32 & 0xFFFFFFFF)


def _signed(half: int) -> int:
    return half - ((half >> 31) << 32)
