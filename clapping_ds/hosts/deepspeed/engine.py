"""DeepSpeed: a `PipelineEngine` whose stages talk through channels, and which samples lazily.

Of the engine below, stock or a subclass of somebody's own, these are replaced while a training step's
schedule is executed: the schedule, the four instructions that send and receive, and `_next_batch`. Forward
and backward are watched in the first steps. Left alone: `train_batch`, optimizer, loss, `eval_batch`, tied
weights, data-parallel reduction, checkpoints.

`_INSTRUCTION_MAP` holds function objects, so overriding the `_exec_*` methods would do nothing. During a
training step the engine has a map with ours over what the map has then; an engine without an enabled
`"clapping"` block runs stock.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import (
    PIPE_RECV_GRAD_TIMER,
    PIPE_RECV_INPUT_TIMER,
    PIPE_SEND_GRAD_TIMER,
    PIPE_SEND_OUTPUT_TIMER,
    TRAIN_BATCH_TIMER,
    PipelineEngine,
)
from deepspeed.runtime.utils import clip_grad_norm_

from clapping_ds import report
from clapping_ds.autotune.depth import find_leads
from clapping_ds.autotune.tuning import Tuning
from clapping_ds.config import BLOCK_NAME, ClappingConfig
from clapping_ds.hosts.deepspeed.checkpoint import CheckpointingEngine
from clapping_ds.hosts.deepspeed.gradients import Gradients
from clapping_ds.hosts.deepspeed.schedule import InFlightSchedule
from clapping_ds.hosts.deepspeed.shapes import Shapes, make_contiguous, to_tuple
from clapping_ds.link.groups import Control, get_group_ranks
from clapping_ds.link.message import Spec
from clapping_ds.link.traffic import Traffic
from clapping_ds.stage.endpoint import (
    ACTIVATIONS_FROM_PREVIOUS,
    ACTIVATIONS_TO_NEXT,
    GRADIENTS_FROM_NEXT,
    GRADIENTS_TO_PREVIOUS,
    End,
)
from clapping_ds.stage.endpoints import Endpoints
from clapping_ds.stage.handshake import agree_on_config, refuse_without_links
from clapping_ds.stage.sampling import to_iterator


class ClappingPipelineEngine(CheckpointingEngine):
    """What `deepspeed.initialize` makes of a `PipelineModule` once `enable` was called.

    Without an enabled `"clapping"` block it is the stock engine.
    """

    _is_training_step = False
    _has_own_data = False
    """Whether the data iterator is of one step alone, as a list is."""
    _INSTRUCTION_MAP: Mapping[type, Any]
    _theirs: Mapping[type, Any]
    """The instruction map that a step began with."""

    def __init__(self, has_bool_tensors: bool = False, *args: Any, **kwargs: Any) -> None:
        ds_config, model = kwargs["config_class"], kwargs["model"]
        self.clapping, self._control = agree_on_engine(
            lambda: ds_config._param_dict, ds_config, model.num_stages, _find_device()
        )
        super().__init__(has_bool_tensors, *args, **kwargs)
        if self.clapping.enabled:
            self._start_clapping()

    def _start_clapping(self) -> None:
        if self.is_pipe_partitioned or self.is_grad_partitioned:
            raise ValueError(
                "pipeline.pipe_partitioned = pipeline.grad_partitioned = true (the default with tensor "
                f'parallelism) together with a "{BLOCK_NAME}" block: accepted: both false'
            )
        if self.clapping.in_flight != "auto" and self.clapping.in_flight > self.micro_batches:
            raise ValueError(
                f"{BLOCK_NAME}.in_flight = {self.clapping.in_flight}: accepted: 'auto', or 0 to "
                f"{self.micro_batches}, the number of micro-batches (gradient_accumulation_steps)"
            )
        ranks = get_group_ranks(self.grid.get_pipe_parallel_group())
        replica = self.grid.get_data_parallel_id()
        self._endpoints = Endpoints(
            self.clapping, self._control, ranks, range(self.num_stages), self.device, replica
        )
        (self._endpoint,) = self._endpoints.stages
        self._tuning = Tuning(self._endpoints, self.num_stages)
        self._gradients = Gradients(self) if self.clapping.data_parallel is not None else None
        if self._gradients is not None:
            averaging, known = self._gradients.averaging, self._tuning.decision
            averaging.tells_choice = self._tuning.note_replicas
            averaging.is_used = known is None or known.compresses_replicas is not False
            if not averaging.is_used and self.global_rank == 0:
                report.say("links.read: compressing gradients of replicas saved nothing, and is off")
        interval = self.steps_per_print() if self.monitor.enabled else None
        self._event_interval: int | None = self._control.gather(interval)[0]
        self._shapes = Shapes(self)
        if self.num_stages > 1:
            self._endpoints.announce(self._find_sent_dtype())

    def _find_sent_dtype(self) -> torch.dtype:
        """Of what this stage's layers pass on: that of their weights."""
        if self.fp16_enabled():
            return torch.float16
        if self.bfloat16_enabled():
            return torch.bfloat16
        weights = (weight.dtype for weight in self.module.parameters() if weight.is_floating_point())
        return next(weights, torch.float32)

    def _needs_stock_order(self) -> bool:
        """Sends that block need it; and on NCCL messages whose shapes are told each time, as these cannot be
        announced ahead: neighbours that send to each other, and wait for their GPUs, would wait for ever."""
        return not self.clapping.overlap or (self._endpoint.queues and self._shapes.are_told_each_time())

    def _find_leads(self) -> dict[End, int]:
        """As `Endpoint.leads`, of a step in our order."""
        if self._needs_stock_order():
            return {}
        sizes = self.micro_batches, self.num_stages, self.stage_id, self._endpoint.in_flight
        return find_leads(*sizes)

    # Steps

    def set_dataiterator(self, iterator: Iterator[Any] | Sequence[Any] | None) -> None:
        """As `PipelineEngine.set_dataiterator`, for `train_batch(data_iter)`, which draws from it only for
        fresh slots. Each step may have a list, or an iterator, of its own: what it does not draw
        (`clapping_num_fresh`) is not used later."""
        self._has_own_data = isinstance(iterator, Sequence)
        super().set_dataiterator(to_iterator(iterator))

    def _exec_schedule(self, pipe_schedule: schedule.PipeSchedule) -> None:
        """What `train_batch` and `eval_batch` call, each for its own kind of schedule.

        Raises StopIteration on every rank, before anything is computed, if one rank's iterator ends in a
        training step.
        """
        if not self.clapping.enabled:
            return super()._exec_schedule(pipe_schedule)
        is_training = isinstance(pipe_schedule, schedule.TrainSchedule) or self.module.training
        if isinstance(pipe_schedule, schedule.InferenceSchedule) or not is_training:
            with self._instructed(self._EVALUATION):
                return super()._exec_schedule(pipe_schedule)
        writes_events = _is_due(self._event_interval, self._endpoints.step + 1)
        reports = writes_events or _is_due(self.steps_per_print(), self.global_steps + 1)
        try:
            _check_step(pipe_schedule, self._INSTRUCTION_MAP, self.micro_batches)
            self._begin_step(reports)
        except (ValueError, StopIteration):
            self.timers(TRAIN_BATCH_TIMER).started_ = False  # so that the step can be tried again
            raise
        if not self._needs_stock_order():
            sizes = self.micro_batches, self.num_stages, self.stage_id
            pipe_schedule = InFlightSchedule(*sizes, self._endpoint.in_flight)
        self._is_training_step = True
        try:
            with self._instructed(self._TRAINING):
                super()._exec_schedule(pipe_schedule)
        finally:
            self._is_training_step = self._has_own_data = False
        self._end_step(writes_events)

    @contextmanager
    def _instructed(self, instructions: Mapping[type, Any]) -> Iterator[None]:
        """Within: these, in place of those that the engine's map has for the same."""
        held = self.__dict__.pop("_INSTRUCTION_MAP", None)  # of the engine alone; else its class has one
        self._theirs = held or self._INSTRUCTION_MAP
        self._INSTRUCTION_MAP = {**self._theirs, **instructions}
        try:
            yield
        finally:
            self.__dict__.pop("_INSTRUCTION_MAP")
            if held is not None:
                self._INSTRUCTION_MAP = held

    def _begin_step(self, reports: bool) -> None:
        loss_scale = self._loss_scale()
        self._endpoints.rescale_gradients(loss_scale)
        if self._gradients is not None:
            self._gradients.averaging.begin_step(loss_scale, reports)
        next_batch = super()._next_batch if self.is_first_stage() or self.is_last_stage() else None
        self._endpoints.begin_step(self.micro_batches, [next_batch], reports, has_own_data=self._has_own_data)
        self._endpoint.leads = self._find_leads()
        self._look_ahead()

    def _end_step(self, writes_events: bool) -> None:
        self._endpoints.end_step()
        if self._gradients is not None:
            self._gradients.end_step()
        self._tuning.end_step(self.micro_batches)
        if writes_events:
            self._write_events()
        decided = self._tuning.settle(self.micro_batches, get_accelerator().available_memory())
        if decided is not None and self.global_rank == 0:
            report.say(decided)

    def _write_events(self) -> None:
        """Of all links, since the last time. A collective of all ranks."""
        mine = self._endpoints.list_recent()
        if self._gradients is not None:
            mine += self._gradients.averaging.list_recent()
        rows = self._control.gather_rows(mine)
        if self.global_rank == 0:
            self.monitor.write_events(report.make_events(rows, self.global_samples))

    def _loss_scale(self) -> float:
        """What the engine will multiply the losses of the coming step by: with fp16 and ZeRO, not 1."""
        if not (self.fp16_enabled() and isinstance(self.optimizer, ZeROOptimizer)):
            return 1.0
        loss = torch.ones((), device="cpu", requires_grad=True).clone()  # nothing to wait for
        return float(self.optimizer.scale_if_loss(loss))

    def _next_batch(self) -> Any:
        return self._endpoint.sampler.next() if self._is_training_step else super()._next_batch()

    @property
    def clapping_num_fresh(self) -> int:
        """Batches that the next `train_batch` draws from each data iterator."""
        return (
            self._endpoints.count_fresh(self.micro_batches) if self.clapping.enabled else self.micro_batches
        )

    def clapping_traffic(self) -> Traffic:
        """This rank's counters, both directions of its links together. No communication."""
        return self._endpoints.traffic()

    def clapping_report(self) -> list[dict[str, Any]]:
        """A row per channel of each replica, with counters and memory of its sending end; the receiving
        end has the same. Then, with `data_parallel`, a row for each way of each rank's gradients. A
        collective of all ranks."""
        rows = self._endpoints.report()
        if self._gradients is not None:
            rows += self._gradients.averaging.report()
        return rows

    # Instructions

    def _send_whole(self, buffer_id: int) -> None:
        """In evaluation. No backend of torch.distributed takes a tensor with gaps."""
        outputs = self.pipe_buffers["outputs"]
        outputs[buffer_id] = make_contiguous(outputs[buffer_id])
        self._theirs[schedule.SendActivation](self, buffer_id)

    def _send_activations(self, buffer_id: int) -> None:
        with self._timed(PIPE_SEND_OUTPUT_TIMER):
            outputs = self.pipe_buffers["outputs"][buffer_id]
            if self.has_attention_mask or self.has_bool_tensors:
                outputs = (*outputs[:-1], outputs[-1].bool())
            self._shapes.tell(outputs)
            self._send(ACTIVATIONS_TO_NEXT, to_tuple(outputs))
            self._look_ahead()

    def _send(self, end: End, values: Sequence[torch.Tensor]) -> None:
        self._endpoint.send(end, values)
        if not self.clapping.overlap:
            self._endpoint.wait_for_sends()

    def _receive_activations(self, buffer_id: int) -> None:
        with self._timed(PIPE_RECV_INPUT_TIMER):
            specs = self._shapes.hear()
            looks_ahead = not self._shapes.are_told_each_time()
            values = self._endpoint.receive(ACTIVATIONS_FROM_PREVIOUS, specs, looks_ahead)
            for value in values:
                value.requires_grad = value.is_floating_point()
            self.pipe_buffers["inputs"][buffer_id] = (
                tuple(values) if self._shapes.receives_tuple else values[0]
            )

    def _send_gradients(self, buffer_id: int) -> None:
        with self._timed(PIPE_SEND_GRAD_TIMER):
            inputs = [x for x in to_tuple(self.pipe_buffers["inputs"][buffer_id]) if x.is_floating_point()]
            gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
            self._send(GRADIENTS_TO_PREVIOUS, gradients)
            self.pipe_buffers["inputs"][buffer_id] = None

    def _receive_gradients(self, buffer_id: int) -> None:
        with self._timed(PIPE_RECV_GRAD_TIMER):
            outputs = [x for x in to_tuple(self.pipe_buffers["outputs"][buffer_id]) if x.is_floating_point()]
            looks_ahead = not self._shapes.are_told_each_time()
            specs = [Spec.of(output) for output in outputs]
            gradients = self._endpoint.receive(GRADIENTS_FROM_NEXT, specs, looks_ahead)
            pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
            self.pipe_buffers["outputs"][buffer_id] = tuple(output for output, _ in pairs)
            self.grad_layer = tuple(gradient for _, gradient in pairs)

    def _forward_pass(self, buffer_id: int) -> None:
        with self._tuning.watching(self.module.parameters()):
            self._theirs[schedule.ForwardPass](self, buffer_id)

    def _backward_pass(self, buffer_id: int) -> None:
        if not (self.is_last_stage() or self.grad_layer):
            return  # frozen layers after frozen layers: nothing wants a gradient
        with self._tuning.watching():
            self._theirs[schedule.BackwardPass](self, buffer_id)

    def _reduce_tied_grads(self) -> None:
        """The first of what follows a step's messages, and may wait for the device."""
        self._endpoint.wait_for_arrivals()
        num_used = self._endpoint.sampler.num_used
        if (self.is_first_stage() or self.is_last_stage()) and num_used != self.micro_batches:
            raise ValueError(
                f"a training step that took {num_used} of {self.micro_batches} micro-batches from "
                "_next_batch; accepted: an engine whose LoadMicroBatch takes them there"
            )
        self._theirs[schedule.ReduceTiedGrads](self)

    def _take_model_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.clapping.enabled and not self._is_training_step:
            raise ValueError(
                "an optimizer step outside of a training schedule, whose messages went past the channels; "
                "accepted: a train_batch that calls _exec_schedule with a TrainSchedule"
            )
        return super()._take_model_step(*args, **kwargs)

    def _reduce_grads(self) -> None:
        if self._gradients is None:
            return self._theirs[schedule.ReduceGrads](self)
        if not self._gradients.averaging.compresses:
            with self._gradients.averaging.timing():
                return self._theirs[schedule.ReduceGrads](self)
        self._gradients.average_()
        with self._gradients.exchanged():
            self._theirs[schedule.ReduceGrads](self)

    def _reduce_non_expert_gradients(self, grads: Any, elements_per_buffer: int) -> None:
        if not (self.clapping.enabled and self._gradients is not None and self._gradients.is_averaged):
            super()._reduce_non_expert_gradients(grads, elements_per_buffer)

    def clip_fp32_gradients(self) -> None:
        """As in stock, which crashes where a stage has no gradient; the other stages wait for its norm."""
        if any(parameter.grad is not None for parameter in self.module.parameters()):
            return super().clip_fp32_gradients()
        nothing = torch.zeros(1, device=self.device, requires_grad=True)
        nothing.grad = torch.zeros_like(nothing)
        clip_grad_norm_([nothing], self.gradient_clipping(), mpu=self.mpu)

    def reset_activation_shape(self) -> None:
        super().reset_activation_shape()
        if self.clapping.enabled:
            self._shapes.forget()

    def _look_ahead(self) -> None:
        """Tells what shapes the step's messages will have, as far as that is known."""
        known = {
            ACTIVATIONS_FROM_PREVIOUS: self._shapes.known(self._shapes.received),
            GRADIENTS_FROM_NEXT: _floating(self._shapes.known(self._shapes.sent)),
        }
        for end, specs in known.items():
            if specs and end in self._endpoint.channels:
                self._endpoint.look_ahead(end, specs)

    @contextmanager
    def _timed(self, timer: str) -> Iterator[None]:
        if not self.wall_clock_breakdown():
            yield
            return
        self.timers(timer).start()
        yield
        self.timers(timer).stop()

    _TRAINING: ClassVar[Mapping[type, Any]] = {
        schedule.SendActivation: _send_activations,
        schedule.RecvActivation: _receive_activations,
        schedule.SendGrad: _send_gradients,
        schedule.RecvGrad: _receive_gradients,
        schedule.ForwardPass: _forward_pass,
        schedule.BackwardPass: _backward_pass,
        schedule.ReduceTiedGrads: _reduce_tied_grads,
        schedule.ReduceGrads: _reduce_grads,
    }
    _EVALUATION: ClassVar[Mapping[type, Any]] = {schedule.SendActivation: _send_whole}


MESSAGES = (schedule.SendActivation, schedule.RecvActivation, schedule.SendGrad, schedule.RecvGrad)
STOCK = dict(PipelineEngine._INSTRUCTION_MAP)
"""As it was when this module was imported."""


def _check_step(
    pipe_schedule: schedule.PipeSchedule, instructions: Mapping[type, Any], num_micro_batches: int
) -> None:
    """Raises ValueError where an engine of somebody else's sends what channels cannot."""
    if type(pipe_schedule) is not schedule.TrainSchedule:
        raise ValueError(
            f"a training step with the schedule {type(pipe_schedule).__name__}; accepted: TrainSchedule, "
            f'which sends one message for each micro-batch, or "{BLOCK_NAME}": {{"enabled": false}}'
        )
    if pipe_schedule.micro_batches != num_micro_batches:
        raise ValueError(
            f"a training step of {pipe_schedule.micro_batches} micro-batches where the engine has "
            f"{num_micro_batches} (gradient_accumulation_steps); accepted: the same"
        )
    for kind in MESSAGES:
        if instructions[kind] is not STOCK[kind]:
            own = getattr(instructions[kind], "__qualname__", instructions[kind])
            raise ValueError(
                f"an engine whose {kind.__name__} is {own}; accepted: that of DeepSpeed, in whose place "
                f'channels are, or "{BLOCK_NAME}": {{"enabled": false}}'
            )


def agree_on_engine(
    read: Callable[[], Mapping[str, Any]], ds_config: Any, num_stages: int, device: torch.device
) -> tuple[ClappingConfig, Control]:
    """`agree_on_config` for an engine. read: returns what has the block. A collective of all ranks."""
    facts = {
        "number of stages": num_stages,
        "gradient_accumulation_steps": ds_config.gradient_accumulation_steps,
        "train_micro_batch_size_per_gpu": ds_config.train_micro_batch_size_per_gpu,
    }
    config, control = agree_on_config(read, facts, device)
    refuse_without_links(config, f"PipelineModule(num_stages={num_stages})", num_stages)
    return config, control


def _is_due(interval: int | None, step: int) -> bool:
    return step % interval == 0 if interval else False


def _find_device() -> torch.device:
    """Where the stock engine will compute."""
    return torch.device(get_accelerator().device_name(int(os.environ.get("LOCAL_RANK", 0))))


def _floating(specs: Iterable[Spec]) -> list[Spec]:
    return [spec for spec in specs if spec.dtype.is_floating_point]
