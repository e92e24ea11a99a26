"""int8 with a power of two per row, and powers of two, exact on every device."""

import torch

LARGEST_INT8 = 127
EXPONENT_OF_ONE = 6
"""p of a row whose largest entry is 1."""


def round_to_int8(row_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q int8 [R, C] and p int8 [R]: row_r = Q_r 2^-p_r but for rounding, with 2^6 <= max|Q_r| < 2^7."""
    exponent_R = EXPONENT_OF_ONE - exponent(row_RC.abs().amax(1))
    exponent_R = exponent_R.clamp(max=LARGEST_INT8)
    integer_RC = (row_RC * power_of_two(exponent_R)[:, None]).round()
    return integer_RC.clamp(-LARGEST_INT8, LARGEST_INT8).to(torch.int8), exponent_R.to(torch.int8)


def exponent(x: torch.Tensor) -> torch.Tensor:
    """int32: e with 2^e <= x < 2^(e + 1), at least -105, so that 2^(21 - e) is finite."""
    return ((x.contiguous().view(torch.int32) >> 23) - 127).clamp(min=-105)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """fp32, of int32; exact whatever the device's exp2."""
    return ((exponent + 127) << 23).view(torch.float32)
