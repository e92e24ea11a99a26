"""Codes of `clapping_ds.codecs.transform` in plain torch."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from clapping_ds.codecs.base import Context, limit
from clapping_ds.codecs.reference import rotation_reference as rotation
from clapping_ds.codecs.reference.numerics_reference import deliver_, keep_, load_base_like, update

BLOCK = 16
MOST_BITS = 8
LARGEST = 2.0**112
LEVEL_UNIT = 2.0**-8
LEVELS = {
    1: (204,),
    2: (116, 387),
    3: (63, 194, 344, 551),
    4: (33, 99, 168, 241, 322, 414, 530, 700),
    5: (17, 51, 85, 119, 155, 191, 229, 268, 310, 355, 404, 458, 519, 593, 689, 835),
    6: tuple(range(13, 64 * 13, 26)),
    7: tuple(range(7, 128 * 7, 14)),
    8: tuple(range(4, 256 * 4, 8)),
}
"""By bits, in units of 2^-8: the magnitudes of the Lloyd-Max code of a Gaussian; from 6 bits on at equal
distances, the best of them."""
ERRORS = (1.0, 0.36338, 0.11748, 0.034548, 0.0095017, 0.0025053, 0.0010477, 0.00031175, 0.000088018)
"""By bits: what is left of a Gaussian's variance."""
WEIGHTS = 2.0 ** torch.arange(BLOCK, dtype=torch.float32)
"""Of a word's bits."""
LARGEST_W = BLOCK**0.5 * 4.0
"""Of signs and Hadamard of 16 levels, over 4."""


class Coding(NamedTuple):
    """How coordinates are coded."""

    means: torch.Tensor
    """fp32 [C], bfloat16 values."""
    deviations: torch.Tensor
    """fp32 [C], bfloat16 values."""
    order: torch.Tensor
    """int64 [C]: the coordinates by deviation, the largest first."""
    bits: torch.Tensor
    """uint8 [C / 16]: of each block of coordinates in that order."""
    ends: torch.Tensor
    """int32 [C / 16]: where a block's words end among a row's."""


class Arrived(NamedTuple):
    """Rows of a message: first those that are coded, then outliers."""

    coded: torch.Tensor
    """fp32 [M, C]: over their gains; of the coordinates the first D are channels."""
    gains: torch.Tensor
    """bfloat16 [M]; NaN: the row is not finite."""
    outliers: torch.Tensor
    """bfloat16 [N - M, D]; NaN throughout: the row is not finite."""
    order: torch.Tensor
    """int64 [N]: which rows of the tensor they are."""
    finite: torch.Tensor
    """bool [N]: which of them are."""


def write_codes_(z_MC: torch.Tensor, coding: Coding, seed: int, code_MW: torch.Tensor) -> None:
    """Codes of rows less means, over scales.

    z_MC      fp32
    code_MW   int16: the words of each row
    """
    u_MC = (z_MC * invert(coding.deviations)).index_select(1, coding.order)
    rotated_G16 = rotation.apply_hadamard(_flip_signs(u_MC.view(-1, BLOCK), seed)) * 0.25
    y_MB16 = rotated_G16.view(len(z_MC), len(coding.bits), BLOCK)
    for bits, block_b in _group_by_bits(coding.bits):
        y_Mb16 = y_MB16.index_select(1, block_b)
        level_L = _levels(bits, z_MC.device)
        code_Mb16 = torch.bucketize(y_Mb16.abs(), (level_L[1:] + level_L[:-1]) / 2, out_int32=True)
        code_Mb16 += y_Mb16.signbit().int() << (bits - 1)
        for plane in range(bits):
            word_Mb = ((code_Mb16 >> plane) & 1).float() @ WEIGHTS
            code_MW[:, coding.ends[block_b] - bits + plane] = word_Mb.int().to(torch.int16)


def read_codes(code_MW: torch.Tensor, coding: Coding, scale_M: torch.Tensor, seed: int) -> torch.Tensor:
    """fp32 [M, C]: mean + (scale * deviation) * w of each row.

    scale_M   fp32, bfloat16 values
    """
    num_rows, size = len(code_MW), len(coding.order)
    y_MB16 = coding.means.new_zeros(num_rows, size // BLOCK, BLOCK)
    bit_16 = torch.arange(BLOCK, dtype=torch.int32, device=code_MW.device)
    for bits, block_b in _group_by_bits(coding.bits):
        code_Mb16 = torch.zeros(num_rows, len(block_b), BLOCK, dtype=torch.int32, device=code_MW.device)
        for plane in range(bits):
            word_Mb = code_MW[:, coding.ends[block_b] - bits + plane].int()
            code_Mb16 |= ((word_Mb[:, :, None] >> bit_16) & 1) << plane
        level_L = _levels(bits, code_MW.device)
        y_MB16[:, block_b] = torch.cat([level_L, -level_L])[code_Mb16]
    u_MC = _flip_signs(rotation.apply_hadamard(y_MB16.view(-1, BLOCK)) * 0.25, seed).view(num_rows, size)
    w_MC = torch.empty_like(u_MC)
    w_MC[:, coding.order] = u_MC
    return coding.means + (scale_M[:, None] * coding.deviations) * w_MC


def apply_(arrived: Arrived, like: torch.Tensor, out: torch.Tensor | None, context: Context) -> None:
    """Updates the memory by what has arrived; `out`, where given, gets the result.

    like   a tensor of the message's dtype
    """
    num_coded, num_channels = len(arrived.gains), arrived.outliers.shape[1]
    coded_MD = arrived.coded[:, :num_channels] * arrived.gains.float()[:, None]
    sent_ND = coded_MD.new_empty(len(arrived.order), num_channels)
    sent_ND.index_copy_(0, arrived.order[:num_coded], coded_MD)
    sent_ND.index_copy_(0, arrived.order[num_coded:], arrived.outliers.float())
    finite_N = torch.empty_like(arrived.finite).index_copy_(0, arrived.order, arrived.finite)
    if out is not None:
        deliver_(out, sent_ND, finite_N, context)
    elif context.memory is not None:
        bound = limit(like, context.memory)
        keep_(context.memory, update(load_base_like(sent_ND, context), sent_ND, bound), finite_N)


def invert(x: torch.Tensor) -> torch.Tensor:
    """1 / x; zero where `x` is."""
    return torch.where(x > 0, 1.0 / x, 0.0)


def multiply(integer_MC: torch.Tensor, basis_CC: torch.Tensor) -> torch.Tensor:
    """fp32 product of integers, fp32 up to 2^22 and int8, exact but for one rounding."""
    return (integer_MC.double() @ basis_CC.double()).float()


def _flip_signs(u_G16: torch.Tensor, seed: int) -> torch.Tensor:
    """A group is a block of a row."""
    key_G = rotation.make_group_keys(torch.arange(len(u_G16), device=u_G16.device), seed)
    return rotation.flip_signs(u_G16, key_G)


def _group_by_bits(bits_B: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Bits, and the blocks that have so many, as far as there are some."""
    for bits in LEVELS:
        block_b = (bits_B == bits).nonzero()[:, 0]
        if len(block_b):
            yield bits, block_b


def _levels(bits: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(LEVELS[bits], dtype=torch.float32, device=device) * LEVEL_UNIT
