"""Counters of what went through one end of a channel."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch

from clapping_ds.link.message import Spec


@dataclass
class Traffic:
    """Counters of one channel end since the start. Both ends of a channel count the same."""

    num_messages: int = 0
    num_fresh: int = 0
    num_values: int = 0
    payload_bytes: int = 0
    raw_bytes: int = 0
    error_square: float = 0.0
    value_square: float = 0.0

    def __post_init__(self) -> None:
        self._squares: torch.Tensor | None = None
        """float64 [2] on the device: of errors and of values, since `settle`."""

    def count(self, fresh: bool, payload_bytes: int, specs: Sequence[Spec]) -> None:
        self.num_messages += 1
        self.num_fresh += fresh
        self.num_values += sum(spec.shape.numel() for spec in specs)
        self.payload_bytes += payload_bytes
        self.raw_bytes += sum(spec.nbytes for spec in specs)

    def count_error(self, value: torch.Tensor, reconstruction: torch.Tensor) -> None:
        """Adds to the relative error. Messages that are not finite do not count. Nothing waits for the device
        before `settle`."""
        error = (value.float() - reconstruction.float()).square().sum()
        squares = torch.stack([error, value.float().square().sum()]).double()
        squares = torch.where(torch.isfinite(squares).all(), squares, 0.0)
        self._squares = squares if self._squares is None else self._squares.add_(squares)

    def settle(self) -> None:
        """Adds up the errors that were counted. The host waits for them."""
        if self._squares is not None:
            error_square, value_square = self._squares.tolist()
            self.error_square += error_square
            self.value_square += value_square
            self._squares = None

    def since(self, earlier: "Traffic") -> "Traffic":
        """What was counted after `earlier`, a copy of this."""
        self.settle()
        names = [each.name for each in fields(Traffic)]
        return Traffic(**{name: getattr(self, name) - getattr(earlier, name) for name in names})

    @property
    def fresh_share(self) -> float:
        return self.num_fresh / max(1, self.num_messages)

    @property
    def ratio(self) -> float:
        """Raw bytes per byte on the wire."""
        return self.raw_bytes / max(1, self.payload_bytes)

    @property
    def bits_per_value(self) -> float:
        return self.payload_bytes * 8 / max(1, self.num_values)

    @property
    def relative_error(self) -> float | None:
        """|| value - what the receiver gets || / || value || over the measured messages."""
        self.settle()
        return (self.error_square / self.value_square) ** 0.5 if self.value_square else None


def add_up(traffics: Iterable[Traffic]) -> Traffic:
    """The sum of several channels' counters."""
    parts = list(traffics)
    for part in parts:
        part.settle()
    return Traffic(**{f.name: sum(getattr(part, f.name) for part in parts) for f in fields(Traffic)})
