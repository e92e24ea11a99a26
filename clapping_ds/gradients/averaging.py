"""The gradients of one rank's replicas, whatever the host: what its engine talks to.

In every step a host calls `begin_step`; where `compresses` is true it has `average_` take the place of its
own exchange, else it runs its own, inside `timing`; then `end_step`, with whether the optimizer took the
gradients. What torch's DDP exchanges bucket by bucket it starts with `start`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from clapping_ds import report
from clapping_ds.codecs import Raw
from clapping_ds.codecs.sequence import label
from clapping_ds.config import BLOCK_NAME, ClappingConfig, DataParallelConfig
from clapping_ds.gradients import rules
from clapping_ds.gradients.delay import DelayedExchange
from clapping_ds.gradients.exchange import Exchange, Leg, Round, compare
from clapping_ds.gradients.layout import Cut, Parameter, works_on_matrices
from clapping_ds.gradients.node import NodeExchange
from clapping_ds.gradients.trial import Trial
from clapping_ds.gradients.weights import Masters, WeightExchange
from clapping_ds.link.collective import make_collective
from clapping_ds.link.groups import Control, rank
from clapping_ds.link.seeds import draw_word
from clapping_ds.streams import wait_for_device

KEY = f"{BLOCK_NAME}.data_parallel"
WHAT = "exchange of gradients"
SEED = 0x67726164  # "grad": no link has this number
MISSING = "no state of data_parallel for every rank"
DIFFERENT = "data_parallel, the parameters or the number of replicas are not those of the checkpoint"


class Averaging:
    """Of one rank.

    parameters   of this rank that are trained, in an order that all replicas have
    ranks        the global ranks of this rank's replicas
    cut, joins   as `Exchange`'s
    name         of the link between them, in figures
    Building it is a collective of all ranks. Raises ValueError on every rank, with the same text, where
    replicas differ in their parameters, and for a number of replicas that cannot be.
    """

    def __init__(
        self,
        config: ClappingConfig,
        control: Control,
        parameters: Sequence[Parameter],
        ranks: Sequence[int],
        device: torch.device,
        cut: Cut | None = None,
        joins: bool = True,
        name: str = "replicas",
    ) -> None:
        assert config.data_parallel is not None
        # Configuration
        self.plan: DataParallelConfig = config.data_parallel
        self.control = control
        self.parameters = parameters
        self.device = device
        self.exchange = self._make_exchange(config, ranks, cut, joins)
        self.weights: WeightExchange | None = None
        """Of an optimizer that is split over replicas, where changes of weights are compressed."""
        if self.plan.weights is not None and not isinstance(self.plan.weights, Raw):
            assert cut is not None
            collective, seed = self.exchange.collective, self.exchange.seed
            self.weights = WeightExchange(self.plan, parameters, collective, seed, cut, config.compile)
        for leg in self._legs:
            leg.link = name
        if rank() == 0 and not self.plan.is_raw:
            exchange = self.exchange
            has_gather = not (exchange.is_direct or exchange.is_split)
            report.say(rules.describe(self.plan, exchange.num_replicas, has_gather))
        self.delayed = DelayedExchange(self.exchange, self.plan.delay) if self.plan.delay else None
        # State
        self.step = 0
        self._recent = report.Recent()
        self.is_used = True
        """False: `links` found that it saves nothing."""
        links = config.links
        measures = links is not None and links.read is None and not self.plan.is_raw
        self._trial = Trial(links.min_gain) if measures and links is not None else None
        self.tells_choice: Callable[[bool], None] = lambda is_used: None
        """Called with what `links` found."""
        self._start_s = 0.0
        self._exchange_s = 0.0

    def _make_exchange(
        self, config: ClappingConfig, ranks: Sequence[int], cut: Cut | None, joins: bool
    ) -> Exchange:
        plan = self.plan
        shapes = [(each.name, tuple(each.shape), each.is_tied) for each in self.parameters]
        told = self.control.gather((tuple(ranks), shapes))
        self._check(told, plan, cut is not None)
        sets = sorted({of_rank for of_rank, _ in told}, key=min)
        seed = draw_word(config.seed, SEED, sets.index(tuple(ranks)))
        options = {"joins": joins, "verifies": config.verify, "compiles": config.compile}
        if plan.node_size is None:
            collective = make_collective(sets, self.device, config.timeout_s, WHAT)
            return Exchange(plan, self.parameters, collective, seed, cut, **options)
        size = plan.node_size
        nodes = [of[first : first + size] for of in sets for first in range(0, len(of), size)]
        crossings = [of[place::size] for of in sets for place in range(size)]
        node, others = (
            make_collective(each, self.device, config.timeout_s, WHAT) for each in (nodes, crossings)
        )
        return NodeExchange(plan, self.parameters, node, others, seed, **options)

    def _check(self, told: Sequence[Any], plan: DataParallelConfig, is_split: bool) -> None:
        """told: ranks and parameters of every rank. Raises ValueError alike on every rank."""
        node_size = plan.node_size
        if plan.weights is not None and not is_split:
            raise ValueError(
                f"{KEY}.weights = {label(plan.weights)!r} with an optimizer that is not split over replicas, "
                "which all update all weights; accepted: null"
            )
        for key, codec in (("scatter", plan.scatter), ("gather", plan.gather)):
            if is_split and works_on_matrices(codec):
                raise ValueError(
                    f"{KEY}.{key} = {label(codec)!r} with an optimizer that is split over replicas, which "
                    "cuts parameters anywhere; accepted: a codec or a list without lowrank"
                )
        first_of: dict[tuple[int, ...], int] = {}
        for number, (ranks, shapes) in enumerate(told):
            if len(ranks) < 2:
                raise ValueError(
                    f"{KEY} with 1 replica: there is nothing to exchange; accepted: at least 2 replicas, or "
                    "null"
                )
            if node_size is not None and (len(ranks) % node_size or len(ranks) == node_size):
                raise ValueError(
                    f"{KEY}.node_size = {node_size} with {len(ranks)} replicas; accepted: a divisor of their "
                    "number that leaves at least 2 nodes, or null"
                )
            first = first_of.setdefault(ranks, number)
            differing = [pair for pair in zip(told[first][1], shapes, strict=False) if pair[0] != pair[1]]
            if differing or len(told[first][1]) != len(shapes):
                what = f"{differing[0][0]} and {differing[0][1]}" if differing else "their number"
                raise ValueError(
                    f"{KEY}: ranks {first} and {number} train different parameters: {what}; accepted: the "
                    "same on all replicas"
                )
        if node_size is not None and is_split:
            raise ValueError(
                f"{KEY}.node_size = {node_size} with an optimizer that is split over replicas; accepted: null"
            )

    # Steps

    def begin_step(self, scale: float = 1.0, measures_error: bool = False) -> None:
        """scale: of the losses of this step; what is held of gradients follows it."""
        self.exchange.rescale(scale)
        self.exchange.begin_step(self.step, measures_error)
        self._start_s, self._exchange_s = time.perf_counter(), 0.0

    @property
    def compresses(self) -> bool:
        """Whether this step does."""
        is_due = self._trial.compresses if self._trial is not None else self.is_used
        return is_due and not self.plan.is_raw and self.step >= self.plan.warmup_steps

    def start(self, gradients: Mapping[int, torch.Tensor]) -> Round:
        """As `Exchange.start`. Not with a delay."""
        return self.exchange.start(gradients)

    def average_(self, gradients: Mapping[int, torch.Tensor]) -> None:
        """Replaces this replica's gradients by the mean of all. gradients: by the number of the parameter."""
        with self.timing():
            if self.delayed is not None:
                self.delayed.average_(gradients)
            else:
                self.exchange.start(gradients).finish()

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Around what exchanges gradients, whoever does."""
        if self._trial is None:
            yield
            return
        wait_for_device(self.device)
        start_s = time.perf_counter()
        yield
        wait_for_device(self.device)
        self._exchange_s += time.perf_counter() - start_s

    def end_step(self, accepted: bool = True) -> None:
        """accepted: whether the optimizer used the gradients, and did not skip the step. When all was tried
        that `links` asks for: a collective of all ranks, of which the first says what was chosen."""
        # What is on its way will be used, whatever became of this step.
        self.exchange.end_step(accepted or self.delayed is not None)
        self.step += 1
        if self._trial is not None and self.step > self.plan.warmup_steps:
            self._trial.end_step(self._exchange_s, time.perf_counter() - self._start_s)
            if self._trial.is_over:
                self.is_used, table = self._trial.decide(self.control.gather(self._trial.summarize()))
                self._trial = None
                if not self.is_used:
                    self.exchange.forget()
                self.tells_choice(self.is_used)
                if rank() == 0:
                    report.say(table)

    def share_weights_(self, weights: Sequence[torch.Tensor], masters: Masters) -> None:
        """After the optimizer's step, in place of the host's gathering of weights: as
        `WeightExchange.share_`."""
        assert self.weights is not None
        with self.timing():
            self.weights.share_(weights, masters, self.step)
        if self.exchange.header_nbytes:
            names = [parameter.name for parameter in self.parameters]
            found = dict(zip(names, (weight.detach() for weight in weights), strict=True))
            compare(self.exchange.collective, f"weight after step {self.step}", found)

    # Figures

    @property
    def _legs(self) -> list[Leg]:
        weights = [] if self.weights is None else [self.weights.leg]
        return [*self.exchange.legs.values(), *weights, self.exchange.raw]

    def report(self) -> list[dict[str, Any]]:
        """A row for each way of every rank's gradients. A collective of all ranks."""
        legs = [leg for leg in self._legs if leg.traffic.num_messages]
        return self.control.gather_rows([report.make_row(leg) for leg in legs])

    def list_recent(self) -> list[dict[str, Any]]:
        """A row for each way of this rank's gradients, as since the last call; held_back: what error feedback
        keeps, as a part of the gradient. No communication."""
        legs = {(leg.link, leg.direction): leg for leg in self._legs}
        rows = self._recent.list_rows(self._legs)
        return [{**row, "held_back": legs[row["link"], row["direction"]].held_back} for row in rows]

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Between two steps: what this rank must save, in a file of its own. With a delay a collective of
        the replicas."""
        travelling = None if self.delayed is None else self.delayed.state_dict()
        weights = None if self.weights is None else self.weights.leg.state_dict()
        return {
            "step": self.step,
            "is_used": None if self._trial is not None else self.is_used,
            "exchange": self.exchange.state_dict(),
            "travelling": travelling,
            "weights": weights,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None, step: int | None = None) -> str | None:
        """Takes what `state_dict` gave, if every rank has it and it fits; else forgets what is held, and says
        why. Steps are counted on from the state of any rank, or from `step`. A collective of all ranks."""
        fits = state is not None and state.get("exchange", {}).get("written by") == self.exchange.describe()
        told = self.control.gather((None if state is None else state.get("step"), fits))
        if self.delayed is not None:
            self.delayed.forget()
        if state is None or not all(each for _, each in told):
            self.exchange.forget()
            steps = [known for known, _ in told if known is not None]
            self.step = max(steps, default=self.step if step is None else step)
            return DIFFERENT if len(steps) == len(told) else MISSING
        self.step = state["step"]
        if self.weights is not None and state["weights"] is not None:
            self.weights.leg.load_state_dict(state["weights"], self.device)
        self.exchange.load_state_dict(state["exchange"])
        if self._trial is not None and state["is_used"] is not None:
            self._trial, self.is_used = None, state["is_used"]
        if self.delayed is not None:
            self.delayed.load_state_dict(state["travelling"])
        self._recent.restart(self._legs)
        return None
