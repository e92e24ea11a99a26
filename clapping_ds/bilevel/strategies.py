"""How sites that talk to neighbours only come to agree on one level's values while they follow their own
directions (SPARKLE, arXiv 2411.14166, table 1).

With mixing matrix W, values s, directions d and step size eta every strategy is

    s+ = C s - eta A d - D        D+ = D + B2 s+        D = 0 at first

    name          A     C     B2          in two steps, e = eta d
    dsgd          W     W     0           s+ = W (s - e)
    extra         I     W     I - W       s+ = W (2 s - s-) - (e - e-)
    ed            W     W     I - W       p+ = s - e;  s+ = W (p+ + s - p)             exact diffusion
    atc-gt        W^2   W^2   (I - W)^2   t = W (t- + e - e-);  s+ = W (s - t)         gradient tracking
    semi-atc-gt   W     W^2   (I - W)^2   t = W t- + e - e-;    s+ = W (s - t)
    gt            I     W^2   (I - W)^2   t = W t- + e - e-;    s+ = W s - t
    local         I     I     0           s+ = s - e                                   never mixed

`x-` is x of the step before. Values start alike at all sites.
"""

from collections.abc import Generator
from typing import Any, ClassVar

import torch
from pydantic import BaseModel

from clapping_ds.bilevel.gossip import Streams
from clapping_ds.codecs.base import STRICT

Run = Generator[Streams | None, Any, torch.Tensor]
"""A step of one site: yields what is to be mixed and gets what that became, or yields None and gets the
direction times the step size. Returns the new values."""
Held = dict[str, torch.Tensor]
"""What a strategy keeps between steps."""


def _dsgd(s: torch.Tensor, held: Held) -> Run:
    e = yield None
    return (yield {"s": s - e})["s"]


def _extra(s: torch.Tensor, held: Held) -> Run:
    """By the sum of what mixing changed, which grows by less and less. W(2 s - s') - (e - e') is the same,
    but rounds s in each step, and these errors add up."""
    mixed = (yield {"s": s})["s"]
    e = yield None
    held["d"] = held["d"] + (s - mixed) if held else torch.zeros_like(s)
    return mixed - e - held["d"]


def _ed(s: torch.Tensor, held: Held) -> Run:
    e = yield None
    p = s - e
    message = p + s - held.get("p", s)
    held["p"] = p
    return (yield {"s": message})["s"]


def _atc_gt(s: torch.Tensor, held: Held) -> Run:
    e = yield None
    t = (yield {"t": held["t"] + e - held["e"] if held else e})["t"]
    held.update(t=t, e=e)
    return (yield {"s": s - t})["s"]


def _semi_atc_gt(s: torch.Tensor, held: Held) -> Run:
    before = (yield {"t": held["t"]})["t"] if held else None
    e = yield None
    t = e if before is None else before + e - held["e"]
    held.update(t=t, e=e)
    return (yield {"s": s - t})["s"]


def _gt(s: torch.Tensor, held: Held) -> Run:
    mixed = yield {"s": s, "t": held["t"]} if held else {"s": s}
    e = yield None
    t = mixed["t"] + e - held["e"] if held else e
    held.update(t=t, e=e)
    return mixed["s"] - t


def _local(s: torch.Tensor, held: Held) -> Run:
    e = yield None
    return s - e


NAMED = {
    "dsgd": _dsgd, "extra": _extra, "ed": _ed, "atc-gt": _atc_gt, "semi-atc-gt": _semi_atc_gt, "gt": _gt,
    "local": _local,
}  # fmt: skip


class General(BaseModel):
    """A strategy by its matrices, each a polynomial in W: (1, -2, 1) is (I - W)^2. A round of messages for
    every power, so that the named ones, where there is one, cost less."""

    model_config = STRICT

    a: tuple[float, ...]
    c: tuple[float, ...]
    b2: tuple[float, ...] = ()

    OF_NAMED: ClassVar[dict[str, dict[str, tuple[float, ...]]]] = {
        "dsgd": {"a": (0, 1), "c": (0, 1)},
        "extra": {"a": (1,), "c": (0, 1), "b2": (1, -1)},
        "ed": {"a": (0, 1), "c": (0, 1), "b2": (1, -1)},
        "atc-gt": {"a": (0, 0, 1), "c": (0, 0, 1), "b2": (1, -2, 1)},
        "semi-atc-gt": {"a": (0, 1), "c": (0, 0, 1), "b2": (1, -2, 1)},
        "gt": {"a": (1,), "c": (0, 0, 1), "b2": (1, -2, 1)},
        "local": {"a": (1,), "c": (1,)},
    }

    @classmethod
    def named(cls, name: str) -> "General":
        return cls(**cls.OF_NAMED[name])

    def run(self, s: torch.Tensor, held: Held) -> Run:
        e = yield None
        powers = max(len(self.a), len(self.c))
        total = torch.zeros_like(s)
        for power in reversed(range(powers)):  # Horner: each round mixes what higher powers are of
            total = total + _at(self.c, power) * s - _at(self.a, power) * e
            if power:
                total = (yield {f"power {power}": total})[f"power {power}"]
        s = total - held["d"] if held else total
        change = torch.zeros_like(s)
        for power in reversed(range(len(self.b2))):
            change = change + self.b2[power] * s
            if power:
                change = (yield {f"dual {power}": change})[f"dual {power}"]
        held["d"] = held["d"] + change if held else change
        return s


def _at(coefficients: tuple[float, ...], power: int) -> float:
    return coefficients[power] if power < len(coefficients) else 0.0
