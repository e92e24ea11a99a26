"""The eigenbasis of a tensor's rows, as integers that both ends compute with.

A basis is a matrix of integers, int8 [C, C], and an exponent for each of its rows, int8 [C]:

    U_k = Q_k 2^-p_k        2^6 <= max|Q_k| < 2^7

which is orthonormal up to its rounding. The sender computes coordinates with the inverse of U as it was
rounded, so that x = r U holds all the same, and what rounding costs is a little of the basis being the best.

Where both ends must have the same bits, r U is a product of integers: r_k 2^-p_k as multiples of one power of
two, the smallest with which all stay below 2^22, times Q_k. Such sums are exact in any order.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from clapping_ds.codecs.integers import exponent, power_of_two, round_to_int8

INTEGER_BITS = 22
"""Of a coordinate's magnitude. The largest coordinate sets the unit of all: one massive channel's mean can be
ten thousand times another's deviation."""


class Basis(NamedTuple):
    """As it travels."""

    integers: torch.Tensor
    """int8 [C, C]: a row per coordinate."""
    exponents: torch.Tensor
    """int8 [C]"""

    @property
    def scales(self) -> torch.Tensor:
        """fp32 [C]: 2^-p"""
        return power_of_two(-self.exponents.int())

    def write_(self, covariance_CC: torch.Tensor) -> torch.Tensor:
        """Becomes the eigenvectors of `covariance_CC`, which is finite. The inverse of what it stands for."""
        try:
            rows_CC = torch.linalg.eigh(covariance_CC).eigenvectors.T
        except torch.linalg.LinAlgError:  # LAPACK gave up: the channels as they are
            rows_CC = torch.eye(len(covariance_CC), dtype=torch.float32)
        integer_CC, exponent_C = round_to_int8(rows_CC)
        self.integers.copy_(integer_CC)
        self.exponents.copy_(exponent_C)
        return torch.linalg.inv(self.integers * self.scales[:, None])


def synthesise(
    basis: Basis, r_MC: torch.Tensor, bound_C: torch.Tensor, multiply: Callable[..., torch.Tensor] | None
) -> torch.Tensor:
    """fp32 r U.

    bound_C    of the magnitudes of r, equal at both ends
    multiply   exact, of integers, for the same bits on every machine; None: up to the rounding of fp32 sums
    """
    t_MC = r_MC * basis.scales
    if multiply is None:
        return t_MC @ basis.integers.float()
    bound = (bound_C * basis.scales).amax()
    up = power_of_two(INTEGER_BITS - 1 - exponent(bound))
    return multiply((t_MC * up).round(), basis.integers) * (1.0 / up)
