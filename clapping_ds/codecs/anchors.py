"""Anchors: points that rows gather around, so that what is coded of a row is its distance to the nearest.

Hidden states of a token in its context lie near those of the same token elsewhere; a model's rows are a
mixture, not one cloud. The index of an anchor costs 2 bytes a row and takes away half of the variance and
more. Nothing has to be known of token ids, so gradients and other models' tensors have anchors too.

    a_k = Q_k * 2^-p       int8 [K, C], and an exponent for each coordinate, int8 [C]

Product quantisation's coarse quantiser does the same for search (Jegou, Douze, Schmid, 2011, section IV).
"""

from typing import NamedTuple

import torch

from clapping_ds.codecs.base import ceil_div
from clapping_ds.codecs.integers import power_of_two, round_to_int8

SEARCHED = 128
"""Coordinates in which the nearest is looked for: those in which anchors differ most."""
ROUNDS = 6
"""Of k-means."""
ROWS_PER_ANCHOR = 8
"""That k-means takes."""
MOST_SCORES = 1 << 24
"""Of rows and anchors, at a time."""


class Anchors(NamedTuple):
    """As they travel."""

    integers: torch.Tensor
    """int8 [K, C]"""
    exponents: torch.Tensor
    """int8 [C]"""

    @property
    def scales(self) -> torch.Tensor:
        """fp32 [C]: 2^-p"""
        return power_of_two(-self.exponents.int())

    @property
    def values(self) -> torch.Tensor:
        """fp32 [K, C]"""
        return self.integers * self.scales

    @property
    def bounds(self) -> torch.Tensor:
        """fp32 [C]: of the magnitudes."""
        return self.integers.abs().amax(0) * self.scales

    def take(self, number_M: torch.Tensor) -> torch.Tensor:
        """fp32 [M, C]: those of the numbers, int64."""
        return self.integers[number_M] * self.scales

    def write_(self, anchor_KC: torch.Tensor) -> None:
        integer_CK, exponent_C = round_to_int8(anchor_KC.T)
        self.integers.copy_(integer_CK.T)
        self.exponents.copy_(exponent_C)


class Search(NamedTuple):
    """What the sender finds the nearest anchor with."""

    places: torch.Tensor
    """int64 [S]: the coordinates that are looked at."""
    anchors: torch.Tensor
    """fp32 [S, K]: in these."""
    half_norms: torch.Tensor
    """fp32 [K]"""

    def find_nearest(self, z_MC: torch.Tensor) -> torch.Tensor:
        """int64 [M]: the number of each row's anchor."""
        score_MK = torch.addmm(self.half_norms, z_MC[:, self.places], self.anchors, beta=-1)
        return score_MK.argmax(1)


def prepare_search(anchors: Anchors) -> Search:
    anchor_KC = anchors.values
    places_S = anchor_KC.var(0, unbiased=False).topk(min(SEARCHED, anchor_KC.shape[1])).indices
    anchor_SK = anchor_KC[:, places_S].T.contiguous()
    return Search(places_S, anchor_SK, anchor_SK.square().sum(0) / 2)


def find_anchors(row_RC: torch.Tensor, num_anchors: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K-means of rows: fp32 [K, C], zeros where rows are too few for so many; and for each row the number of
    its own, int64 [R]."""
    num_found = min(num_anchors, ceil_div(len(row_RC), ROWS_PER_ANCHOR))
    anchor_KC = row_RC.new_zeros(num_anchors, row_RC.shape[1])
    if not num_found:
        return anchor_KC, torch.zeros(len(row_RC), dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    some_SC = row_RC[torch.randperm(len(row_RC), generator=generator)[: ROWS_PER_ANCHOR * num_found]]
    found_kC = _begin(some_SC, num_found, generator)
    for _ in range(ROUNDS):
        _move_to_means_(found_kC, some_SC, _find_nearest(some_SC, found_kC)[0])
    nearest_R, _ = _find_nearest(row_RC, found_kC)
    _move_to_means_(found_kC, row_RC, nearest_R)
    anchor_KC[:num_found] = found_kC
    return anchor_KC, nearest_R


def _begin(row_RC: torch.Tensor, num_anchors: int, generator: torch.Generator) -> torch.Tensor:
    """Rows drawn by their squared distance to those before, an eighth of all at a time (k-means||: Bahmani,
    Moseley, Vattani, Kumar, Vassilvitskii, 2012)."""
    size = ceil_div(num_anchors, 8)
    anchor_kC = row_RC[:size]
    while len(anchor_kC) < num_anchors:
        _, distance_R = _find_nearest(row_RC, anchor_kC)
        size = min(size, num_anchors - len(anchor_kC))
        drawn = distance_R.clamp(min=1e-30).multinomial(size, generator=generator)
        anchor_kC = torch.cat([anchor_kC, row_RC[drawn]])
    return anchor_kC.clone()


def _find_nearest(row_RC: torch.Tensor, anchor_KC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of each row's anchor, and the squared distance to it."""
    half_K, anchor_CK = anchor_KC.square().sum(1) / 2, anchor_KC.T
    parts = row_RC.split(max(1, MOST_SCORES // len(anchor_KC)))
    best = [torch.addmm(half_K, part_rC, anchor_CK, beta=-1).max(1) for part_rC in parts]
    score_R, number_R = (torch.cat(found) for found in zip(*best, strict=True))
    return number_R, row_RC.square().sum(1) - 2 * score_R


def _move_to_means_(anchor_KC: torch.Tensor, row_RC: torch.Tensor, nearest_R: torch.Tensor) -> None:
    """An anchor that has no row stays where it is."""
    sum_KC = torch.zeros_like(anchor_KC).index_add_(0, nearest_R, row_RC)
    count_K1 = nearest_R.bincount(minlength=len(anchor_KC))[:, None]
    torch.where(count_K1 > 0, sum_KC / count_K1.clamp(min=1), anchor_KC, out=anchor_KC)
