"""The values of each level at each site, and a step of all of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from clapping_ds.bilevel.gossip import Gossip, Mixing, Site, Streams
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
    note: Any = None,
) -> None:
    """One step of all levels. What is known before the directions travels while they are found. Where it
    fails, all is as it was before.

    levels   by site of this process and name
    find     gives the directions times step sizes, of the same
    note     what must be the same at all sites
    """
    sites = [site.state_dict() for site in gossip.sites]
    before = [{name: level.state_dict() for name, level in of_site.items()} for of_site in levels]
    try:
        _advance(gossip, levels, find, note)
    except BaseException:
        gossip.roll_back(sites)
        for of_site, saved in zip(levels, before, strict=True):
            for name, level in of_site.items():
                level.value, level.held = saved[name]["value"], saved[name]["held"]
        raise


def _advance(
    gossip: Gossip,
    levels: Sequence[Mapping[str, Level]],
    find: Callable[[], Sequence[Mapping[str, torch.Tensor]]],
    note: Any,
) -> None:
    runs = [{name: _Step(level.run()) for name, level in of_site.items()} for of_site in levels]
    on_its_way = _start(gossip, runs, note)
    directions = find()
    while True:
        if on_its_way is not None:
            for of_site, mixed in zip(runs, on_its_way.wait(), strict=True):
                _hand_out(of_site, mixed)
        for of_site, direction in zip(runs, directions, strict=True):
            _direct(of_site, direction)
        if all(run.is_done for of_site in runs for run in of_site.values()):
            break
        on_its_way = _start(gossip, runs, note)
    for site, its_levels in zip(gossip.sites, levels, strict=True):
        _check_finite(site, its_levels)


def _check_finite(site: Site, levels: Mapping[str, Level]) -> None:
    for name, level in levels.items():
        if not level.value.isfinite().all():
            raise ArithmeticError(f"{name} of site {site.number} would not be finite after this step")


def _start(gossip: Gossip, runs: Sequence[Mapping[str, "_Step"]], note: Any) -> Mixing | None:
    streams = [
        {f"{name}.{key}": value for name, run in of_site.items() for key, value in run.messages.items()}
        for of_site in runs
    ]
    return gossip.start(streams, note) if any(streams) else None


def check_saved(gossip: Gossip, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises ValueError on every rank where a state was written by something else, or where ranks have states
    of different steps. A collective of all ranks.

    expected   what the state must say under "written by"
    """

    def check() -> None:
        found = saved.get("written by", {})
        for name, mine in expected.items():
            if found.get(name) != mine:
                raise ValueError(f"a state of {name} = {found.get(name)}; accepted: of {mine}")

    gossip.check(check)
    rounds = [site["num_rounds"] for site in saved["gossip"]]
    by_rank = [each for each in gossip.gather((saved["num_steps"], rounds)) if each[1]]
    if len({(steps, *map(int, set(rounds))) for steps, rounds in by_rank}) > 1:
        raise ValueError(f"states after {by_rank} steps and rounds of messages; accepted: of one step")


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


def _direct(runs: Mapping[str, _Step], directions: Mapping[str, torch.Tensor]) -> None:
    """To each level that waits for it, its direction."""
    for name, run in runs.items():
        if run.wants_direction:
            run.answer(directions[name])
