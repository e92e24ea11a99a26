"""Which sites talk to each other, and how much each counts: a mixing matrix."""

from collections.abc import Sequence

import torch

TOLERANCE = 1e-6
"""Of what counts as equal: a matrix may come from single precision."""


class Topology:
    """weights   [sites, sites]: symmetric, rows of sum 1, connected, no eigenvalue below zero; entries below
              1e-6 are none

    Raises ValueError of a matrix that is not.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        weights = torch.as_tensor(weights, dtype=torch.float64)
        if weights.dim() != 2 or weights.shape[0] != weights.shape[1] or not len(weights):
            raise ValueError(f"mixing matrix of shape {tuple(weights.shape)}; accepted: a square one")
        if not weights.isfinite().all() or (weights < 0).any():
            raise ValueError("mixing matrix with an entry below zero or not finite; accepted: shares")
        if (weights - weights.T).abs().max() > TOLERANCE:
            raise ValueError("mixing matrix that is not symmetric; accepted: w_ij = w_ji")
        sums = weights.sum(1)
        worst = int((sums - 1).abs().argmax())
        if abs(float(sums[worst]) - 1) > TOLERANCE:
            raise ValueError(f"mixing matrix whose row {worst} sums to {float(sums[worst]):g}; accepted: 1")
        weights = (weights + weights.T) / 2
        weights = torch.where(weights < TOLERANCE, 0.0, weights)  # or one site would wait for a message
        weights.fill_diagonal_(0).diagonal().copy_(1 - weights.sum(1))
        self.weights = weights
        self.num_sites = len(weights)
        eigenvalues = torch.linalg.eigvalsh(weights)
        self.smallest_eigenvalue = float(eigenvalues[0])
        self.rho = max(0.0, float(eigenvalues[-2])) if self.num_sites > 1 else 0.0
        """The second largest eigenvalue: what is left of a difference between sites after mixing once."""
        if self.rho > 1 - TOLERANCE:
            raise ValueError(
                "mixing matrix of sites that are not connected; accepted: a path between any two"
            )
        if self.smallest_eigenvalue < -TOLERANCE:
            raise ValueError(
                f"mixing matrix with the eigenvalue {self.smallest_eigenvalue:.3g}; accepted: none below "
                "zero, as of (I + W) / 2"
            )

    def neighbours(self, site: int) -> list[int]:
        """Of a site, without itself, in order."""
        return [int(other) for other in self.weights[site].nonzero() if int(other) != site]

    def weight(self, site: int, other: int) -> float:
        return float(self.weights[site, other])


def make_lazy(weights: torch.Tensor) -> Topology:
    """W, or (I + W) / 2 where W has eigenvalues below zero."""
    if torch.linalg.eigvalsh(weights)[0] < -TOLERANCE:
        weights = (torch.eye(len(weights), dtype=weights.dtype) + weights) / 2
    return Topology(weights)


def from_edges(num_sites: int, edges: Sequence[tuple[int, int]]) -> Topology:
    """Metropolis weights, 1 / (1 + the larger number of neighbours), of undirected edges."""
    near: list[set[int]] = [set() for _ in range(num_sites)]
    for one, other in edges:
        if not (0 <= one < num_sites and 0 <= other < num_sites) or one == other:
            raise ValueError(f"edge ({one}, {other}) of {num_sites} sites; accepted: two sites from 0 on")
        near[one].add(other)
        near[other].add(one)
    weights = torch.zeros(num_sites, num_sites, dtype=torch.float64)
    for one, others in enumerate(near):
        for other in others:
            weights[one, other] = 1 / (1 + max(len(others), len(near[other])))
        weights[one, one] = 1 - weights[one].sum()
    return make_lazy(weights)


def ring(num_sites: int) -> Topology:
    """1/2 for oneself, 1/4 for each of two neighbours."""
    eye = torch.eye(num_sites, dtype=torch.float64)
    return make_lazy(eye / 2 + (eye.roll(1, 0) + eye.roll(-1, 0)) / 4)


def torus(num_rows: int, num_columns: int) -> Topology:
    """Each talks to four others; fewer where a side is shorter than three."""
    edges = [
        (row * num_columns + column, below)
        for row in range(num_rows)
        for column in range(num_columns)
        for below in (
            (row + 1) % num_rows * num_columns + column,
            row * num_columns + (column + 1) % num_columns,
        )
        if below != row * num_columns + column
    ]
    return from_edges(num_rows * num_columns, edges)


def exponential(num_sites: int) -> Topology:
    """Each talks to those at distances 1, 2, 4, ... on a ring, both ways."""
    steps = [1 << power for power in range(max(num_sites - 1, 1).bit_length()) if 1 << power < num_sites]
    edges = [(site, (site + step) % num_sites) for site in range(num_sites) for step in steps]
    return from_edges(num_sites, edges)


def full(num_sites: int) -> Topology:
    """Each takes the mean of all."""
    return Topology(torch.full((num_sites, num_sites), 1 / num_sites, dtype=torch.float64))
