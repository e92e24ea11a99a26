"""SPARKLE and D-SOBA on a quadratic problem whose solution is known, by strategy, topology and codec.

    python -m benchmarks.bilevel.quadratic

Site i has the lower loss y'H_i y / 2 - y'(B_i x + b_i) and the upper loss |y - t_i|^2 / 2 + |x|^2 / 2 - c_i'x,
so that the sites' own solutions are far from the common one. All sites lie in one process.
"""

from collections.abc import Sequence

import torch

from clapping_ds.bilevel import LocalGossip, Losses, Plan, Sparkle, Topology
from clapping_ds.codecs import AnyCodec, Raw

NUM_SITES = 8


class Quadratic:
    """num_x, num_y   values of the upper and of the lower level
    coupling       how much of y follows x: what the upper level's Hessian grows with
    """

    def __init__(
        self,
        num_sites: int = NUM_SITES,
        num_x: int = 5,
        num_y: int = 10,
        seed: int = 0,
        coupling: float = 1.0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        factors = draw(num_sites, num_y, num_y) / num_y**0.5
        self.h = torch.eye(num_y, dtype=torch.float64) + factors @ factors.mT / 2
        self.b_of_x = coupling * draw(num_sites, num_y, num_x) * (10 / num_y) ** 0.5
        self.b, self.t, self.c = draw(num_sites, num_y), draw(num_sites, num_y), draw(num_sites, num_x)

    def losses(self, site: int, noise: float = 0.0, generator: torch.Generator | None = None) -> Losses:
        """noise: standard deviation of what is added to the gradients of y."""
        h, b_of_x, b, t, c = (each[site] for each in (self.h, self.b_of_x, self.b, self.t, self.c))
        of_upper, of_lower = (
            noise * torch.randn(len(b), generator=generator, dtype=torch.float64) for _ in range(2)
        )
        return Losses(
            lambda x, y: (y - t).square().sum() / 2 + x.square().sum() / 2 - c @ x + of_upper @ y,
            lambda x, y: y @ h @ y / 2 - y @ (b_of_x @ x + b + of_lower),
        )

    def solve(self) -> torch.Tensor:
        """The best x."""
        h, b_of_x, b, t, c = (each.mean(0) for each in (self.h, self.b_of_x, self.b, self.t, self.c))
        per_x, at_zero = torch.linalg.solve(h, b_of_x), torch.linalg.solve(h, b)
        identity = torch.eye(len(c), dtype=torch.float64)
        return torch.linalg.solve(per_x.T @ per_x + identity, c + per_x.T @ (t - at_zero))


def make_plan(strategies: Sequence[str], scale: float = 1.0) -> Plan:
    """strategies: of x, y and z. scale: of all steps."""
    x, y, z = strategies
    return Plan.model_validate({
        "x": x, "y": y, "z": z, "x_step": 0.05 * scale, "y_step": 0.2 * scale, "z_step": 0.2 * scale,
        "momentum": 0.3,
    })  # fmt: skip


class Run:
    """Of all sites, in this process."""

    def __init__(
        self,
        problem: Quadratic,
        topology: Topology,
        plan: Plan,
        codec: AnyCodec | None = None,
        memory: bool = True,
        noise: float = 0.0,
    ) -> None:
        self.problem = problem
        self.noise = noise
        self.gossip = LocalGossip(topology, codec or Raw(), memory)
        num_x, num_y = problem.c.shape[1], problem.b.shape[1]
        zeros = [torch.zeros(size, dtype=torch.float64) for size in (num_x, num_y)]
        self.solver = Sparkle(self.gossip, *zeros, plan)
        self.generator = torch.Generator().manual_seed(1)
        self.solution = problem.solve()

    def train(self, steps: int) -> float:
        """The distance of x from the solution then, in the mean over sites."""
        sites = range(len(self.gossip.sites))
        for _ in range(steps):
            self.solver.step(*(self.problem.losses(site, self.noise, self.generator) for site in sites))
        return sum(float((self.solver.value("x", site) - self.solution).norm()) for site in sites) / len(
            sites
        )

    @property
    def bytes_sent(self) -> int:
        return sum(site.bytes_sent for site in self.gossip.sites)
