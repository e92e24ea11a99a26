"""Lloyd-Max codes: `clapping_ds.codecs.eden` in plain torch."""

from functools import cache
from itertools import pairwise
from typing import NamedTuple, Self

import torch

from clapping_ds.codecs.reference.rotation_reference import sum_pairwise


class Constants(NamedTuple):
    """What both implementations are told of the codec."""

    levels: tuple[float, ...]
    """Of a Gaussian's magnitude, ascending."""
    thresholds: tuple[float, ...]
    """Between the levels."""
    is_unbiased: bool
    transitions: tuple[int, ...]
    """The fp32 bits of the first level, and which bits change from each level to the next."""

    @classmethod
    @cache
    def of(cls, levels: tuple[float, ...], thresholds: tuple[float, ...], is_unbiased: bool) -> Self:
        bits = torch.tensor(levels, dtype=torch.float32).view(torch.int32).tolist()
        changes = (before ^ after for before, after in pairwise(bits))
        return cls(levels, thresholds, is_unbiased, (bits[0], *changes))


def encode_groups(
    y_GS: torch.Tensor, count_G: torch.Tensor, noise_GS: torch.Tensor, constants: Constants
) -> tuple[torch.Tensor, torch.Tensor]:
    thresholds = constants.thresholds
    square_G = sum_pairwise(y_GS * y_GS)
    root_G = (square_G * (1.0 / y_GS.shape[1])).sqrt()
    magnitude_GS = (y_GS * torch.where(root_G > 0, 1.0 / root_G, 0.0)[:, None]).abs()
    code_GS = y_GS.signbit().to(torch.uint8) * (len(thresholds) + 1)
    for threshold in thresholds:
        code_GS = code_GS + (magnitude_GS > threshold).to(torch.uint8)

    level_GS = decode_level(code_GS, constants)
    product_G = sum_pairwise(y_GS * level_GS)
    if constants.is_unbiased:
        scale_G = square_G / torch.where(product_G > 0, product_G, 1.0)
    else:
        scale_G = product_G / sum_pairwise(level_GS * level_GS)
    return code_GS, scale_G.bfloat16().float()


def decode_level(code_GS: torch.Tensor, constants: Constants) -> torch.Tensor:
    centroids = constants.levels
    rank_GS = code_GS & (len(centroids) - 1)
    level_GS = torch.full_like(code_GS, centroids[0], dtype=torch.float32)
    for rank in range(1, len(centroids)):
        level_GS = torch.where(rank_GS >= rank, centroids[rank], level_GS)
    return torch.where(code_GS >= len(centroids), -level_GS, level_GS)
