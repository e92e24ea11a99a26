"""torch.distributed.pipelining: a `PipelineStage` whose messages go through channels, and a training step
that samples lazily. For GPipe, 1F1B, interleaved 1F1B, zero-bubble (interleaved and ZBV) and DualPipeV.

    -stage = PipelineStage(module, index, num_stages, device)
    +stage = ClappingStage(module, index, num_stages, device)
     schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=loss_fn)
    +pipeline = ClappingPipeline({"clapping": {"strategy": "fu"}}, schedule)
    ...
    -schedule.step(tokens, target=labels, losses=losses)
    +pipeline.step(micro_batches, losses=losses)
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from clapping_ds import telemetry
from clapping_ds.config import BLOCK_NAME, ClappingConfig
from clapping_ds.engines.stage import SENDING_ENDS, Peer, Stage
from clapping_ds.engines.torch_stage import ClappingStage
from clapping_ds.sampling import LazySampler
from clapping_ds.transport import direction_groups, gather, group_ranks, rank


class MicroBatch(NamedTuple):
    """What a data iterator yields: this tuple, or a plain one of the same order."""

    inputs: Any = ()
    """Of the first stage: a tensor, or a tuple of positional arguments."""
    target: Any = None
    """Of the loss: a tensor."""
    kwargs: Mapping[str, Any] = {}
    """Keyword arguments of the stages of this rank."""


class ClappingPipeline:
    """Training steps of a schedule with compressed links. A collective of all ranks.

    config     a mapping that holds the "clapping" block, such as the parsed JSON
    schedule   of torch.distributed.pipelining, built from ClappingStages

    Raises ValueError on every rank for a wrong block on one, or blocks or schedules that differ.
    """

    def __init__(self, config: Mapping[str, Any], schedule: Any) -> None:
        # Configuration
        self.schedule = schedule
        self.stages: Sequence[ClappingStage] = getattr(schedule, "_stages", None) or [schedule._stage]
        self.num_slots: int = schedule._n_microbatches
        self.config, pipelines = _agreed(config, schedule, self.stages)
        # State
        self.ends = _ends(self.config, self.stages, pipelines) if self.config.enabled else []
        self.sampler = self.ends[0].sampler if self.ends else LazySampler()
        for ends in self.ends:
            for wire in ends.wires.values():
                wire.most_pending = self.num_slots
        if self.ends and rank() == 0:
            dtype = next((weight.dtype for weight in self.stages[0].submod.parameters()), torch.float32)
            print(f"clapping:\n{telemetry.expectation(self.config, dtype)}", flush=True)

    def step(self, data_iter: Iterator[Any] | None = None, **options: Any) -> Any:
        """As `schedule.step` on a batch whose micro-batches are drawn from `data_iter` where their slots
        are fresh, and replayed where they are not.

        data_iter   of MicroBatches of one shape, on the ranks of the first and of the last stage
        options     losses, return_outputs and loss_kwargs of `schedule.step`
        Raises StopIteration on every rank, before anything is computed, if one rank's iterator ends;
        ValueError on every rank if one has micro-batches of another shape than before.
        """
        is_first, is_last = (any(getattr(s, name) for s in self.stages) for name in ("is_first", "is_last"))
        loads_data = data_iter is not None or is_first or is_last
        self._begin(iter(()) if data_iter is None else data_iter, loads_data)
        inputs, target, kwargs = self._batch() if loads_data else MicroBatch()
        try:
            for stage, ends in zip(self.stages, self.ends, strict=False):
                stage.clapping = ends
            outputs = self.schedule.step(
                *(inputs if is_first else ()), target=target if is_last else None, **options, **kwargs
            )
        finally:
            for stage in self.stages:
                stage.clapping = None
        for ends in self.ends:
            ends.end_step()
        return outputs

    def _begin(self, data_iter: Iterator[Any], loads_data: bool) -> None:
        def next_batch() -> tuple[Any, ...]:
            return tuple(next(data_iter))

        if not self.ends and loads_data:
            self.sampler.draw([True] * self.num_slots, next_batch)
            self.sampler.begin(self.num_slots)
        for ends in self.ends:
            draws = loads_data and ends is self.ends[0]
            ends.begin_step(self.num_slots, next_batch if draws else None)
        if self.ends and self.ends[0].shapes_differ:
            raise ValueError(
                f"micro-batches of different shapes in step {self.ends[0].step}; accepted: one shape, the "
                "one that torch.distributed.pipelining allocated its buffers for (DataLoader(drop_last=True))"
            )

    def _batch(self) -> MicroBatch:
        """The held micro-batches as one batch, which the schedule splits again."""
        held = [MicroBatch(*self.sampler.next()) for _ in range(self.num_slots)]
        held = [part._replace(inputs=_listed(part.inputs), kwargs=dict(part.kwargs)) for part in held]
        return tree_map(_joined, *held)

    @property
    def num_drawn(self) -> int:
        """Micro-batches that this rank took from its data iterator."""
        return self.sampler.num_drawn

    def report(self) -> list[dict[str, Any]]:
        """A row per channel of each replica, with counters and memory of its sending end; the receiving
        end has the same. A collective of all ranks."""
        rows = [telemetry.row(ends.channels[end]) for ends in self.ends for end in SENDING_ENDS
                if end in ends.channels]  # fmt: skip
        return [row for rows_of_rank in gather(rows) for row in rows_of_rank]

    def state_dict(self) -> dict[str, Any]:
        """What this rank must save, in a file of its own: held batches, memories, position. Between two
        steps. With `checkpoint_memory` false: nothing."""
        if not self.config.checkpoint_memory:
            return {"stages": []}
        return {"stages": [ends.state_dict() for ends in self.ends]}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Takes what `state_dict` gave. Where a rank has None or nothing, the next step is all fresh.
        The data iterator is the caller's: `num_drawn` micro-batches were taken from it. A collective of
        all ranks."""
        saved = [] if state is None else state["stages"]
        for ends, found in zip(self.ends, saved or [None] * len(self.ends), strict=True):
            ends.load_state_dict(found)


def _agreed(
    config: Mapping[str, Any], schedule: Any, stages: Sequence[ClappingStage]
) -> tuple[ClappingConfig, list[list[int]]]:
    """The configuration that all ranks have, and the global ranks of each replica's pipeline."""
    try:
        found: ClappingConfig | str = _checked(config, schedule, stages)
    except ValueError as error:
        found = str(error)
    plan = (stages[0].num_stages, dict(stages[0].stage_index_to_group_rank), schedule._n_microbatches)
    everyone = gather((found, plan, group_ranks(stages[0].group)))
    for its, _, _ in everyone:
        if isinstance(its, str):
            raise ValueError(its)
    for other, (its, its_plan, _) in enumerate(everyone):
        if (its, its_plan) != everyone[0][:2]:
            raise ValueError(
                f"rank {other} has another {BLOCK_NAME!r} block, or another number of stages, stages per "
                "rank or micro-batches, than rank 0; accepted: the same on every rank"
            )
    pipelines = [ranks for number, (_, _, ranks) in enumerate(everyone) if number == min(ranks)]
    return everyone[0][0], pipelines


def _checked(config: Mapping[str, Any], schedule: Any, stages: Sequence[ClappingStage]) -> ClappingConfig:
    if BLOCK_NAME not in config:
        raise ValueError(
            f'no "{BLOCK_NAME}" block among the keys {sorted(config)}; accepted: a mapping that has one, '
            f'such as {{"{BLOCK_NAME}": {{"enabled": false}}}}'
        )
    checked = ClappingConfig.from_ds_config(config)
    if checked.links is not None or checked.in_flight not in ("auto", 0):
        raise ValueError(
            f"{BLOCK_NAME}.links = {checked.links}, {BLOCK_NAME}.in_flight = {checked.in_flight!r} with "
            "torch.distributed.pipelining, whose schedules set the order of work themselves; accepted: no "
            "links, and in_flight 'auto' or 0"
        )
    for stage in stages:
        if not isinstance(stage, ClappingStage):
            raise ValueError(f"a schedule of {type(stage).__name__}; accepted: of ClappingStage")
    if len(set(stages[0].stage_index_to_group_rank.values())) < 2:
        raise ValueError(f"{stages[0].num_stages} stages on one rank: there is no link to compress")
    if schedule._args_chunk_spec or schedule._kwargs_chunk_spec:
        raise ValueError("a schedule with args_chunk_spec or kwargs_chunk_spec; accepted: none of them")
    _check_order(schedule)
    return checked


def _check_order(schedule: Any) -> None:
    """Channels number messages by counting them, so that micro-batches must go in ascending order. They do
    in all schedules of torch 2.13; schedules from a file may differ."""
    counts: dict[tuple[int, str], int] = {}
    kinds = {"F": "F", "I": "B", "B": "B", "SEND_F": "SEND_F", "SEND_B": "SEND_B"}
    for actions in getattr(schedule, "pipeline_order_with_comms", {}).values():
        for action in (part for whole in actions for part in (whole.sub_actions or (whole,))):
            kind = kinds.get(action.computation_type.value)
            if kind is not None:
                expected = counts.setdefault((action.stage_index, kind), 0)
                counts[action.stage_index, kind] += 1
                if action.microbatch_index != expected:
                    raise ValueError(
                        f"the schedule has {action}, where micro-batch {expected} of stage "
                        f"{action.stage_index} is next; accepted: micro-batches in ascending order"
                    )


def _ends(
    config: ClappingConfig, stages: Sequence[ClappingStage], pipelines: Sequence[Sequence[int]]
) -> list[Stage]:
    """The channel ends of each stage. Each link has process groups of its own, of its two ranks, so that
    messages of two links between the same ranks cannot meet."""
    mapping = stages[0].stage_index_to_group_rank
    mine = next(number for number, ranks in enumerate(pipelines) if rank() in ranks)
    peers: dict[tuple[int, int], Peer] = {}
    for link in range(stages[0].num_stages - 1):
        here, there = mapping[link], mapping[link + 1]
        if here != there:
            groups = direction_groups([(ranks[here], ranks[there]) for ranks in pipelines])
            peers[link, link + 1] = Peer(pipelines[mine][there], *groups)
            peers[link + 1, link] = Peer(pipelines[mine][here], *groups)
    return [
        Stage(config, index, peers.get((index, index - 1)), peers.get((index, index + 1)), stage.device, mine)
        for stage in stages for index in [stage.stage_index]
    ]  # fmt: skip


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
