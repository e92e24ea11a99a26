"""The values of each level at each site, and a step of all of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from clapping_ds.bilevel.gossip import Gossip, Mixing, Streams
from clapping_ds.bilevel.strategies import NAMED, General, Held, Run

Strategy = str | General


class Level:
    """One level's values at one site."""

    def __init__(self, value: torch.Tensor, strategy: Strategy) -> None:
        if isinstance(strategy, str) and strategy not in NAMED:
            raise ValueError(f"strategy {strategy!r}; accepted: {', '.join(NAMED)}, or General matrices")
        # Configuration
        self.strategy = strategy
        # State
        self.value = value
        self.held: Held = {}

    def run(self) -> Run:
        """One step."""
        run = NAMED[self.strategy] if isinstance(self.strategy, str) else self.strategy.run
        self.value = yield from run(self.value, self.held)
        return self.value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "held": dict(self.held)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.value = saved["value"].to(self.value, copy=True)
        self.held = {name: values.to(self.value, copy=True) for name, values in saved["held"].items()}


def advance(
    gossip: Gossip,
    levels: Sequence[Mapping[str, Level]],
    find: Callable[[], Sequence[Mapping[str, torch.Tensor]]],
) -> None:
    """One step of all levels. What is known before the directions travels while they are found.

    levels   by site of this process and name
    find     gives the directions times step sizes, of the same
    """
    runs = [{name: _Step(level.run()) for name, level in of_site.items()} for of_site in levels]
    on_its_way = _start(gossip, runs)
    directions = find()
    while True:
        if on_its_way is not None:
            for of_site, mixed in zip(runs, on_its_way.wait(), strict=True):
                _hand_out(of_site, mixed)
        for of_site, direction in zip(runs, directions, strict=True):
            for name, run in of_site.items():
                if run.wants_direction:
                    run.answer(direction[name])
        if all(run.is_done for of_site in runs for run in of_site.values()):
            return
        on_its_way = _start(gossip, runs)


def _start(gossip: Gossip, runs: Sequence[Mapping[str, "_Step"]]) -> Mixing | None:
    streams = [
        {f"{name}.{key}": value for name, run in of_site.items() for key, value in run.messages.items()}
        for of_site in runs
    ]
    return gossip.start(streams) if any(streams) else None


class _Step:
    """One level's step at one site, under way."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._asks: Streams | None = None
        self.is_done = False
        self._advance(None)

    @property
    def wants_direction(self) -> bool:
        return not self.is_done and self._asks is None

    @property
    def messages(self) -> Streams:
        """To be mixed."""
        return {} if self.is_done or self._asks is None else self._asks

    def answer(self, answer: Any) -> None:
        self._advance(answer)

    def _advance(self, answer: Any) -> None:
        try:
            self._asks = self._run.send(answer)
        except StopIteration:
            self.is_done = True


def _hand_out(runs: Mapping[str, _Step], mixed: Streams) -> None:
    """To each level what its messages became."""
    for name, run in runs.items():
        mine = {key: mixed[f"{name}.{key}"] for key in run.messages}
        if mine:
            run.answer(mine)
