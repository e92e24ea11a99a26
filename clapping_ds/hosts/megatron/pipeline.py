"""Megatron-Core: lazily sampled data iterators, and a communicator that talks through channels.

`MegatronPipeline.wrap` takes one of Megatron-Core's `forward_backward_pipelining_*` functions and returns
one that is called in the same way. In training steps it hands the schedule a communicator and iterators of
ours; evaluation (`forward_only`) runs stock. `MegatronPipeline.compress_gradients` does what the block's
`data_parallel` says. Left alone: schedules, model, optimizer, tensor-parallel traffic, the tied embeddings'
all-reduce, and without `data_parallel` all that replicas exchange.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch

from clapping_ds.gradients.averaging import KEY
from clapping_ds.hosts.megatron.checks import Source, agree, check_call, check_first_call, tells_shapes
from clapping_ds.hosts.megatron.chunks import Chunks
from clapping_ds.hosts.megatron.communicator import ClappingCommunicator
from clapping_ds.hosts.megatron.core import (
    ProcessGroupCollection,
    ShardedObject,
    get_model_config,
    get_schedule_table,
)
from clapping_ds.hosts.megatron.gradients import MegatronGradients
from clapping_ds.link.groups import get_group_ranks, get_world_size, rank
from clapping_ds.link.traffic import Traffic
from clapping_ds.stage.endpoint import Endpoint
from clapping_ds.stage.endpoints import Endpoints

GROUPS = ["tp", "cp", "pp", "embd", "pos_embd", "dp", "dp_cp", "tp_dp_cp"]


class LazyIterator:
    """Stands in for a chunk's data iterator in one step: the batches that its sampler holds."""

    def __init__(self, stage: Endpoint) -> None:
        self.stage = stage
        self._num_left = len(stage.fresh)

    def __iter__(self) -> "LazyIterator":
        return self

    def __next__(self) -> Any:
        if self._num_left == 0:
            raise ValueError(
                f"forward_step_func took more than {len(self.stage.fresh)} batches from its data iterator in "
                "a step; accepted: one per micro-batch"
            )
        self._num_left -= 1
        return self.stage.sampler.next()


def find_loss_scale(model_config: Any, device: torch.device) -> float:
    """What the losses of the coming step are multiplied by: with fp16, not 1."""
    scaled = model_config.grad_scale_func
    return 1.0 if scaled is None else float(scaled(torch.ones((), device=device)))


class MegatronPipeline:
    """What one rank keeps between steps: the stages of its model chunks, with memories and held batches.

    config          `{"clapping": {...}}`, or a JSON file with that
    model_config    the model's TransformerConfig
    pg_collection   the process groups; None: parallel_state's
    device          None: the current GPU, or the CPU where there is none
    Building it is a collective of all ranks. Raises ValueError on every rank if one rank's configuration
    is wrong, and where configurations, versions or pipelines differ.
    """

    def __init__(
        self,
        config: Source,
        model_config: Any,
        pg_collection: ProcessGroupCollection | None = None,
        device: torch.device | None = None,
    ) -> None:
        # Configuration
        self.groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(GROUPS)
        if device is None:
            is_gpu = torch.cuda.is_available()
            device = torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")
        self.config, self.control = agree(config, model_config, self.groups.pp.size(), device)
        self.measures_error = False
        """Whether the relative error of messages is measured; costs a pass over each."""
        # State
        self.consumed_samples = 0
        """Samples drawn by all data-parallel replicas: a resumed run's data starts after as many."""
        self.gradients: MegatronGradients | None = None
        """Of this rank's model chunks, once `compress_gradients` was called."""
        self._was_called = False
        self._sizes: tuple[Any, ...] = ()
        ranks, place = get_group_ranks(self.groups.pp), self.groups.pp.rank()
        num_chunks = model_config.virtual_pipeline_model_parallel_size or 1
        dtype, tells = model_config.pipeline_dtype, tells_shapes(model_config)
        self.endpoints = Endpoints(
            self.config,
            self.control,
            ranks,
            [*range(len(ranks))] * num_chunks,
            device,
            replica=self.groups.dp_cp.rank() if self.config.enabled else None,
            # Where each message's shape goes before it nothing is announced ahead, and no send may wait.
            most_pending=sys.maxsize if tells else None,
        )
        self.chunks = Chunks(self.endpoints.stages, place, len(ranks), dtype, tells, self.config.overlap)
        if len(ranks) > 1:
            self.endpoints.announce(dtype)

    @property
    def _compresses_gradients(self) -> bool:
        """Whether the block asks for it."""
        return self.config.enabled and self.config.data_parallel is not None

    def compress_gradients(self, model_chunks: Any, optimizer: Any) -> None:
        """Has replicas exchange gradients as the block's `data_parallel` says; without that, or without an
        enabled block, nothing changes. Before the first training step, and before `load_state_dict`.

        model_chunks   this rank's, as the schedule takes them: Megatron-Core's DistributedDataParallel, or a
                       list of it
        optimizer      Megatron-Core's, of these chunks
        A collective of all ranks. Raises ValueError on every rank, with the same text, for what cannot be
        exchanged, and where replicas differ.
        """
        if self._compresses_gradients:
            chunks = list(model_chunks) if isinstance(model_chunks, list | tuple) else [model_chunks]
            device, stage = self.endpoints.device, self.groups.pp.rank()
            self.gradients = MegatronGradients(chunks, optimizer, self.config, self.control, device, stage)

    def wrap(self, forward_backward: Callable[..., Any]) -> Callable[..., Any]:
        """A schedule with compression: takes and returns what Megatron-Core's own takes and returns.

        With `"enabled": false` it is `forward_backward` itself. Raises StopIteration on every rank, before
        anything is computed, if one rank's iterator ends.
        """
        if not self.config.enabled:
            return forward_backward

        @wraps(forward_backward)
        def run(*, data_iterator: Any, model: Any, forward_only: bool = False, **options: Any) -> Any:
            options["model"] = model
            if forward_only:
                return forward_backward(data_iterator=data_iterator, forward_only=True, **options)
            is_list = isinstance(data_iterator, list)
            communicator, lazy = self.begin_step(
                data_iterator if is_list else [data_iterator],
                get_model_config(model[0] if isinstance(model, list) else model),
                options["num_microbatches"],
                options["micro_batch_size"],
                options,
            )
            if self.groups.pp.size() > 1:
                options["p2p_communicator"] = communicator
            if options.get("pg_collection") is None:
                options["pg_collection"] = self.groups
            data = lazy if is_list else lazy[0]
            result = forward_backward(data_iterator=data, forward_only=False, **options)
            self.end_step()
            return result

        return run

    def begin_step(
        self,
        data_iterators: Sequence[Any],
        model_config: Any,
        num_micro_batches: int,
        micro_batch_size: int,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[ClappingCommunicator, list[LazyIterator | None]]:
        """Before a training step of a schedule that is called by hand: what to pass it as
        `p2p_communicator=` and, a list for interleaved schedules, as `data_iterator=`.

        options   what else the schedule is called with, to be checked
        """
        stages, options = self.endpoints.stages, options or {}
        if not self._was_called:
            facts = {"num_microbatches": num_micro_batches, "micro_batch_size": micro_batch_size}
            lacks = self._compresses_gradients and self.gradients is None
            check_first_call(self.control, data_iterators, len(stages), options, facts, model_config, lacks)
            self._was_called = True
        check_call(data_iterators, len(stages), options)
        sizes = micro_batch_size, options.get("seq_length")
        if sizes != self._sizes and not self.chunks.tells_shapes:
            self.endpoints.forget_held()
        self._sizes = sizes
        loss_scale = find_loss_scale(model_config, self.endpoints.device)
        self.endpoints.rescale_gradients(loss_scale)
        draws = [None if iterator is None else iterator.__next__ for iterator in data_iterators]
        self.endpoints.begin_step(num_micro_batches, draws, self.measures_error)
        if self.gradients is not None:
            self.gradients.begin_step(loss_scale, self.measures_error)
        group_size = model_config.microbatch_group_size_per_vp_stage
        table = get_schedule_table(num_micro_batches, len(stages), group_size)
        self.chunks.begin_step([chunk for _, chunk in table])
        lazy = [
            None if draw is None else LazyIterator(stage) for draw, stage in zip(draws, stages, strict=True)
        ]
        return ClappingCommunicator(self.groups.pp, model_config, self.chunks), lazy

    def num_fresh(self, num_micro_batches: int) -> int:
        """Micro-batches that the next step draws from each data iterator, of which each step may have its
        own."""
        return self.endpoints.count_fresh(num_micro_batches) if self.config.enabled else num_micro_batches

    def end_step(self) -> None:
        """After the schedule. Waits until the step's last messages have gone."""
        self.endpoints.end_step()
        micro_batch_size, _ = self._sizes
        self.consumed_samples += sum(self.endpoints.fresh) * micro_batch_size * self.groups.dp.size()

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What each rank must save, in a file of its own, between two steps: samples, position, held
        batches, memories, what is held of gradients. With `checkpoint_memory` false: samples alone."""
        is_held = self.config.enabled and self.config.checkpoint_memory
        return {
            "consumed_samples": self.consumed_samples,
            "sizes": self._sizes,
            "endpoints": self.endpoints.state_dict() if is_held else None,
            "gradients": self.gradients.state_dict() if is_held and self.gradients is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> str | None:
        """Takes what `state_dict` gave, if every rank has it, from the same configuration; else forgets
        what is held, so that the next step is all fresh, and says why. The count of samples is kept if any
        rank has it. A collective of all ranks. Raises ValueError before `compress_gradients`, where the block
        asks for that."""
        if self._compresses_gradients and self.gradients is None:
            raise ValueError(
                f"load_state_dict with {KEY} before compress_gradients; accepted: compress_gradients first"
            )
        counts = self.control.gather(None if state is None else state["consumed_samples"])
        known = [count for count in counts if count is not None]
        self.consumed_samples = max(known, default=self.consumed_samples)
        self._sizes = () if state is None else state["sizes"]
        if not self.config.enabled:
            return None
        why = self.endpoints.load_state_dict(None if state is None else state.get("endpoints"))
        if self.gradients is not None:
            why = self.gradients.load_state_dict(None if state is None else state.get("gradients")) or why
        return why

    def sharded_state_dict(self, prefix: str = "clapping.") -> dict[str, Any]:
        """`state_dict` for `megatron.core.dist_checkpointing`, by one key: an object per global rank. To be
        left out of what is loaded where the number of ranks is another."""
        key = f"{prefix}state"
        return {key: ShardedObject(key, self.state_dict(), (get_world_size(),), (rank(),))}

    # Figures

    def clapping_traffic(self) -> Traffic:
        """This rank's counters, all its chunks together. No communication."""
        return self.endpoints.traffic()

    def clapping_report(self) -> list[dict[str, Any]]:
        """A row per channel of each pipeline, with counters and memory of its sending end. Then, with
        `data_parallel`, a row for each way of each rank's gradients. A collective of all ranks."""
        rows = self.endpoints.report()
        if self.gradients is not None:
            rows += self.gradients.report()
        return rows

    def clapping_sent(self) -> list[dict[str, Any]]:
        """As `clapping_report`, of the channels through which this rank sends. No communication."""
        return self.endpoints.sent()
