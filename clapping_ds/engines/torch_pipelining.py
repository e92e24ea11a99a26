"""torch.distributed.pipelining: training steps with compressed links and lazy sampling, on all of its
schedules: GPipe, 1F1B, looped BFS, interleaved 1F1B, zero-bubble (interleaved and ZBV), DualPipeV.

    -stage = PipelineStage(module, index, num_stages, device)
    +stage = ClappingStage(module, index, num_stages, device)
     schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=loss_fn)
    +pipeline = ClappingPipeline({"clapping": {"strategy": "fu"}}, schedule)
     ...
    -    schedule.step(tokens, target=labels, losses=losses)
    +    pipeline.step(micro_batches, losses=losses)

`schedule.eval`, and `schedule.step` called directly, are torch's own: raw, and no memory changes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from clapping_ds import telemetry
from clapping_ds.config import BLOCK_NAME, ClappingConfig
from clapping_ds.engines.handshake import agreed_config
from clapping_ds.engines.peers import make_peers
from clapping_ds.engines.stage import (
    ACTIVATIONS_FROM_PREVIOUS,
    GRADIENTS_FROM_NEXT,
    SENDING_ENDS,
    Stage,
)
from clapping_ds.engines.torch_stage import ClappingStage
from clapping_ds.sampling import LazySampler
from clapping_ds.transport import gather, group_ranks, rank

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

    config     a mapping that has the "clapping" block, such as the parsed JSON
    schedule   of torch.distributed.pipelining, made of ClappingStages

    Making one is a collective of all ranks. Raises ValueError on every rank for a block that is missing
    or wrong on one, and where blocks or schedules differ.
    """

    def __init__(self, config: Mapping[str, Any], schedule: Any) -> None:
        # Configuration
        self.schedule = schedule
        self.stages: Sequence[ClappingStage] = getattr(schedule, "_stages", None) or [schedule._stage]
        self.num_slots: int = schedule._n_microbatches
        self.config = agreed_config(config, _facts(schedule, self.stages[0]))
        _check(config, self.config, schedule, self.stages)
        self.orders = _orders(schedule, self.stages[0].num_stages, self.num_slots)
        # State
        self.ends = _ends(self.config, self.stages, self.num_slots) if self.config.enabled else []
        self._all_fresh = LazySampler()
        self._num_drawn = 0
        if self.ends and rank() == 0:
            dtype = next((weight.dtype for weight in self.stages[0].submod.parameters()), torch.float32)
            print(f"clapping:\n{telemetry.expectation(self.config, dtype)}", flush=True)

    def step(self, data_iter: Iterator[Any] | None = None, **options: Any) -> Any:
        """As `schedule.step`, on a batch of micro-batches that are drawn from `data_iter` for fresh slots
        and replayed for the others.

        data_iter   of MicroBatches of one shape; not needed on ranks with neither first nor last stage
        options     losses, return_outputs and loss_kwargs of `schedule.step`
        Raises StopIteration on every rank, before anything is computed, if one rank's iterator ends;
        ValueError on every rank if one's micro-batches differ in shape. With `"enabled": false` only the
        rank whose iterator ends raises, as torch's own schedules do.
        """
        is_first = any(stage.is_first for stage in self.stages)
        is_last = any(stage.is_last for stage in self.stages)
        if data_iter is None and (is_first or is_last):
            data_iter = iter(())
        self._begin_step(data_iter)
        inputs, target, kwargs = MicroBatch() if data_iter is None else self._batch()
        try:
            outputs = self.schedule.step(
                *(inputs if is_first else ()), target=target if is_last else None, **options, **kwargs
            )
        finally:
            for stage in self.stages:
                stage.clapping = None
        for ends in self.ends:
            ends.end_step()
        return outputs

    def _begin_step(self, data_iter: Iterator[Any] | None) -> None:
        next_batch = None if data_iter is None else lambda: tuple(next(data_iter))
        if not self.ends and next_batch is not None:
            self.sampler.draw([True] * self.num_slots, next_batch)
            self.sampler.begin([True] * self.num_slots)
            self._num_drawn += self.num_slots
        for ends in self.ends:
            ends.begin_step(self.num_slots, next_batch if ends is self.ends[0] else None)
        if self.ends and self.ends[0].shapes_differ:
            raise ValueError(
                f"step {self.ends[0].step}: micro-batches differ in shape; accepted: the shape that torch's "
                "receive buffers were made for in the first step (DataLoader(drop_last=True))"
            )
        for stage, ends in zip(self.stages, self.ends, strict=False):
            orders = {end: order for (index, end), order in self.orders.items() if index == stage.stage_index}
            stage.begin_step(ends, orders)

    def _batch(self) -> MicroBatch:
        """The step's micro-batches as one batch, which the schedule splits again."""
        held = [MicroBatch(*self.sampler.next()) for _ in range(self.num_slots)]
        held = [part._replace(inputs=_listed(part.inputs), kwargs=dict(part.kwargs)) for part in held]
        return tree_map(_joined, *held)

    @property
    def sampler(self) -> LazySampler:
        return self.ends[0].sampler if self.ends else self._all_fresh

    @property
    def num_drawn(self) -> int:
        """Micro-batches that the finished steps took from each data iterator."""
        return self.ends[0].num_drawn if self.ends else self._num_drawn

    def report(self) -> list[dict[str, Any]]:
        """A row per channel of each replica, with counters and memory of its sending end; the receiving
        end has the same. A collective of all ranks."""
        rows = [
            telemetry.row(ends.channels[end])
            for ends in self.ends
            for end in SENDING_ENDS
            if end in ends.channels
        ]
        return [row for rows_of_rank in gather(rows) for row in rows_of_rank]

    def state_dict(self) -> dict[str, Any]:
        """What each rank must save, in a file of its own, between two steps: position, held batches,
        memories. With `checkpoint_memory` false: the position alone."""
        stages = [ends.state_dict() for ends in self.ends] if self.config.checkpoint_memory else []
        return {"num_drawn": self.num_drawn, "stages": stages}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> str | None:
        """Takes what `state_dict` gave, if every rank has it, from the same configuration; else forgets
        what is held, so that the next step is all fresh, and says why. The data iterator is the caller's:
        `num_drawn` micro-batches were taken from it, which is kept if any rank has it. A collective of all
        ranks."""
        counts = gather(0 if state is None else state["num_drawn"])
        found = [] if state is None else state["stages"]
        if len(found) != len(self.ends):
            found = [None] * len(self.ends)
        reasons = [
            ends.load_state_dict(saved, self.num_slots) for ends, saved in zip(self.ends, found, strict=True)
        ]
        why = next(filter(None, reasons), None)
        for ends in self.ends if why is not None else []:
            ends.forget()
            ends.step = self.ends[0].step
        self._num_drawn = max(counts)
        for ends in self.ends:
            ends.num_drawn = self._num_drawn
        return why


def _facts(schedule: Any, stage: ClappingStage) -> dict[str, Any]:
    """What must be the same on every rank."""
    return {
        "schedule": type(schedule).__name__,
        "n_microbatches": schedule._n_microbatches,
        "rank of each stage": dict(stage.stage_index_to_group_rank),
    }


def _check(
    block: Mapping[str, Any], config: ClappingConfig, schedule: Any, stages: Sequence[ClappingStage]
) -> None:
    if BLOCK_NAME not in block:
        raise ValueError(
            f'no "{BLOCK_NAME}" among the keys {sorted(block)}; accepted: a mapping with the block, such as '
            f'{{"{BLOCK_NAME}": {{"strategy": "fu"}}}}, or {{"{BLOCK_NAME}": {{"enabled": false}}}}'
        )
    if not config.enabled:
        return
    for key, value in (("in_flight", config.in_flight), ("links", config.links)):
        if value not in ("auto", 0, None):
            raise ValueError(
                f"{BLOCK_NAME}.{key} = {value!r} with torch.distributed.pipelining, whose schedules order "
                f"the work; accepted: {'auto, or 0' if key == 'in_flight' else 'no links'}"
            )
    for stage in stages:
        if not isinstance(stage, ClappingStage):
            raise ValueError(f"a schedule of {type(stage).__name__}; accepted: of ClappingStage")
    if len(set(stages[0].stage_index_to_group_rank.values())) < 2:
        raise ValueError(f"{stages[0].num_stages} stages on one rank; accepted: at least two ranks")
    if schedule._args_chunk_spec or schedule._kwargs_chunk_spec:
        raise ValueError(
            "a schedule with args_chunk_spec or kwargs_chunk_spec; accepted: neither, as micro-batches are "
            "joined along their first dimension"
        )


def _orders(schedule: Any, num_stages: int, num_slots: int) -> dict[tuple[int, str], list[int]]:
    """For each stage and receiving end, the micro-batches in the order in which the peer sends them: not
    ascending in the backward passes of ScheduleLoopedBFS, for one."""
    plan = getattr(schedule, "pipeline_order_with_comms", None)
    if plan is None:
        ends = [end for end, _, _ in MESSAGES.values()]
        return {(stage, end): list(range(num_slots)) for stage in range(num_stages) for end in ends}
    planned: dict[tuple[int, str], list[int]] = {}
    for action in (part for actions in plan.values() for whole in actions for part in _parts(whole)):
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


def _parts(action: Any) -> Sequence[Any]:
    return action.sub_actions or (action,)


def _ends(config: ClappingConfig, stages: Sequence[ClappingStage], num_slots: int) -> list[Stage]:
    """The channel ends of each stage."""
    found = gather(group_ranks(stages[0].group))
    pipelines = [ranks for number, ranks in enumerate(found) if number == min(ranks)]
    replica = next(number for number, ranks in enumerate(pipelines) if rank() in ranks)
    places = [stages[0].stage_index_to_group_rank[index] for index in range(stages[0].num_stages)]
    peers = make_peers(pipelines, places, stages[0].device, config.timeout_s)
    ends = []
    for index, device in ((stage.stage_index, stage.device) for stage in stages):
        ends.append(Stage(config, index, peers, device, replica))
        for wire in ends[-1].wires.values():
            wire.most_pending = num_slots  # no send waits: whatever the schedule, it cannot deadlock
    return ends


def _listed(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _joined(first: Any, *others: Any) -> Any:
    """Values of several micro-batches as one of the batch."""
    if isinstance(first, torch.Tensor):
        return torch.cat([first, *others])
    if any(other != first for other in others):
        raise ValueError(
            f"a {type(first).__name__} that differs between micro-batches; accepted: tensors, which are "
            "joined along their first dimension, and what is the same for all"
        )
    return first
