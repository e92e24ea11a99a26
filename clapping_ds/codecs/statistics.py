"""Gains of rows, means and deviations of coordinates. The sender finds and sends them, so sums may have any
order."""

from typing import NamedTuple

import torch

from clapping_ds.codecs.reference.transform_reference import invert

SMALLEST = 2.0**-60
"""Of a deviation or a root mean square, where rows are of size 1 or the largest value is; below it, zero."""


def find_gains(x_MC: torch.Tensor, finite_M: torch.Tensor) -> torch.Tensor:
    """fp32 [M]: the root mean square over channels of x_nc / (root mean square of channel c), times the root
    mean square of all. So a row over its gain is of size 1, whichever channels are large.

    x_MC       fp32, of which the largest is at most 2; rows that are not finite are zeros
    finite_M   which these are
    """
    square_MC = x_MC.square()
    square_C = _find_means(square_MC, finite_M.float())
    return _find_scales(square_MC, square_C) * (square_C.sum() / _count_used(square_C)).sqrt()


class Moments(NamedTuple):
    """All but `rows` rounded to bfloat16, held in fp32."""

    means: torch.Tensor
    """[C]"""
    deviations: torch.Tensor
    """[C]: of `rows`."""
    scales: torch.Tensor
    """[M]"""
    rows: torch.Tensor
    """fp32 [M, C]: less means, over scales."""


def find_moments(z_MC: torch.Tensor, counted_M: torch.Tensor) -> Moments:
    """mean: of a coordinate. scale: the root mean square over coordinates of what is left of a row, each over
    its root mean square. deviation: of a coordinate, over scales.

    z_MC        fp32; zeros in rows that do not count
    counted_M   which these are
    """
    weight_M = counted_M.float()
    mean_C = _find_means(z_MC, weight_M).bfloat16().float()
    left_MC = z_MC.addcmul(weight_M[:, None], mean_C, value=-1)
    square_MC = left_MC.square()  # the mean of squares less the square of the mean would cancel
    scale_M = _find_scales(square_MC, _find_means(square_MC, weight_M)).bfloat16().float()
    inverse_M = invert(scale_M)
    deviation_C = (inverse_M.square() @ square_MC / weight_M.sum().clamp(min=1)).sqrt()
    deviation_C = (deviation_C * (deviation_C > SMALLEST)).bfloat16().float()
    return Moments(mean_C, deviation_C, scale_M, left_MC.mul_(inverse_M[:, None]))


def _find_means(x_MC: torch.Tensor, weight_M: torch.Tensor) -> torch.Tensor:
    """[C]: over rows, by their weights, 0 or 1."""
    return weight_M @ x_MC / weight_M.sum().clamp(min=1)


def _find_scales(square_MC: torch.Tensor, mean_C: torch.Tensor) -> torch.Tensor:
    """[M]: the root of the mean over coordinates of a row's squares, each over `mean_C`, that of all rows."""
    inverse_C = invert(mean_C * (mean_C > SMALLEST**2))
    scale_M = (square_MC @ inverse_C / _count_used(mean_C)).sqrt()
    return scale_M * (scale_M > SMALLEST)


def _count_used(square_C: torch.Tensor) -> torch.Tensor:
    """Coordinates that are not zero throughout."""
    return (square_C > SMALLEST**2).sum().clamp(min=1)
