"""Decentralized bilevel optimization: SPARKLE (arXiv 2411.14166), of which D-SOBA (2402.03167) is a case.

    gossip = bilevel.RankGossip(bilevel.ring(8))                       # one site per rank, or LocalGossip
    solver = bilevel.Sparkle(gossip, x, y, bilevel.Plan(y="ed", x_step=0.05, y_step=0.2, z_step=0.2))
    for batch, held_out in data:
        solver.step(bilevel.Losses(lambda x, y: upper(x, y, held_out), lambda x, y: lower(x, y, batch)))

Sites do not share data. Each takes its own directions, all at the values before the step, and mixes x, y and
z with its neighbours by a strategy for each.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field

from clapping_ds.bilevel.curvature import Autograd, Curvature, Loss
from clapping_ds.bilevel.gossip import Gossip
from clapping_ds.bilevel.levels import Level, advance, check_saved
from clapping_ds.bilevel.strategies import General
from clapping_ds.codecs.base import STRICT
from clapping_ds.link.verification import checksum

Name = Literal["dsgd", "extra", "ed", "atc-gt", "semi-atc-gt", "gt", "local"]
Step = Annotated[float, Field(gt=0)]
LEVELS = ("x", "y", "z")


class Plan(BaseModel):
    """What a solver does: the strategy of each level, and how far it goes."""

    model_config = STRICT

    x: Name | General = "ed"
    """Of the upper level."""
    y: Name | General = "ed"
    """Of the lower level. `local`, here and for z: each site has a lower level of its own."""
    z: Name | General = "ed"
    """Of the products with the inverse Hessian."""
    x_step: Step = 0.01
    y_step: Step = 0.1
    z_step: Step = 0.1
    momentum: Annotated[float, Field(gt=0, le=1)] = 1.0
    """theta: the share of the newest direction in the moving average that x follows."""


class Losses(NamedTuple):
    """Of one site, on its mini-batches: scalars of x and y."""

    upper: Loss
    lower: Loss


class Sparkle:
    """gossip   the sites of this process, and their neighbours
    x, y       first values, of one dimension, the same at all sites
    plan       the same at all sites
    Making one is a collective of all ranks, as is each step. Raises ValueError on every rank, with the same
    text, where they differ.
    """

    def __init__(
        self,
        gossip: Gossip,
        x: torch.Tensor,
        y: torch.Tensor,
        plan: Plan,
        curvature: Curvature | None = None,
    ) -> None:
        curvature = Autograd() if curvature is None else curvature
        gossip.check(lambda: _check_values({"x": x, "y": y}, gossip.device))
        gossip.check_equal({
            "plan": plan.model_dump(), "curvature": repr(curvature),
            **{
                name: (value.dtype, len(value), checksum(value.detach().contiguous()))
                for name, value in (("x", x), ("y", y))
            },
        })  # fmt: skip
        # Configuration
        self.gossip = gossip
        self.plan = plan
        self.curvature = curvature
        self.steps = {"x": plan.x_step, "y": plan.y_step, "z": plan.z_step}
        """Step sizes by level; may be changed between two steps, alike at all sites."""
        # State
        first = {"x": x.detach(), "y": y.detach(), "z": self.curvature.start(y.detach())}
        self.levels = [
            {name: Level(value.clone(), getattr(plan, name)) for name, value in first.items()}
            for _ in gossip.sites
        ]
        self.averages = [torch.zeros_like(first["x"]) for _ in gossip.sites]
        """h of each site: of the directions of x."""
        self.num_steps = 0

    def value(self, level: str, site: int = 0) -> torch.Tensor:
        """x, y or z of a site of this process."""
        return self.levels[site][level].value

    def step(self, *losses: Losses) -> None:
        """One step. losses: of each site of this process.

        Raises ArithmeticError where a site sent what is not finite, ConnectionError where a neighbour is gone
        or silent.
        """
        if len(losses) != len(self.levels):
            raise ValueError(f"losses of {len(losses)} sites; accepted: of {len(self.levels)}")
        averages: list[torch.Tensor] = []

        def find() -> list[dict[str, torch.Tensor]]:
            found = [self._find(site, *of_site) for site, of_site in enumerate(losses)]
            averages.extend(average for average, _ in found)
            return [steps for _, steps in found]

        advance(self.gossip, self.levels, find, note=self.steps)
        self.averages = averages
        self.num_steps += 1

    def _find(self, site: int, upper: Loss, lower: Loss) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The new moving average; directions times step sizes."""
        x, y, z = (self.value(name, site) for name in LEVELS)
        found = self.curvature.find(upper, lower, x, y, z)
        share = self.plan.momentum
        average = (1 - share) * self.averages[site] + share * found.x
        followed = {"x": average, "y": found.y, "z": found.z}
        return average, {name: self.steps[name] * direction for name, direction in followed.items()}

    def state_dict(self) -> dict[str, Any]:
        """Of the sites of this process, after the last step that was made."""
        return {
            "written by": self._describe(),
            "num_steps": self.num_steps,
            "steps": dict(self.steps),
            "levels": [{name: level.state_dict() for name, level in each.items()} for each in self.levels],
            "averages": list(self.averages),
            "gossip": [site.state_dict() for site in self.gossip.sites],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes what `state_dict` of the same sites gave. A collective of all ranks. Raises ValueError on
        every rank of a state of other sites, another plan or another step."""
        check_saved(self.gossip, saved, self._describe())
        self.num_steps, self.steps = saved["num_steps"], dict(saved["steps"])
        self.averages = [values.to(self.gossip.device, copy=True) for values in saved["averages"]]
        for of_site, levels in zip(self.levels, saved["levels"], strict=True):
            for name, level in of_site.items():
                level.load_state_dict(levels[name])
        for site, known in zip(self.gossip.sites, saved["gossip"], strict=True):
            site.load_state_dict(known, self.gossip.device)

    def _describe(self) -> dict[str, Any]:
        return {
            "plan": self.plan.model_dump(),
            "curvature": repr(self.curvature),
            "values": [{name: len(level.value) for name, level in each.items()} for each in self.levels],
            "sites": [site.describe() for site in self.gossip.sites],
        }


def _check_values(values: Mapping[str, torch.Tensor], device: torch.device) -> None:
    for name, value in values.items():
        if value.device.type != device.type:
            raise ValueError(f"{name} on {value.device}; accepted: on {device}, the device of the gossip")
        if value.dim() != 1 or not value.is_floating_point() or not value.numel():
            raise ValueError(
                f"{name} is {value.dtype} of shape {tuple(value.shape)}; accepted: floating-point values of "
                "one dimension"
            )
