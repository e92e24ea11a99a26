"""Gains of rows, means and deviations of coordinates. The sender finds and sends them, so sums may have any
order."""

from typing import NamedTuple

import torch

from clapping_ds.codecs.reference.transform_reference import invert

SMALLEST = 2.0**-60
"""Of a deviation or a root mean square, where the largest value is 1 to 2; below it, zero."""


class Statistics(NamedTuple):
    """Rounded to bfloat16, held in fp32."""

    gains: torch.Tensor
    """[M]"""
    means: torch.Tensor
    """[C]"""
    deviations: torch.Tensor
    """[C]"""


def find_statistics(y_MC: torch.Tensor, finite_M: torch.Tensor) -> Statistics:
    """gain: the root mean square over k of y_nk / (root mean square of coordinate k). mean, deviation: of
    y_nk / gain_n.

    y_MC       fp32, of which the largest is 1 to 2; rows that are not finite are zeros
    finite_M   which these are
    """
    count = finite_M.sum().clamp(min=1)
    root_C = (y_MC.square().sum(0) / count).sqrt()
    root_C = root_C * (root_C > SMALLEST)
    num_used = (root_C > 0).sum().clamp(min=1)
    gain_M = ((y_MC * invert(root_C)).square().sum(1) / num_used).sqrt()
    gain_M = (gain_M * (gain_M > SMALLEST)).bfloat16().float()
    z_MC = y_MC * invert(gain_M)[:, None]
    mean_C = (z_MC.sum(0) / count).bfloat16().float()
    # The mean of squares less the square of the mean would cancel.
    centred_MC = (z_MC - mean_C) * (gain_M > 0)[:, None]
    deviation_C = (centred_MC.square().sum(0) / count).sqrt()
    deviation_C = (deviation_C * (deviation_C > SMALLEST)).bfloat16().float()
    return Statistics(gain_M, mean_C, deviation_C)
