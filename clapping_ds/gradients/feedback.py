"""What is done about what a codec loses: nothing, or one of three forms of error feedback.

Each sender compresses its value g, and whoever gets it takes the mean of what all senders sent:

    none        sent C(g)
    ef14        sent C(g + e)      e <- g + e - C(g + e)       Seide et al. 2014, Karimireddy et al. 2019
    ef21        sent C(g - h)      h <- h + C(g - h)           Richtarik et al. 2021, arXiv 2106.05203
    ef21_sgdm   v <- (1 - b) v + b g, then as ef21 of v        Fatkhullin et al. 2023, arXiv 2305.15155

With `ef21` and `ef21_sgdm` the mean is of changes, and the receiver adds it to what it has. The noise term of
`ef21` does not fall with the number of replicas, that of `ef14` does.

What is held belongs to places: pieces of parameters, whatever message they travel in. Changes of it count
once `commit` is called, when the step that they are of was accepted.
"""

from collections.abc import Callable, Hashable, Sequence

import torch

Place = Hashable
Write = Callable[[torch.Tensor, torch.Tensor | None, bool], None]
"""Writes the payload of a value, with the memory and `carry` of a codec's `Context`."""


class Held:
    """fp32 values by place, and those that will take their place."""

    def __init__(self) -> None:
        self.values: dict[Place, torch.Tensor] = {}
        self._staged: dict[Place, torch.Tensor] = {}

    def read(self, places: Sequence[Place], sizes: Sequence[int], device: torch.device) -> torch.Tensor:
        """fp32 [sum of sizes], a copy; zeros where nothing is held."""
        return torch.cat([
            self._find(place, size, device) for place, size in zip(places, sizes, strict=True)
        ])  # fmt: skip

    def _find(self, place: Place, size: int, device: torch.device) -> torch.Tensor:
        known = self._staged.get(place, self.values.get(place))
        return torch.zeros(size, device=device) if known is None else known

    def stage(self, places: Sequence[Place], sizes: Sequence[int], values: torch.Tensor) -> None:
        """values: fp32 [sum of sizes], which must stay as it is."""
        self._staged |= dict(zip(places, values.split(list(sizes)), strict=True))

    def commit(self) -> None:
        self.values |= self._staged
        self._staged = {}

    def discard(self) -> None:
        self._staged = {}

    def rescale(self, factor: float) -> None:
        self.values = {place: values * factor for place, values in self.values.items()}

    @property
    def nbytes(self) -> int:
        return sum(values.nbytes for values in self.values.values())


class NoFeedback:
    """What is sent is the value, compressed."""

    def __init__(self) -> None:
        self.held: dict[str, Held] = {}
        """All that is kept between two steps, by name."""

    def encode(
        self, places: Sequence[Place], sizes: Sequence[int], value: torch.Tensor, write: Write
    ) -> torch.Tensor:
        """Has one section written, and returns what is written of it. value: fp32, the values of all places
        one after the other, in the section's shape."""
        write(value, None, False)
        return value

    def receive(self, places: Sequence[Place], sizes: Sequence[int], mean: torch.Tensor) -> torch.Tensor:
        """What the mean of all that was sent stands for. mean: fp32 [sum of sizes]."""
        return mean

    def measure(self) -> float:
        """The norm of the error that waits to be sent."""
        return 0.0


class ErrorFeedback(NoFeedback):
    """`ef14`: what was lost is added to the next value."""

    def __init__(self) -> None:
        self.error = Held()
        self.held = {"error": self.error}

    def encode(
        self, places: Sequence[Place], sizes: Sequence[int], value: torch.Tensor, write: Write
    ) -> torch.Tensor:
        value = value + self.error.read(places, sizes, value.device).view(value.shape)
        sent = torch.zeros_like(value)
        write(value, sent, False)
        # A group that is not finite arrives as NaN, and the step is lost: its error must not be.
        error = torch.where(value.isfinite(), value - sent, 0.0)
        self.error.stage(places, sizes, error.view(-1))
        return value

    def measure(self) -> float:
        squares = [values.square().sum() for values in self.error.values.values()]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


class DifferenceFeedback(NoFeedback):
    """`ef21`: changes are sent. momentum: of `ef21_sgdm`, the share of the new value in the running mean."""

    def __init__(self, momentum: float = 1.0) -> None:
        self.momentum = momentum
        self.sent, self.received, self.mean = Held(), Held(), Held()
        self.held = {"sent": self.sent, "received": self.received, "mean": self.mean}

    def encode(
        self, places: Sequence[Place], sizes: Sequence[int], value: torch.Tensor, write: Write
    ) -> torch.Tensor:
        if self.momentum < 1:
            before = self.mean.read(places, sizes, value.device).view(value.shape)
            value = before.lerp(value, self.momentum)
            self.mean.stage(places, sizes, torch.where(value.isfinite(), value, before).view(-1))
        sent = self.sent.read(places, sizes, value.device)
        change = value - sent.view(value.shape)
        write(value, sent.view(value.shape), True)
        self.sent.stage(places, sizes, sent)
        return change

    def receive(self, places: Sequence[Place], sizes: Sequence[int], mean: torch.Tensor) -> torch.Tensor:
        before = self.received.read(places, sizes, mean.device)
        result = before + mean
        self.received.stage(places, sizes, torch.where(result.isfinite(), result, before))
        return result


def make_feedback(name: str, momentum: float) -> NoFeedback:
    """One of the four, with nothing held. momentum: of `ef21_sgdm`."""
    if name == "ef14":
        return ErrorFeedback()
    if name == "none":
        return NoFeedback()
    return DifferenceFeedback(momentum if name == "ef21_sgdm" else 1.0)


def commit(feedbacks: Sequence[NoFeedback], accepted: bool) -> None:
    """After a step: takes what was staged in it, or forgets it."""
    for held in (held for feedback in feedbacks for held in feedback.held.values()):
        held.commit() if accepted else held.discard()
