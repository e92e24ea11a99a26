"""Uniform codes: `clapping_ds.codecs.quant` in plain torch."""

import torch

from clapping_ds.codecs.reference.grouped import Constants, Functions
from clapping_ds.codecs.reference.random_bits import tree_sum


def encoded(
    y_GS: torch.Tensor, exists_GS: torch.Tensor, noise_GS: torch.Tensor, constants: Constants
) -> tuple[torch.Tensor, torch.Tensor]:
    bits, scale, start, is_stochastic = constants
    magnitude_GS = y_GS.abs()
    half_G = magnitude_GS.amax(1) * (1.0 / ((1 << bits) - 1))
    if scale != "maximum":
        count_G = exists_GS.float().sum(1).clamp(min=1.0)
        mean_G = tree_sum(magnitude_GS) / count_G
        half_G = mean_G if scale == "mean" else _least_squares(y_GS, exists_GS, half_G, mean_G * start, bits)
    half_G = _rounded_up(half_G) if is_stochastic else half_G.bfloat16().float()
    return _code(y_GS, half_G, noise_GS if is_stochastic else None, bits), half_G


def level(code_GS: torch.Tensor, constants: Constants) -> torch.Tensor:
    return (2 * code_GS - ((1 << constants[0]) - 1)).float()


def _rounded_up(half_G: torch.Tensor) -> torch.Tensor:
    """fp32, exact in bfloat16, not below half_G."""
    return ((half_G.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _code(y_GS: torch.Tensor, half_G: torch.Tensor, noise_GS: torch.Tensor | None, bits: int) -> torch.Tensor:
    """int32 [G, S]: the nearest level; with noise one of the two nearest."""
    inverse_G = torch.where(half_G > 0, 0.5 / half_G, 0.0)
    steps_GS = y_GS * inverse_G[:, None]
    if noise_GS is not None:
        steps_GS = steps_GS + (noise_GS - 0.5)
    return (steps_GS.floor() + (1 << (bits - 1))).clamp(0, (1 << bits) - 1).to(torch.int32)


def _least_squares(
    y_GS: torch.Tensor, exists_GS: torch.Tensor, largest_G: torch.Tensor, typical_G: torch.Tensor, bits: int
) -> torch.Tensor:
    """The half step that fits the codes of the better of two starts."""
    product_G, square_G = _fit(y_GS, exists_GS, largest_G, bits)
    other_product_G, other_square_G = _fit(y_GS, exists_GS, typical_G, bits)
    is_better_G = other_product_G * other_product_G / other_square_G > product_G * product_G / square_G
    product_G = other_product_G.where(is_better_G, product_G)
    return product_G / other_square_G.where(is_better_G, square_G)


def _fit(
    y_GS: torch.Tensor, exists_GS: torch.Tensor, half_G: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """<y, q> and <q, q> for the odd levels q of y at half_G."""
    level_GS = level(_code(y_GS, half_G, None, bits), (bits,)).where(exists_GS, 0.0)
    return tree_sum(y_GS * level_GS), tree_sum(level_GS * level_GS).clamp(min=1.0)


UNIFORM = Functions(encoded, level)
