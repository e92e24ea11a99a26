"""All stages of one rank, whatever the host: what its engine talks to.

A host calls `begin_step`, lets its schedule call `send` and `receive` of the stages, then `end_step`. What
the stages of a rank have in common is here, once: the coin, the position in the data, the votes of all ranks,
the report, and checkpoints that are loaded as a whole or not at all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from secrets import token_hex
from typing import Any

import torch

from clapping_ds import report
from clapping_ds.config import ClappingConfig, LazyConfig
from clapping_ds.link.channel import Channel
from clapping_ds.link.disk import check_folder, measure_disk
from clapping_ds.link.groups import Control, make_peers, rank
from clapping_ds.link.traffic import Traffic, add_up
from clapping_ds.stage.endpoint import Endpoint
from clapping_ds.stage.sampling import Coin

NextBatch = Callable[[], Any]

FORMAT = 4
"""Of a state: another is not read."""
MISSING = "the checkpoint has no state of clapping_ds for every rank"
DIFFERENT = "the checkpoint is of another configuration, number of micro-batches, stages or ranks"


class Endpoints:
    """The stages of this rank, first stage first; none where the block is not enabled. Making it is a
    collective of all ranks.

    control        of all ranks
    ranks          the global ranks of this rank's pipeline
    places         for each stage of the pipeline, which of `ranks` has it. Neighbouring stages of one rank
                   have no link
    device         where the stages compute
    replica        number of this pipeline among its data-parallel replicas; None: counted by first rank.
                   Ranks that hold the same activations (tensor parallelism) must give the same
    most_pending   as `Endpoint`
    """

    def __init__(
        self,
        config: ClappingConfig,
        control: Control,
        ranks: Sequence[int],
        places: Sequence[int],
        device: torch.device,
        replica: int | None = None,
        most_pending: int | None = None,
    ) -> None:
        # Configuration
        self.config = config
        self.control = control
        self.device = device
        told = control.gather((tuple(ranks), token_hex(4)))
        pipelines = sorted({of_rank for of_rank, _ in told}, key=min)
        self.run_id: str = told[0][1]
        """The same on every rank, and another in every run."""
        self.replica = pipelines.index(tuple(ranks)) if replica is None else replica
        self.folder = None if config.memory is None or not config.enabled else config.memory.folder
        """For memories in files."""
        if self.folder is not None:
            control.check(partial(check_folder, self.folder))
        peers = make_peers(pipelines, places if config.enabled else (), device, config.timeout_s)
        self.stages = [
            Endpoint(config, stage_id, peers, device, self.replica, most_pending, control.group)
            for stage_id, place in enumerate(places)
            if config.enabled and ranks[place] == rank()
        ]
        if config.verify:
            control.check_equal({"type of device, with verify": device.type})
        # State
        self.is_lazy = True
        """Whether samples are replayed where the configuration says so: `links` may decide against it."""
        self.coin = self._make_coin()
        self.step = 0
        self.num_drawn = 0
        """Batches that the finished steps took from each data iterator; a resumed run skips as many."""
        self.fresh: list[bool] = []
        """By slot of the last step."""
        self.num_held: dict[int, int] = {}
        """Slots of each of the pool's entries."""
        self.shapes_differ = False
        """Whether some rank's held batches are of more than one shape."""
        self.loss_scale = 1.0
        self._has_room = False
        """Whether disks were found to have room for the pool."""
        self._recent = report.Recent()
        self.depth_is_measured = self.links_are_measured = False
        """Whether `in_flight` and codecs are those that measurements led to."""

    @property
    def sampling(self) -> LazyConfig:
        """That is in force."""
        return self.config.sampling if self.is_lazy else LazyConfig(p_new=1.0)

    def _make_coin(self) -> Coin:
        sampling = self.sampling
        return Coin(sampling.p_new, sampling.refresh, self.config.seed, sampling.pool)

    def set_lazy(self, is_lazy: bool) -> None:
        """Between two steps: whether the configuration's lazy sampling is used; else every sample is new."""
        if is_lazy != self.is_lazy:
            self.is_lazy, self.num_held = is_lazy, {}
            self.coin = self._make_coin()
            for stage in self.stages:
                stage.sampler.forget_held()

    # Steps

    def begin_step(
        self,
        num_slots: int,
        next_batches: Sequence[NextBatch | None] | None,
        measures_error: bool = False,
        needs_one_shape: bool = False,
        has_own_data: bool = False,
    ) -> None:
        """Tosses the coin and draws the new batches. A collective of all ranks when a slot is fresh.

        next_batches      for each stage, returns its data iterator's next batch; None: it reads no data.
                          None: the host has all data, on every rank, and this is no collective
        measures_error    whether the relative error of this step's messages is measured
        needs_one_shape   whether batches of more than one shape are refused
        has_own_data      whether the batches are of this step alone, as a list of them is
        Raises StopIteration on every rank if `next_batch` did on one: no message was sent then, and what was
        drawn is used when the step is tried again, or dropped if it was of this step alone. Raises ValueError
        on every rank for shapes that are refused: what was drawn is dropped.
        """
        fresh = self._toss(num_slots)
        num_kept = [stage.sampler.num_waiting for stage in self.stages]
        draws = list(zip(self.stages, next_batches or [None] * len(self.stages), strict=True))
        found = [stage.draw(sum(fresh), next_batch) for stage, next_batch in draws]
        has_data = all(found)
        if any(fresh) and next_batches is not None:
            is_one_shape = all(len(stage.sampler.list_shapes()) <= 1 for stage in self.stages)
            has_data, is_one_shape = self.control.agree([has_data, is_one_shape])
            self.shapes_differ = not is_one_shape
        if not has_data:
            for stage, number in zip(self.stages, num_kept, strict=True) if has_own_data else ():
                stage.sampler.drop_drawn(number)
            raise StopIteration(
                f"data_iter ended in step {self.step}, which needs {sum(fresh)} new micro-batches on "
                "each rank that loads data; accepted: an iterator that holds them, or that repeats "
                "(deepspeed.utils.RepeatingLoader). Nothing of this step was trained or lost: what an "
                "iterator gave is used when the step is tried again."
            )
        if self.shapes_differ and needs_one_shape:
            for stage in self.stages:
                stage.sampler.drop_drawn()
            self.num_drawn += sum(fresh)
            self.shapes_differ = False
            raise ValueError(
                f"step {self.step}: micro-batches differ in shape, the {sum(fresh)} drawn ones are dropped; "
                "accepted: the shape that the receive buffers were made for in the first step "
                "(DataLoader(drop_last=True))"
            )
        entry = self.coin.pick(self.step)
        self.fresh, self.num_held[entry] = fresh, num_slots
        for stage, next_batch in draws:
            stage.begin_step(self.step, fresh, next_batch is not None, measures_error, entry)

    def count_fresh(self, num_slots: int) -> int:
        """Of the coming step's slots; so many batches are drawn from each data iterator."""
        return sum(self._toss(num_slots))

    def _toss(self, num_slots: int) -> list[bool]:
        """For each slot of the coming step, whether it is fresh."""
        fresh, num_held = (
            self.coin.toss(self.step, num_slots),
            self.num_held.get(self.coin.pick(self.step), 0),
        )
        return [is_fresh or slot >= num_held for slot, is_fresh in enumerate(fresh)]

    def end_step(self) -> None:
        """Waits until the step's last messages have gone. What the step trained counts even if they do not:
        it is in the weights."""
        self.step += 1
        self.num_drawn += sum(self.fresh)
        for stage in self.stages:
            stage.end_step()
        if self.folder is not None and not self._has_room:
            self._check_room(self.folder)
            self._has_room = True

    def _check_room(self, folder: str) -> None:
        """After a step, which tells how large an entry is. Raises ValueError on every rank where a disk lacks
        room for the memories of a whole pool."""
        lacking = sum(channel.count_lacking_bytes(self.sampling.pool) for channel in self.channels)
        place, free = self.control.check(partial(measure_disk, folder))
        told = self.control.gather((place, lacking, free))
        for place in dict.fromkeys(its_place for its_place, _, _ in told):
            mine = [(lacking, free) for its_place, lacking, free in told if its_place == place]
            needed, free = sum(lacking for lacking, _ in mine), min(free for _, free in mine)
            if needed > free:
                raise ValueError(
                    f"clapping.memory.folder = {folder!r} on {place[0]}: {free / 2**30:.3f} GiB are free, a "
                    f"pool of {self.sampling.pool} needs {needed / 2**30:.3f} GiB more; accepted: a folder "
                    "with room for it, or a smaller lazy.pool"
                )

    def rescale_gradients(self, scale: float) -> None:
        """Between two steps: the loss scale of the next one. What is held of gradients follows it."""
        if scale != self.loss_scale:
            for stage in self.stages:
                stage.rescale_gradients(scale / self.loss_scale)
        self.loss_scale = scale

    # Figures

    def announce(self, dtype: torch.dtype) -> None:
        """Prints, on the first rank, what the configuration will cost. dtype: of what the stages send."""
        if self.config.enabled and rank() == 0:
            text = report.describe_cost(self.config.plans, dtype)
            sampling = self.config.sampling
            report.say(text if sampling.p_new == 1 else f"{text}\n{report.describe_sampling(sampling)}")

    @property
    def channels(self) -> Iterator[Channel]:
        return (channel for stage in self.stages for channel in stage.channels.values())

    def traffic(self) -> Traffic:
        """This rank's counters, both directions of its links together. No communication."""
        return add_up(channel.traffic for channel in self.channels)

    def sent(self) -> list[dict[str, Any]]:
        """A row for each channel through which this rank sends, with counters and memory. No
        communication."""
        return [report.make_row(channel) for channel in self._list_sending()]

    def list_recent(self) -> list[dict[str, Any]]:
        """As `sent`, of what was counted since the last call. No communication."""
        return self._recent.list_rows(self._list_sending())

    def _list_sending(self) -> list[Channel]:
        return [stage.channels[end] for stage in self.stages for end in stage.channels if end.sends]

    def report(self) -> list[dict[str, Any]]:
        """The rows of `sent` of all ranks: one per channel and replica; the receiving end has the same. A
        collective of all ranks."""
        return self.control.gather_rows(self.sent())

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What this rank must save, in a file of its own, between two steps: position, held batches,
        memories, codec states, counters and measured links."""
        return {
            "format": FORMAT,
            "written by": self._identify(),
            "step": self.step,
            "num_drawn": self.num_drawn,
            "fresh": self.fresh,
            "num_held": self.num_held,
            "is_lazy": self.is_lazy,
            "shapes_differ": self.shapes_differ,
            "loss_scale": self.loss_scale,
            "in_flight": max((stage.in_flight for stage in self.stages), default=0),
            "depth_is_measured": self.depth_is_measured,
            "links_are_measured": self.links_are_measured,
            "stages": {stage.stage_id: stage.state_dict() for stage in self.stages},
        }

    def load_state_dict(self, state: Mapping[str, Any] | None, num_slots: int | None = None) -> str | None:
        """Takes what `state_dict` gave, if every rank has it, from a configuration that fits; else forgets
        what is held, so that the next step is all fresh, and says why. The position in the data is kept
        either way if this rank has it. A collective of all ranks.

        num_slots   micro-batches of the steps to come; None: any number, of which new ones are fresh
        """
        state = self._checked(state)
        self.num_drawn = 0 if state is None else state["num_drawn"]
        plans = None if state is None or not self._fits(state, num_slots) else self._match_plans(state)
        is_there, fits = self.control.agree([state is not None, plans is not None])
        if state is None or plans is None or not fits:
            self.forget()
            return DIFFERENT if is_there else MISSING
        self.set_lazy(state["is_lazy"])
        self.step, self.fresh, self.shapes_differ = state["step"], state["fresh"], state["shapes_differ"]
        self.loss_scale, self.num_held = state["loss_scale"], dict(state["num_held"])
        for stage, saved in zip(self.stages, plans, strict=True):
            stage.load_state_dict(state["stages"][stage.stage_id], saved)
        self._recent.restart(self._list_sending())
        links_are_read = self.config.links is not None and self.config.links.read is not None
        if not links_are_read:
            self._adopt_measured(state)
        return None

    def _adopt_measured(self, state: Mapping[str, Any]) -> None:
        """What measurements had led to, and this configuration leaves open; what was not measured will be."""
        self.links_are_measured = state["links_are_measured"]
        self.depth_is_measured = self.config.in_flight == "auto" and state["depth_is_measured"]
        for stage in self.stages if self.depth_is_measured else []:
            stage.set_depth(state["in_flight"])

    def forget(self) -> None:
        """Forgets what is held, as `forget_held` does, and what codecs have learned."""
        self.forget_held()
        for stage in self.stages:
            stage.forget_learned()

    def forget_held(self) -> None:
        """Forgets batches and memories: the next step is all fresh, as is every entry of the pool when it
        comes."""
        self.fresh, self.num_held = [], {}
        for stage in self.stages:
            stage.forget_held()

    def _checked(self, state: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """The state, or None if it is of another format or lacks a stage of those that wrote it."""
        if state is None or state.get("format") != FORMAT:
            return None
        return state if list(state["stages"]) == state["written by"]["stages"] else None

    def _fits(self, state: Mapping[str, Any], num_slots: int | None) -> bool:
        links = self.config.links
        may_choose = links is not None and links.read is None
        same_slots = num_slots is None or len(state["fresh"]) == num_slots
        same_sampling = may_choose or state["is_lazy"] == self.is_lazy
        return same_slots and same_sampling and state["written by"] == self._identify()

    def _match_plans(self, state: Mapping[str, Any]) -> list[Any] | None:
        """The plans of each stage's channels; None if one is not allowed here."""
        is_lazy = state["is_lazy"]
        plans = [stage.match_plans(state["stages"][stage.stage_id], is_lazy) for stage in self.stages]
        return None if None in plans else plans

    def _identify(self) -> dict[str, Any]:
        """What a state belongs to: what the block means, however it is spelt."""
        return {
            "plans": {direction: plan.describe() for direction, plan in self.config.plans.items()},
            "sampling": self.config.sampling.model_dump(),
            "seed": self.config.seed,
            "stages": [stage.stage_id for stage in self.stages],
            "replica": self.replica,
        }
