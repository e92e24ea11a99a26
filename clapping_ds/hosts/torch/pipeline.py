"""torch.distributed.pipelining: training steps with compressed links and lazy sampling, on all of its
schedules: GPipe, 1F1B, looped BFS, interleaved 1F1B, zero-bubble (interleaved and ZBV), DualPipeV.

    -stage = PipelineStage(module, index, num_stages, device)
    +stage = ClappingStage(module, index, num_stages, device)
     schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=loss_fn)
    +pipeline = ClappingPipeline({"clapping": {"strategy": "direct"}}, schedule)
     ...
    -    schedule.step(tokens, target=labels, losses=losses)
    +    pipeline.step(micro_batches, losses=losses)

`schedule.eval`, and `schedule.step` called directly, are torch's own: raw, and no memory changes.

Where another's code makes the stages and calls `schedule.step` with a whole batch, one line does it, with
strategies that replay no samples:

    +pipeline = ClappingPipeline.attach({"clapping": {"strategy": "direct"}}, schedule)
     ...
     schedule.step(tokens, target=labels, losses=losses)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from clapping_ds.config import BLOCK_NAME, ClappingConfig
from clapping_ds.gradients.averaging import KEY
from clapping_ds.hosts.extension import extend
from clapping_ds.hosts.torch.gradients import ReplicaGradients, check
from clapping_ds.hosts.torch.stage import ClappingStage
from clapping_ds.link.groups import get_group_ranks
from clapping_ds.stage.endpoint import ACTIVATIONS_FROM_PREVIOUS, GRADIENTS_FROM_NEXT, End
from clapping_ds.stage.endpoints import Endpoints
from clapping_ds.stage.handshake import (
    Source,
    agree_on_config,
    read_source,
    refuse_tuning,
    refuse_without_links,
)
from clapping_ds.stage.sampling import LazySampler, to_iterator

# What a schedule calls a message: the end that gets it, the stage that has this end, what uses it there.
MESSAGES = {"SEND_F": (ACTIVATIONS_FROM_PREVIOUS, 1, "F"), "SEND_B": (GRADIENTS_FROM_NEXT, -1, "B")}


class MicroBatch(NamedTuple):
    """What a data iterator yields: this, or a plain tuple in the same order."""

    inputs: Any = ()
    """Of the first stage: a tensor, or a tuple of positional arguments."""
    target: Any = None
    """Of the loss: a tensor."""
    kwargs: Mapping[str, Any] = {}
    """Keyword arguments of this rank's stages."""


class ClappingPipeline:
    """Training steps of a schedule with compressed links.

    config     what has the "clapping" block, or the path of its JSON; without one torch's own messages
    schedule   of torch.distributed.pipelining, made of ClappingStages

    Making one is a collective of all ranks. Raises ValueError on every rank for a block that is wrong on
    one, and where blocks or schedules differ.
    """

    def __init__(self, config: Source, schedule: Any) -> None:
        self._start(config, schedule, attaches=False)

    def _start(self, config: Source, schedule: Any, attaches: bool) -> None:
        # Configuration
        self.schedule = schedule
        self.stages: Sequence[ClappingStage] = getattr(schedule, "_stages", None) or [schedule._stage]
        self.num_slots: int = schedule._n_microbatches
        first = self.stages[0]
        facts = _list_facts(schedule, first)
        self.config, self.control = agree_on_config(lambda: read_source(config), facts, first.device)
        _check(self.config, schedule, self.stages)
        if attaches:
            _check_attached(self.config)
        else:
            _check_joined(self.config, schedule)
        self.orders = _order_messages(schedule, first.num_stages, self.num_slots)
        # State
        self.endpoints = Endpoints(
            self.config,
            self.control,
            get_group_ranks(first.group),
            [first.stage_index_to_group_rank[index] for index in range(first.num_stages)],
            first.device,
            most_pending=self.num_slots,  # no send waits: whatever the schedule, it cannot deadlock
        )
        self._sampler_of_stock = LazySampler()
        self.endpoints.announce(next((w.dtype for w in first.submod.parameters()), torch.float32))
        self.gradients = self._compress_gradients()
        """Of the stages, where replicas compress them."""

    @classmethod
    def attach(cls, config: Source, schedule: Any) -> Self:
        """A pipeline of a schedule that was made of torch's own `PipelineStage`s, or of a subclass: from now
        on the messages of `schedule.step`, with whatever arguments, go through channels. `schedule.eval` is
        torch's own. Without an enabled block nothing changes.

        A collective of all ranks. Raises ValueError on every rank as making a `ClappingPipeline` does, and
        for a strategy that replays samples, which needs `ClappingPipeline.step`.
        """
        if "step" in vars(schedule):
            raise ValueError("ClappingPipeline.attach to a schedule that is attached; accepted: once")
        stages = getattr(schedule, "_stages", None) or [schedule._stage]
        own = [type(stage) for stage in stages]
        for stage in stages:
            if isinstance(stage, PipelineStage):
                stage.__class__ = extend(type(stage), ClappingStage)
        is_attached = False
        pipeline = cls.__new__(cls)
        try:
            pipeline._start(config, schedule, attaches=True)
            is_attached = pipeline.config.enabled
        finally:
            for stage, its_own in zip(stages, own, strict=True) if not is_attached else ():
                stage.__class__ = its_own
        if is_attached:
            schedule.step = partial(pipeline._step_attached, schedule.step)
        return pipeline

    def _step_attached(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """step: the schedule's own, which its `eval` calls as well."""
        if not self.schedule._has_backward:
            return step(*args, **kwargs)
        self.endpoints.begin_step(self.num_slots, None)
        self._begin_stages()
        try:
            outputs = step(*args, **kwargs)
        finally:
            self._end_stages()
        self.endpoints.end_step()
        return outputs

    def _compress_gradients(self) -> list[ReplicaGradients]:
        if not self.config.enabled or self.config.data_parallel is None:
            return []
        found = []
        for stage in self.stages:
            assert isinstance(stage.submod, DistributedDataParallel)
            name = f"replicas {stage.stage_index}"
            found.append(ReplicaGradients(stage.submod, self.config, self.control, name=name))
        return found

    def step(self, data_iter: Iterator[Any] | Sequence[Any] | None = None, **options: Any) -> Any:
        """As `schedule.step`, on a batch of micro-batches that are drawn from `data_iter` for fresh slots
        and replayed for the others.

        data_iter   of MicroBatches of one shape; not needed on ranks with neither first nor last stage. Each
                    step may have a list, or an iterator, of its own: what it does not draw (`num_fresh`) is
                    not used later
        options     losses, return_outputs and loss_kwargs of `schedule.step`
        Raises StopIteration on every rank, before anything is computed, if one rank's iterator ends;
        ValueError on every rank if one's micro-batches differ in shape. With `"enabled": false` only the
        rank whose iterator ends raises, as torch's own schedules do.
        """
        has_own_data = isinstance(data_iter, Sequence)
        data_iter = to_iterator(data_iter)
        is_first = any(stage.is_first for stage in self.stages)
        is_last = any(stage.is_last for stage in self.stages)
        if data_iter is None and (is_first or is_last):
            data_iter = iter(())
        self._begin_step(data_iter, has_own_data)
        inputs, target, kwargs = MicroBatch() if data_iter is None else self._batch()
        try:
            outputs = self.schedule.step(
                *(inputs if is_first else ()), target=target if is_last else None, **options, **kwargs
            )
        finally:
            self._end_stages()
        self.endpoints.end_step()
        return outputs

    def _begin_stages(self) -> None:
        endpoints = {endpoint.stage_id: endpoint for endpoint in self.endpoints.stages}
        for stage in self.stages:
            orders = {end: order for (index, end), order in self.orders.items() if index == stage.stage_index}
            stage.begin_step(endpoints[stage.stage_index], orders)

    def _end_stages(self) -> None:
        for stage in self.stages:
            stage.endpoint = None

    def _begin_step(self, data_iter: Iterator[Any] | None, has_own_data: bool) -> None:
        next_batch = None if data_iter is None else lambda: tuple(next(data_iter))
        if not self.config.enabled:
            if next_batch is not None:
                num_kept = self.sampler.num_waiting
                try:
                    self.sampler.draw(self.num_slots, next_batch)
                except StopIteration:
                    if has_own_data:
                        self.sampler.drop_drawn(num_kept)
                    raise
                self.sampler.begin([True] * self.num_slots)
            self.endpoints.fresh = [True] * self.num_slots
            return
        # The rank's first stage holds the batches of all: they have one data iterator.
        of_others = [None] * (len(self.stages) - 1)
        self.endpoints.begin_step(
            self.num_slots, [next_batch, *of_others], needs_one_shape=True, has_own_data=has_own_data
        )
        self._begin_stages()

    def _batch(self) -> MicroBatch:
        """The step's micro-batches as one batch, which the schedule splits again."""
        held = [MicroBatch(*self.sampler.next()) for _ in range(self.num_slots)]
        held = [part._replace(inputs=_to_tuple(part.inputs), kwargs=dict(part.kwargs)) for part in held]
        return tree_map(_join, *held)

    @property
    def sampler(self) -> LazySampler:
        return self.endpoints.stages[0].sampler if self.config.enabled else self._sampler_of_stock

    @property
    def num_fresh(self) -> int:
        """Micro-batches that the next step draws from each data iterator."""
        return self.endpoints.count_fresh(self.num_slots) if self.config.enabled else self.num_slots

    @property
    def num_drawn(self) -> int:
        """Micro-batches that the finished steps took from each data iterator."""
        return self.endpoints.num_drawn

    def report(self) -> list[dict[str, Any]]:
        """A row per channel of each replica, with counters and memory of its sending end; the receiving
        end has the same. Then, with `data_parallel`, a row for each way of each stage's gradients. A
        collective of all ranks."""
        rows = self.endpoints.report()
        for gradients in self.gradients:
            rows += gradients.clapping_report()
        return rows

    def state_dict(self) -> dict[str, Any]:
        """What each rank must save, in a file of its own, between two steps: position, held batches,
        memories. With `checkpoint_memory` false: the position alone."""
        is_held = self.config.enabled and self.config.checkpoint_memory
        return {
            "num_drawn": self.num_drawn,
            "endpoints": self.endpoints.state_dict() if is_held else None,
            "gradients": [gradients.state_dict() for gradients in self.gradients] if is_held else [],
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> str | None:
        """Takes what `state_dict` gave, if every rank has it, from the same configuration; else forgets
        what is held, so that the next step is all fresh, and says why. The data iterator is the caller's:
        `num_drawn` micro-batches were taken from it, which is kept if any rank has it. A collective of all
        ranks."""
        counts = self.control.gather(0 if state is None else state["num_drawn"])
        why = None
        if self.config.enabled:
            held = None if state is None else state.get("endpoints")
            why = self.endpoints.load_state_dict(held, self.num_slots)
        self.endpoints.num_drawn = max(counts)
        held = None if state is None else state.get("gradients")
        for gradients, saved in zip(self.gradients, held or [None] * len(self.gradients), strict=True):
            why = gradients.load_state_dict(saved) or why
        return why


def _list_facts(schedule: Any, stage: ClappingStage) -> dict[str, Any]:
    """What must be the same on every rank."""
    return {
        "schedule": type(schedule).__name__,
        "n_microbatches": schedule._n_microbatches,
        "rank of each stage": dict(stage.stage_index_to_group_rank),
    }


def _check(config: ClappingConfig, schedule: Any, stages: Sequence[ClappingStage]) -> None:
    if not config.enabled:
        return
    refuse_tuning(config, "torch.distributed.pipelining")
    for stage in stages:
        if not isinstance(stage, ClappingStage):
            raise ValueError(f"a schedule of {type(stage).__name__}; accepted: of ClappingStage")
    num_ranks = len(set(stages[0].stage_index_to_group_rank.values()))
    refuse_without_links(config, f"{stages[0].num_stages} stages on {num_ranks} rank", num_ranks)
    for stage in stages if config.data_parallel is not None else ():
        if not isinstance(stage.submod, DistributedDataParallel):
            raise ValueError(
                f"{KEY} with a stage of {type(stage.submod).__name__}; accepted: of a module that is wrapped "
                f"in DistributedDataParallel, or {KEY} = null"
            )
        check(config)
    if config.data_parallel is not None and _splits_backward(schedule):
        raise ValueError(
            f"{KEY} with {type(schedule).__name__}, which computes gradients of weights apart, where "
            f"DistributedDataParallel does not see them; accepted: another schedule, or {KEY} = null"
        )


def _check_joined(config: ClappingConfig, schedule: Any) -> None:
    if config.enabled and (schedule._args_chunk_spec or schedule._kwargs_chunk_spec):
        raise ValueError(
            "a schedule with args_chunk_spec or kwargs_chunk_spec; accepted: neither, as micro-batches are "
            "joined along their first dimension"
        )


def _check_attached(config: ClappingConfig) -> None:
    if config.enabled and config.strategy != "direct":
        raise ValueError(
            f"{BLOCK_NAME}.strategy = {config.strategy!r} with ClappingPipeline.attach, where each step has "
            "a batch of its own and none is replayed; accepted: 'direct', or ClappingPipeline.step in place "
            "of schedule.step"
        )


def _splits_backward(schedule: Any) -> bool:
    plan = getattr(schedule, "pipeline_order_with_comms", None) or {}
    actions = (part for actions in plan.values() for whole in actions for part in _split_action(whole))
    return any(action.computation_type.value == "W" for action in actions)


def _order_messages(schedule: Any, num_stages: int, num_slots: int) -> dict[tuple[int, End], list[int]]:
    """For each stage and receiving end, the micro-batches in the order in which the peer sends them: not
    ascending in the backward passes of ScheduleLoopedBFS, for one."""
    plan = getattr(schedule, "pipeline_order_with_comms", None)
    if plan is None:
        ends = [end for end, _, _ in MESSAGES.values()]
        return {(stage, end): list(range(num_slots)) for stage in range(num_stages) for end in ends}
    planned: dict[tuple[int, str], list[int]] = {}
    for action in (part for actions in plan.values() for whole in actions for part in _split_action(whole)):
        kind = "B" if action.computation_type.value == "I" else action.computation_type.value
        planned.setdefault((action.stage_index, kind), []).append(action.microbatch_index)
    orders = {}
    for (stage, kind), sent in planned.items():
        if kind in MESSAGES:
            end, offset, use = MESSAGES[kind]
            orders[stage + offset, end] = sent
            if sent != planned[stage + offset, use]:
                raise ValueError(
                    f"the schedule sends micro-batches {sent} from stage {stage}, and uses them in the order "
                    f"{planned[stage + offset, use]}; accepted: the same order at both ends"
                )
    return orders


def _split_action(action: Any) -> Sequence[Any]:
    return action.sub_actions or (action,)


def _to_tuple(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _join(first: Any, *others: Any) -> Any:
    """Values of several micro-batches as one of the batch."""
    if isinstance(first, torch.Tensor):
        return torch.cat([first, *others])
    if any(other != first for other in others):
        raise ValueError(
            f"a {type(first).__name__} that differs between micro-batches; accepted: tensors, which are "
            "joined along their first dimension, and what is the same for all"
        )
    return first
