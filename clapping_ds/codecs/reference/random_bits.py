"""Random numbers, rotation and ordered sums of groups: `clapping_ds.codecs.random_bits` in plain torch.

uint32 numbers are held in int64.
"""

import torch

MASK = 0xFFFFFFFF


def mixed(word: torch.Tensor) -> torch.Tensor:
    word = word ^ (word >> 16)
    word = (word * 0x21F0AAAD) & MASK
    word = word ^ (word >> 15)
    word = (word * 0x735A2D97) & MASK
    return word ^ (word >> 15)


def group_keys(group_G: torch.Tensor, seed: int) -> torch.Tensor:
    """A key for each group number (int64) and message."""
    low, high = seed & MASK, (seed >> 32) & MASK
    key_G = mixed(((group_G & MASK) + low) & MASK)
    return mixed(((key_G ^ high) + (group_G >> 32)) & MASK)


def words(key_G: torch.Tensor, count: int) -> torch.Tensor:
    """[G, count] random words."""
    word_W = torch.arange(1, count + 1, device=key_G.device) * 0x61C88647
    return mixed((key_G[:, None] + word_W) & MASK)


def with_signs(x_GS: torch.Tensor, key_G: torch.Tensor) -> torch.Tensor:
    """`x_GS` with the sign of every value changed at random. Its own inverse."""
    width = min(32, x_GS.shape[1])
    word_GW = words(key_G, x_GS.shape[1] // width)
    bit_GWB = (word_GW[:, :, None] >> torch.arange(width, device=x_GS.device)) & 1
    return torch.where(bit_GWB.view(x_GS.shape) == 1, -x_GS, x_GS)


def noise(key_G: torch.Tensor, size: int) -> torch.Tensor:
    """fp32 [G, size], uniform in [-1, 0), multiples of 2^-23."""
    return (words(mixed(key_G ^ 0x2545F491), size) >> 9).float() * 2.0**-23 - 1.0


def hadamard(x_GS: torch.Tensor) -> torch.Tensor:
    """Each group times the unnormalised Hadamard matrix."""
    num_groups, size = x_GS.shape
    distance = 1
    while distance < size:
        pair = x_GS.view(num_groups, size // (2 * distance), 2, distance)
        a, b = pair[:, :, 0], pair[:, :, 1]
        x_GS = torch.stack([a + b, a - b], 2).view(num_groups, size)
        distance *= 2
    return x_GS


def tree_sum(x_GS: torch.Tensor) -> torch.Tensor:
    """fp32 [G]: sums of neighbours, then of neighbouring sums, and so on."""
    while x_GS.shape[1] > 1:
        x_GS = x_GS[:, 0::2] + x_GS[:, 1::2]
    return x_GS[:, 0]
