"""Uniform codes: `clapping_ds.codecs.quant` in plain torch."""

from typing import NamedTuple

import torch

from clapping_ds.codecs.reference.rotation_reference import sum_pairwise


class Constants(NamedTuple):
    """What both implementations are told of the codec."""

    bits: int
    scale: str
    """How the half step is chosen: "maximum", "mean" or "least_squares"."""
    start: float
    """Half step over mean magnitude that the least-squares fit starts from."""
    is_stochastic: bool


def encode_groups(
    y_GS: torch.Tensor, count_G: torch.Tensor, noise_GS: torch.Tensor, constants: Constants
) -> tuple[torch.Tensor, torch.Tensor]:
    bits, scale, start, is_stochastic = constants
    top = (1 << bits) - 1
    largest_G = y_GS.abs().amax(1) * (1.0 / top)
    if scale == "maximum":
        half_G = largest_G
    else:
        half_G = sum_pairwise(y_GS.abs()) / count_G
        if scale == "least_squares":
            half_G = _fit(y_GS, count_G, torch.minimum(half_G * start, largest_G), top)
    half_G = _round_up(half_G) if is_stochastic else half_G.bfloat16().float()
    level_GS = _round_to_levels(y_GS, half_G, noise_GS if is_stochastic else -0.5, top)
    return ((level_GS + top) * 0.5).to(torch.uint8), half_G


def decode_level(code_GS: torch.Tensor, constants: Constants) -> torch.Tensor:
    return 2.0 * code_GS.float() - ((1 << constants.bits) - 1)


def _round_up(half_G: torch.Tensor) -> torch.Tensor:
    """fp32, exact in bfloat16, not below half_G."""
    return ((half_G.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _round_to_levels(
    y_GS: torch.Tensor, half_G: torch.Tensor, offset_GS: torch.Tensor | float, top: int
) -> torch.Tensor:
    """fp32 [G, S]: odd multiples of half_G near y_GS, the nearest ones where the offset is -1/2."""
    inverse_G = torch.where(half_G > 0, 0.5 / half_G, 0.0)
    return (2.0 * (y_GS * inverse_G[:, None] + offset_GS).round() + 1.0).clamp(-top, top)


def _fit(y_GS: torch.Tensor, count_G: torch.Tensor, half_G: torch.Tensor, top: int) -> torch.Tensor:
    """fp32 [G]: the half step that fits the levels of y_GS at half_G best. Padding has levels of 1 or -1."""
    level_GS = _round_to_levels(y_GS, half_G, -0.5, top)
    square_G = sum_pairwise(level_GS * level_GS) - (y_GS.shape[1] - count_G)
    return sum_pairwise(y_GS * level_GS) / square_G
