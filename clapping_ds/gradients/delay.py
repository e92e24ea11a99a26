"""Gradients that are some steps old when they are used, so that they travel while the next steps compute.

Source of delay and compression together: arXiv 1806.06573; the step size that it allows is in `rules`.
Experimental: in the first steps nothing has arrived, and gradients are zero.
"""

from collections import deque
from collections.abc import Mapping

import torch

from clapping_ds.gradients.exchange import Exchange, Round


class Arrived:
    """A mean that was there when a checkpoint was saved."""

    def __init__(self, gradients: Mapping[int, torch.Tensor]) -> None:
        self.gradients = gradients

    def advance(self) -> None:
        pass

    def finish(self) -> None:
        pass


class DelayedExchange:
    """delay: steps between the gradients that are given and those that are got."""

    def __init__(self, exchange: Exchange, delay: int) -> None:
        # Configuration
        self.exchange = exchange
        self.delay = delay
        # State
        self._travelling: deque[tuple[Round | Arrived, float]] = deque()
        """And their loss scale."""

    def average_(self, gradients: Mapping[int, torch.Tensor]) -> None:
        """Sends these gradients, and replaces them by the mean of those of `delay` steps ago."""
        for started, _ in self._travelling:
            started.advance()
        copies = {number: gradient.detach().clone() for number, gradient in gradients.items()}
        self._travelling.append((self.exchange.start(copies), self.exchange.scale))
        if len(self._travelling) <= self.delay:
            for gradient in gradients.values():
                gradient.zero_()
            return
        oldest, scale = self._travelling.popleft()
        oldest.finish()
        for number, gradient in gradients.items():
            gradient.copy_(oldest.gradients[number] * (self.exchange.scale / scale))

    def state_dict(self) -> list[tuple[dict[int, torch.Tensor], float]]:
        """What is on its way, once it has arrived. A collective of the replicas."""
        for started, _ in self._travelling:
            started.finish()
        self.exchange.end_step()  # what was sent back is part of the state
        arrived = [(dict(started.gradients), scale) for started, scale in self._travelling]
        self.load_state_dict(arrived)
        return arrived

    def load_state_dict(self, state: list[tuple[dict[int, torch.Tensor], float]]) -> None:
        device = self.exchange.collective.device
        self._travelling = deque(
            (Arrived({number: mean.to(device) for number, mean in means.items()}), scale)
            for means, scale in state
        )

    def forget(self) -> None:
        """Forgets what is on its way, once it has arrived. A collective of the replicas."""
        self.state_dict()
        self._travelling.clear()
