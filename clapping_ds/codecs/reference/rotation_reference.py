"""Random numbers, rotation and ordered sums of groups, in plain torch.

Random numbers are a function of (64-bit seed, number of the group, position), so both ends of a link
draw the same ones and nothing crosses the wire. The 32-bit hash is two rounds of multiply and
xor-shift (Wellons and Ettinger's search for low bias; constants below 2^31, so that torch can multiply
in int64). uint32 numbers are held in int64.

`apply_hadamard` is unnormalised: applied twice it multiplies by the size of the group. All its additions,
and those of `sum_pairwise`, have a fixed order, so that every implementation gives the same bits.
"""

import torch

MASK = 0xFFFFFFFF
FIRST_FACTOR = 0x21F0AAAD
SECOND_FACTOR = 0x735A2D97
WORD_STRIDE = 0x61C88647
NOISE_SALT = 0x2545F491


def mix(word: torch.Tensor) -> torch.Tensor:
    word = word ^ (word >> 16)
    word = (word * FIRST_FACTOR) & MASK
    word = word ^ (word >> 15)
    word = (word * SECOND_FACTOR) & MASK
    return word ^ (word >> 15)


def make_group_keys(group_G: torch.Tensor, seed: int) -> torch.Tensor:
    """A key for each group number (int64) and message."""
    low, high = seed & MASK, (seed >> 32) & MASK
    key_G = mix(((group_G & MASK) + low) & MASK)
    return mix(((key_G ^ high) + (group_G >> 32)) & MASK)


def draw_words(key_G: torch.Tensor, count: int) -> torch.Tensor:
    """[G, count] random words."""
    word_W = torch.arange(1, count + 1, device=key_G.device) * WORD_STRIDE
    return mix((key_G[:, None] + word_W) & MASK)


def flip_signs(x_GS: torch.Tensor, key_G: torch.Tensor) -> torch.Tensor:
    """`x_GS` with the sign of every value changed at random. Its own inverse."""
    width = min(32, x_GS.shape[1])
    word_GW = draw_words(key_G, x_GS.shape[1] // width)
    bit_GWB = (word_GW[:, :, None] >> torch.arange(width, device=x_GS.device)) & 1
    return torch.where(bit_GWB.view(x_GS.shape) == 1, -x_GS, x_GS)


def draw_noise(key_G: torch.Tensor, size: int) -> torch.Tensor:
    """fp32 [G, size], uniform in [-1, 0), multiples of 2^-23."""
    return (draw_words(mix(key_G ^ NOISE_SALT), size) >> 9).float() * 2.0**-23 - 1.0


def apply_hadamard(x_GS: torch.Tensor) -> torch.Tensor:
    """Each group times the unnormalised Hadamard matrix."""
    num_groups, size = x_GS.shape
    distance = 1
    while distance < size:
        pair = x_GS.view(num_groups, size // (2 * distance), 2, distance)
        a, b = pair[:, :, 0], pair[:, :, 1]
        x_GS = torch.stack([a + b, a - b], 2).view(num_groups, size)
        distance *= 2
    return x_GS


def sum_pairwise(x_GS: torch.Tensor) -> torch.Tensor:
    """fp32 [G]: sums of neighbours, then of neighbouring sums, and so on."""
    while x_GS.shape[1] > 1:
        x_GS = x_GS[:, 0::2] + x_GS[:, 1::2]
    return x_GS[:, 0]
