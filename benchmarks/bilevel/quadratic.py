"""SPARKLE and D-SOBA on a quadratic problem whose solution is known, by strategy, topology and codec.

    python -m benchmarks.bilevel.quadratic

Site i has the lower loss y'H_i y / 2 - y'(B_i x + b_i) and the upper loss |y - t_i|^2 / 2 + |x|^2 / 2 -
c_i'x, so that the sites' own solutions are far from the common one. All sites lie in one process.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.files import RESULTS, new_figure, save_figure, write_results
from clapping_ds import bilevel
from clapping_ds.bilevel import LocalGossip, Losses, Plan, Sparkle, Topology
from clapping_ds.codecs import AnyCodec, Eden, Raw
from clapping_ds.report import format_table

NUM_SITES, STRIDE = 8, 20


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
        self.solver = Sparkle(
            self.gossip, torch.zeros_like(problem.c[0]), torch.zeros_like(problem.b[0]), plan
        )
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


TOPOLOGIES = {
    "ring": bilevel.ring(NUM_SITES),
    "torus": bilevel.torus(2, NUM_SITES // 2),
    "exponential": bilevel.exponential(NUM_SITES),
    "full": bilevel.full(NUM_SITES),
}
NAMES = ("dsgd", "gt", "semi-atc-gt", "atc-gt", "extra", "ed")


def list_runs() -> dict[str, tuple[Run, int]]:
    """By name: the run, and its steps."""
    problem, large, ring = Quadratic(), Quadratic(num_x=64, num_y=64, coupling=0.2), TOPOLOGIES["ring"]
    runs = {f"{name}, ring": (Run(problem, ring, make_plan([name] * 3)), 4000) for name in NAMES}
    for halvings in (1, 2, 3):
        plan = make_plan(["dsgd"] * 3, 0.5**halvings)
        runs[f"dsgd, ring, steps / {2**halvings}"] = Run(problem, ring, plan), 500 * 2**halvings
    for name, strategies in (("y and z", ["dsgd", "ed", "ed"]), ("x", ["ed", "dsgd", "dsgd"])):
        runs[f"ed of {name} alone, ring"] = Run(problem, ring, make_plan(strategies)), 500
    for topology in ("torus", "exponential", "full"):
        for name in ("dsgd", "gt", "ed"):
            runs[f"{name}, {topology}"] = Run(problem, TOPOLOGIES[topology], make_plan([name] * 3)), 500
    for name in NAMES:
        runs[f"{name}, ring, noise 0.3"] = Run(problem, ring, make_plan([name] * 3), noise=0.3), 500
    for name in ("ed", "gt"):
        plan = make_plan([name] * 3)
        runs[f"{name}, 64 values"] = Run(large, ring, plan), 1000
        for codec in ("eden4", "eden2"):
            for memory in (True, False):
                run = Run(large, ring, plan, Eden.model_validate({"name": codec}), memory)
                runs[f"{name}, 64 values, {codec}{'' if memory else ' without memory'}"] = run, 1000
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, paths = [], {}
    for name, (run, steps) in tqdm(list_runs().items()):
        path = [(0, 0, float(run.solution.norm()))]
        for _ in range(steps // STRIDE):
            error = run.train(STRIDE)
            path.append((run.solver.num_steps, run.bytes_sent, error))
        at = {number: error for number, _, error in path}
        rows.append({
            "run": name, "steps": steps, "error after 500": f"{at[500]:.2g}", "error": f"{at[steps]:.2g}",
            "bytes per site and step": round(run.bytes_sent / NUM_SITES / steps),
        })  # fmt: skip
        paths[name] = path
    print(format_table(rows))
    write_results(options.results / "bilevel_quadratic", rows, {"sites": NUM_SITES})
    save_figure(plot(paths), options.results / "bilevel_quadratic.png")


def plot(paths: dict[str, list[tuple[int, int, float]]]) -> Any:
    """Errors against steps, and against bytes where values are compressed."""
    figure, axes = new_figure(1, 2, (11, 4.5))
    for axis, is_large in zip(axes.flat, (False, True), strict=True):
        for name, path in paths.items():
            shown = "64 values" in name if is_large else name.endswith(", ring")
            if shown:
                points = [(num_bytes / 1e6 if is_large else step, error) for step, num_bytes, error in path]
                axis.plot(*zip(*points[:51], strict=True), label=name.replace(", ring", ""))
        axis.set_yscale("log")
        axis.set_xlabel("MB sent by all sites" if is_large else "steps")
        axis.legend(fontsize=7)
    axes.flat[0].set_ylabel("distance of x from the solution")
    return figure


if __name__ == "__main__":
    main()
