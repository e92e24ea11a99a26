"""Gains of rows, means and deviations of coordinates. The sender finds and sends them, so sums may have any
order."""

from typing import NamedTuple

import torch

from clapping_ds.codecs.reference.transform_reference import invert

SMALLEST = 2.0**-60
"""Of a deviation or a root mean square, where the largest value is 1 to 2; below it, zero."""


def find_gains(x_MC: torch.Tensor, finite_M: torch.Tensor) -> torch.Tensor:
    """fp32 [M]: the root mean square over channels of x_nc / (root mean square of channel c), times the root
    mean square of all. So a row over its gain is of size 1, whichever channels are large.

    x_MC       fp32, of which the largest is at most 2; rows that are not finite are zeros
    finite_M   which these are
    """
    square_C = x_MC.square().sum(0) / finite_M.sum().clamp(min=1)
    num_used = (square_C > 0).sum().clamp(min=1)
    return _find_scales(x_MC, square_C) * (square_C.sum() / num_used).sqrt()


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
    count = counted_M.sum().clamp(min=1)
    mean_C = (z_MC.sum(0) / count).bfloat16().float()
    # The mean of squares less the square of the mean would cancel.
    left_MC = (z_MC - mean_C) * counted_M[:, None]
    square_C = left_MC.square().sum(0) / count
    scale_M = _find_scales(left_MC, square_C).bfloat16().float()
    left_MC *= invert(scale_M)[:, None]
    deviation_C = (left_MC.square().sum(0) / count).sqrt()
    deviation_C = (deviation_C * (deviation_C > SMALLEST)).bfloat16().float()
    return Moments(mean_C, deviation_C, scale_M, left_MC)


def _find_scales(x_MC: torch.Tensor, square_C: torch.Tensor) -> torch.Tensor:
    """[M]: the root mean square over coordinates of x_nc / (root mean square of coordinate c).

    square_C   mean squares of the coordinates
    """
    root_C = square_C.sqrt()
    root_C = root_C * (root_C > SMALLEST)
    num_used = (root_C > 0).sum().clamp(min=1)
    scale_M = ((x_MC * invert(root_C)).square().sum(1) / num_used).sqrt()
    return scale_M * (scale_M > SMALLEST)
