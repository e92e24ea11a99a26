"""Whether compressing gradients saves time here: some steps with and some without say so."""

from statistics import median
from typing import Any, NamedTuple

from clapping_ds.report import format_table

NUM_TRIED = 4
"""Steps of each kind, of which the first, where buffers are made and kernels compiled, does not count."""


class Times(NamedTuple):
    """Of one step, in seconds."""

    exchange_s: float
    step_s: float


class Trial:
    """min_gain: the part of a step's time that compression must save."""

    def __init__(self, min_gain: float) -> None:
        self.min_gain = min_gain
        self.times: dict[bool, list[Times]] = {False: [], True: []}
        """By whether gradients were compressed."""

    @property
    def compresses(self) -> bool:
        """Whether the coming step does. Raw steps come first."""
        return len(self.times[False]) >= NUM_TRIED

    @property
    def is_over(self) -> bool:
        return len(self.times[True]) >= NUM_TRIED

    def end_step(self, exchange_s: float, step_s: float) -> None:
        self.times[self.compresses].append(Times(exchange_s, step_s))

    def summarize(self) -> dict[bool, Times]:
        """Medians."""
        return {
            kind: Times(*(median(column) for column in zip(*times[1:], strict=True)))
            for kind, times in self.times.items()
        }

    def decide(self, told: list[dict[bool, Times]]) -> tuple[bool, str]:
        """Whether to compress, and why. told: what every rank has found; the slowest exchange counts."""
        raw_s, coded_s = (max(found[kind].exchange_s for found in told) for kind in (False, True))
        step_s = max(found[False].step_s for found in told)
        gain = (raw_s - coded_s) / step_s
        is_used = gain > self.min_gain
        row: dict[str, Any] = {
            "exchange of gradients, raw": f"{raw_s * 1e3:.1f} ms",
            "compressed": f"{coded_s * 1e3:.1f} ms",
            "step": f"{step_s * 1e3:.1f} ms",
            "saved": f"{gain:.1%}",
            "min_gain": f"{self.min_gain:.1%}",
            "chosen": "compressed" if is_used else "none",
        }
        return is_used, format_table([row])
