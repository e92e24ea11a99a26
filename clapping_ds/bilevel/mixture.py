"""The shares of corpora in what sites train on, learned for a target: bilevel optimization whose upper level
has as many values as there are domains.

    min over x of f(y*(x)),     y*(x) = argmin over y of the sum over d of p_d l_d(y),     p = softmax(x)

l_d is the loss on domain d, f that on the target, J = diag(p) - p p'. The model is trained beside it, in any
way. Sites gossip x, and nothing else. Two ways to find where x goes:

`follow`   grad_x = -J <grad l_d, z>, with z = P grad f for the inverse Hessian's product: to first order,
           what a step on a domain does for the target (`align`). Needs gradients of single sites.
`update`   the penalty form (arXiv 2309.01753), with losses alone, as pipelines have them: a second model is
           trained on (f + factor times the mixture's loss) / (1 + factor), and
           grad_x = factor J (l(second) - l(first)), of the same batches before a step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from clapping_ds.bilevel.gossip import Gossip
from clapping_ds.bilevel.levels import Level, Strategy, advance, check_saved

NAME = "shares"


def align(
    of_domain: Sequence[torch.Tensor], of_target: Sequence[torch.Tensor], scales: Sequence[torch.Tensor]
) -> float:
    """What a step on a domain does for the target, in units of what a step on the target itself does:
    <g_d, P g_f> / <g_f, P g_f>, P the optimizer's step size per value (`adam_scales`). z = P g_f stands for
    the inverse Hessian's product.

    of_domain, of_target   gradients of the two losses, on mini-batches of one site
    """
    steps = [scale * gradient for scale, gradient in zip(scales, of_target, strict=True)]
    both = sum((a * b).sum() for a, b in zip(of_domain, steps, strict=True))
    own = sum((a * b).sum() for a, b in zip(of_target, steps, strict=True))
    return float(both / own) if own else 0.0


def adam_scales(adam: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Of each parameter that Adam or AdamW has stepped, in the order of its groups: 1 / (sqrt(v) + eps)."""
    found = []
    for group in adam.param_groups:
        for parameter in group["params"]:
            state = adam.state[parameter]
            corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
            found.append(1 / (corrected.sqrt() + group["eps"]))
    return found


class DomainLoss:
    """A loss function for one of the two models, that weighs a site's micro-batches as the mixture has it,
    and notes what their losses were. For pipelines: the last stage's.

    loss      of a module's outputs and labels, a scalar
    domains   of a step's micro-batches, in their order; None: of the target, which only the second model sees
    """

    def __init__(
        self, mixture: "Mixture", loss: Callable[..., torch.Tensor], domains: Sequence[str | None]
    ) -> None:
        # Configuration
        self.mixture = mixture
        self.loss = loss
        self.domains = list(domains)
        num_target = self.domains.count(None)
        share = 1 / (1 + mixture.factor) if num_target else 0.0
        self.scales = {
            name: (share if name is None else 1 - share) * len(self.domains) / self.domains.count(name)
            for name in self.domains
        }
        """By domain: of a micro-batch, so that their mean is the sum over domains."""
        # State
        self._seen: dict[str, list[torch.Tensor]] = {}
        self._num_calls = 0

    def __call__(self, *arguments: Any) -> torch.Tensor:
        found = self.loss(*arguments)
        if not torch.is_grad_enabled():  # an evaluation
            return found
        domain = self.domains[self._num_calls % len(self.domains)]
        self._num_calls += 1
        weight = 1.0
        if domain is not None:
            self._seen.setdefault(domain, []).append(found.detach())
            weight = self.mixture.weight(domain)
        return self.scales[domain] * weight * found

    def take(self) -> dict[str, float]:
        """By domain: the mean loss since the last call, not weighed."""
        if self._num_calls % len(self.domains):
            raise ValueError(
                f"losses of {self._num_calls} micro-batches; accepted: {len(self.domains)} a step"
            )
        seen, self._seen, self._num_calls = self._seen, {}, 0
        return {name: float(torch.stack(losses).mean()) for name, losses in seen.items()}


class Mixture:
    """gossip    the sites of this process, and their neighbours
    domains   names, the same at all sites
    held      by site of this process: the domains that it has data of
    factor    of the penalty: what follows from more of a domain is seen the better the larger it is, and the
              second model is nearer to the first
    step      of x, which starts at zero, with equal shares
    momentum  share of the newest direction in the moving average that x follows
    Raises ValueError on every rank of a domain that no site has, or that is not known.
    """

    def __init__(
        self,
        gossip: Gossip,
        domains: Sequence[str],
        held: Sequence[Sequence[str]],
        factor: float = 1.0,
        step: float = 1.0,
        momentum: float = 0.1,
        strategy: Strategy = "ed",
    ) -> None:
        # Configuration
        self.gossip = gossip
        self.domains = list(domains)
        self.factor = factor
        self.step_size = step
        self.momentum = momentum
        self.strategy = strategy
        gossip.check(lambda: self._check(held))
        gossip.check_equal({
            "domains": self.domains, "factor": factor, "step": step, "momentum": momentum,
            "strategy": strategy,
        })  # fmt: skip
        self.held = [list(names) for names in held]
        by_site = [names for of_rank in gossip.gather(self.held) for names in of_rank]
        self.num_sites = len(by_site)
        self.holders = {name: sum(name in names for names in by_site) for name in self.domains}
        """Of each domain, how many sites have it."""
        gossip.check(self._check_holders)
        # State
        zeros = torch.zeros(len(self.domains), device=gossip.device)
        self.levels = [{NAME: Level(zeros.clone(), strategy)} for _ in gossip.sites]
        self.averages = [zeros.clone() for _ in gossip.sites]
        self.num_steps = 0

    def shares(self, site: int = 0) -> torch.Tensor:
        """fp32 [domains]: p, as a site of this process has it."""
        return self.levels[site][NAME].value.softmax(0)

    def weight(self, domain: str, site: int = 0) -> float:
        """What a site multiplies its loss on a domain with, so that the mean over all sites is the mixture's
        loss."""
        share = float(self.shares(site)[self.domains.index(domain)])
        return self.num_sites * share / self.holders[domain]

    def update(
        self, mixture_losses: Sequence[Mapping[str, float]], target_losses: Sequence[Mapping[str, float]]
    ) -> None:
        """A step of x by the penalty form.

        mixture_losses   by site of this process: losses on the domains that it has, of the model that is
                         trained on the mixture
        target_losses    on the same batches, of the model that is trained on the target as well
        """
        pairs = list(zip(mixture_losses, target_losses, strict=True))
        for site, (first, second) in enumerate(pairs):
            if set(first) != set(self.held[site]) or set(second) != set(self.held[site]):
                raise ValueError(
                    f"losses on {sorted(first)} and {sorted(second)}; accepted: on {sorted(self.held[site])}"
                )
        self.follow([{name: self.factor * (one[name] - two[name]) for name in one} for one, two in pairs])

    def follow(self, gains: Sequence[Mapping[str, float]]) -> None:
        """A step of x towards domains that the target gains from. gains: by site of this process, of the
        domains that it has; in any unit that is the same at all sites, as `align` gives it."""
        for site, of_site in enumerate(gains):
            if set(of_site) != set(self.held[site]):
                raise ValueError(f"gains of {sorted(of_site)}; accepted: of {sorted(self.held[site])}")
        averages: list[torch.Tensor] = []

        def find() -> list[dict[str, torch.Tensor]]:
            averages.extend(self._find(site, of_site) for site, of_site in enumerate(gains))
            return [{NAME: self.step_size * average} for average in averages]

        advance(self.gossip, self.levels, find)
        self.averages = averages
        self.num_steps += 1

    def _find(self, site: int, gains: Mapping[str, float]) -> torch.Tensor:
        """The new moving average of what x goes against."""
        shares = self.shares(site)
        found = torch.zeros_like(shares)
        for name, gain in gains.items():
            found[self.domains.index(name)] = self.num_sites / self.holders[name] * gain
        direction = -shares * (found - shares @ found)
        return (1 - self.momentum) * self.averages[site] + self.momentum * direction

    def _check(self, held: Sequence[Sequence[str]]) -> None:
        if len(set(self.domains)) != len(self.domains) or len(self.domains) < 2:
            raise ValueError(f"domains {self.domains}; accepted: two or more different names")
        if len(held) != len(self.gossip.sites):
            raise ValueError(f"domains of {len(held)} sites; accepted: of {len(self.gossip.sites)}")
        for name in (name for names in held for name in names):
            if name not in self.domains:
                raise ValueError(f"domain {name!r}; accepted: {', '.join(self.domains)}")
        for name, value in (("factor", self.factor), ("step", self.step_size)):
            if not value > 0:
                raise ValueError(f"{name} = {value}; accepted: a number above zero")
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum = {self.momentum}; accepted: above 0, to 1")

    def _check_holders(self) -> None:
        for name, number in self.holders.items():
            if not number:
                raise ValueError(f"domain {name!r} that no site has; accepted: domains with data")

    def state_dict(self) -> dict[str, Any]:
        """Of the sites of this process, after the last step that was made."""
        return {
            "written by": self._describe(),
            "num_steps": self.num_steps,
            "levels": [each[NAME].state_dict() for each in self.levels],
            "averages": list(self.averages),
            "gossip": [site.state_dict() for site in self.gossip.sites],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes what `state_dict` of the same sites gave. A collective of all ranks. Raises ValueError on
        every rank of a state of other sites, domains or another step."""
        check_saved(self.gossip, saved, self._describe())
        self.num_steps = saved["num_steps"]
        for of_site, known in zip(self.levels, saved["levels"], strict=True):
            of_site[NAME].load_state_dict(known)
        self.averages = [values.to(self.gossip.device, copy=True) for values in saved["averages"]]
        for site, known in zip(self.gossip.sites, saved["gossip"], strict=True):
            site.load_state_dict(known, self.gossip.device)

    def _describe(self) -> dict[str, Any]:
        return {
            "domains": self.domains,
            "held": self.held,
            "options": [self.factor, self.step_size, self.momentum, self.strategy],
            "sites": [site.describe() for site in self.gossip.sites],
        }
