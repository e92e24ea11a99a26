"""Lloyd-Max codes: `clapping_ds.codecs.eden` in plain torch."""

import torch

from clapping_ds.codecs.reference.grouped import Constants, Functions
from clapping_ds.codecs.reference.random_bits import tree_sum


def encoded(
    y_GS: torch.Tensor, count_G: torch.Tensor, noise_GS: torch.Tensor, constants: Constants
) -> tuple[torch.Tensor, torch.Tensor]:
    _, thresholds, is_unbiased, _ = constants
    square_G = tree_sum(y_GS * y_GS)
    root_G = (square_G * (1.0 / y_GS.shape[1])).sqrt()
    magnitude_GS = (y_GS * torch.where(root_G > 0, 1.0 / root_G, 0.0)[:, None]).abs()
    code_GS = y_GS.signbit().to(torch.uint8) * (len(thresholds) + 1)
    for threshold in thresholds:
        code_GS = code_GS + (magnitude_GS > threshold).to(torch.uint8)

    level_GS = level(code_GS, constants)
    product_G = tree_sum(y_GS * level_GS)
    if is_unbiased:
        scale_G = square_G / torch.where(product_G > 0, product_G, 1.0)
    else:
        scale_G = product_G / tree_sum(level_GS * level_GS)
    return code_GS, scale_G.bfloat16().float()


def level(code_GS: torch.Tensor, constants: Constants) -> torch.Tensor:
    centroids = constants[0]
    rank_GS = code_GS & (len(centroids) - 1)
    level_GS = torch.full_like(code_GS, centroids[0], dtype=torch.float32)
    for rank in range(1, len(centroids)):
        level_GS = torch.where(rank_GS >= rank, centroids[rank], level_GS)
    return torch.where(code_GS >= len(centroids), -level_GS, level_GS)


LLOYD_MAX = Functions(encoded, level)
