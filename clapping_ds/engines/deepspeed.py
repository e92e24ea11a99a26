"""DeepSpeed: a `PipelineEngine` whose stages talk through channels, and which samples lazily.

Of the stock engine these are replaced, in training steps only: the schedule, the four instructions that
send and receive, and `_next_batch`. Forward and backward are watched in the first steps. Left alone:
optimizer, loss, `eval_batch`, tied weights, data-parallel reduction, checkpoints.

`_INSTRUCTION_MAP` holds function objects, so overriding the `_exec_*` methods would do nothing. An
engine with an enabled `"clapping"` block gets a map of its own; every other engine runs stock.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import (
    PIPE_RECV_GRAD_TIMER,
    PIPE_RECV_INPUT_TIMER,
    PIPE_SEND_GRAD_TIMER,
    PIPE_SEND_OUTPUT_TIMER,
    PipelineEngine,
)
from deepspeed.runtime.pipe.module import PipelineModule

from clapping_ds import telemetry
from clapping_ds.channel import Spec
from clapping_ds.config import BLOCK_NAME, ClappingConfig
from clapping_ds.engines.deepspeed_schedule import InFlightSchedule
from clapping_ds.engines.stage import (
    ACTIVATIONS_FROM_PREVIOUS,
    ACTIVATIONS_TO_NEXT,
    GRADIENTS_FROM_NEXT,
    GRADIENTS_TO_PREVIOUS,
    SENDING_ENDS,
    Peer,
    Stage,
)
from clapping_ds.engines.tuning import Tuning
from clapping_ds.transport import direction_groups, gather

Tensors = torch.Tensor | tuple[torch.Tensor, ...]


class ClappingPipelineEngine(PipelineEngine):
    """What `deepspeed.initialize` makes of a `PipelineModule` once `enable` was called.

    Without an enabled `"clapping"` block it is the stock engine.
    """

    def __init__(self, has_bool_tensors: bool = False, *args: Any, **kwargs: Any) -> None:
        self.clapping = ClappingConfig.from_ds_config(kwargs["config_class"]._param_dict)
        if self.clapping.enabled:
            _check_num_stages(kwargs["model"])
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
        self._INSTRUCTION_MAP = {
            **PipelineEngine._INSTRUCTION_MAP,
            schedule.SendActivation: ClappingPipelineEngine._send_activations,
            schedule.RecvActivation: ClappingPipelineEngine._receive_activations,
            schedule.SendGrad: ClappingPipelineEngine._send_gradients,
            schedule.RecvGrad: ClappingPipelineEngine._receive_gradients,
            schedule.ForwardPass: ClappingPipelineEngine._forward_pass,
            schedule.BackwardPass: ClappingPipelineEngine._backward_pass,
        }
        groups = direction_groups(self.grid.topology().get_axis_comm_lists("pipe"))
        self._stage = Stage(
            self.clapping,
            self.stage_id,
            None if self.is_first_stage() else Peer(self.grid.stage_to_global(self.prev_stage), *groups),
            None if self.is_last_stage() else Peer(self.grid.stage_to_global(self.next_stage), *groups),
            self.device,
            self.grid.get_data_parallel_id(),
        )
        self._tuning = Tuning(self._stage, self.num_stages)
        self._sent_specs: list[Spec] | None = None
        self._received_specs: list[Spec] | None = None
        self._receives_tuple = False
        dtype = self.communication_data_type or torch.float32
        self._say(telemetry.expectation(self.clapping, dtype))

    def _say(self, text: str | None) -> None:
        """Prints, on one rank: DeepSpeed's logger hides all below a warning."""
        if text is not None and self.global_rank == 0:
            print(f"clapping:\n{text}", flush=True)

    def _train_schedule(self) -> schedule.PipeSchedule:
        """The order of a training step, for `PipelineEngine.train_batch`. Sends that block need stock's."""
        if not (self.clapping.enabled and self.clapping.overlap):
            return super()._train_schedule()
        return InFlightSchedule(self.micro_batches, self.num_stages, self.stage_id, self._stage.in_flight)

    # Steps

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> torch.Tensor:
        """As `PipelineEngine.train_batch`. Draws from `data_iter` only for fresh slots.

        Raises StopIteration on every rank, before anything is computed, if one rank's iterator ends.
        """
        if not self.clapping.enabled:
            return super().train_batch(data_iter)
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        loads_data = self.is_first_stage() or self.is_last_stage()
        reports = bool(self.steps_per_print()) and (self.global_steps + 1) % self.steps_per_print() == 0
        self._say(self._tuning.settle(self.micro_batches, get_accelerator().available_memory()))
        self._stage.begin_step(self.micro_batches, super()._next_batch if loads_data else None, reports)
        self._expect_known_shapes()
        loss = super().train_batch()
        self._stage.end_step()
        self._tuning.end_step(self.micro_batches)
        if reports and self.monitor.enabled and self.global_rank == 0:
            self.monitor.write_events(telemetry.events(self._stage.channels.values(), self.global_samples))
        return loss

    def _next_batch(self) -> Any:
        if not (self.clapping.enabled and self.module.training):
            return super()._next_batch()
        return self._stage.sampler.next()

    def clapping_traffic(self) -> telemetry.Traffic:
        """This rank's counters, both directions of its links together. No communication."""
        return telemetry.total(channel.traffic for channel in self._stage.channels.values())

    def clapping_report(self) -> list[dict[str, Any]]:
        """A row per channel of each replica, with counters and memory of its sending end; the receiving
        end has the same. A collective of all ranks."""
        channels = self._stage.channels
        rows = [telemetry.row(channels[end]) for end in SENDING_ENDS if end in channels]
        return [row for rows_of_rank in gather(rows) for row in rows_of_rank]

    # Checkpoints

    def save_checkpoint(self, save_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `DeepSpeedEngine.save_checkpoint`. Before it, each rank writes its own state into the same
        folder, so that a checkpoint that `latest` names has it."""
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        if self.clapping.enabled and self.clapping.checkpoint_memory:
            folder = Path(save_dir) / tag
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self._stage.state_dict(), folder / self._state_file)
        return super().save_checkpoint(save_dir, tag, *args, **kwargs)

    def load_checkpoint(self, load_dir: str, *args: Any, **kwargs: Any) -> Any:
        """As `DeepSpeedEngine.load_checkpoint`. Without our state on every rank, the next step is all
        fresh. The data iterator is the caller's: `clapping_num_drawn` batches were taken from it."""
        path, client_state = super().load_checkpoint(load_dir, *args, **kwargs)
        if self.clapping.enabled:
            state = None
            if path is not None and self.clapping.checkpoint_memory:
                file = Path(path).parent / self._state_file
                state = torch.load(file, map_location=self.device) if file.exists() else None
            self._stage.load_state_dict(state)
        return path, client_state

    @property
    def clapping_num_drawn(self) -> int:
        """Batches that this rank took from its data iterator."""
        return self._stage.sampler.num_drawn

    @property
    def _state_file(self) -> str:
        return f"clapping_rank_{self.global_rank:05d}.pt"

    # Instructions

    def _send_activations(self, buffer_id: int) -> None:
        if not self.module.training:
            return super()._exec_send_activations(buffer_id)
        with self._timed(PIPE_SEND_OUTPUT_TIMER):
            outputs = self.pipe_buffers["outputs"][buffer_id]
            if self.has_attention_mask or self.has_bool_tensors:
                outputs = (*outputs[:-1], outputs[-1].bool())
            self._announce(outputs)
            self._stage.send(ACTIVATIONS_TO_NEXT, _listed(outputs))

    def _receive_activations(self, buffer_id: int) -> None:
        if not self.module.training:
            return super()._exec_recv_activations(buffer_id)
        with self._timed(PIPE_RECV_INPUT_TIMER):
            specs = self._announced()
            looks_ahead = not self._tells_shapes(specs)
            values = self._stage.receive(ACTIVATIONS_FROM_PREVIOUS, specs, looks_ahead)
            for value in values:
                value.requires_grad = value.is_floating_point()
            self.pipe_buffers["inputs"][buffer_id] = tuple(values) if self._receives_tuple else values[0]

    def _send_gradients(self, buffer_id: int) -> None:
        with self._timed(PIPE_SEND_GRAD_TIMER):
            inputs = [x for x in _listed(self.pipe_buffers["inputs"][buffer_id]) if x.is_floating_point()]
            self._stage.send(GRADIENTS_TO_PREVIOUS, [self._gradient(tensor) for tensor in inputs])
            self.pipe_buffers["inputs"][buffer_id] = None

    def _gradient(self, received: torch.Tensor) -> torch.Tensor:
        if received.grad is None:
            raise ValueError(
                f"stage {self.stage_id}: a received tensor of shape {tuple(received.shape)} got no gradient; "
                "accepted: every floating tensor that is passed on takes part in the loss"
            )
        return received.grad

    def _receive_gradients(self, buffer_id: int) -> None:
        with self._timed(PIPE_RECV_GRAD_TIMER):
            outputs = self.pipe_buffers["outputs"][buffer_id]
            specs = _with_gradient(Spec.of(output) for output in _listed(outputs))
            looks_ahead = not self._tells_shapes(self._sent_specs)
            gradients = self._stage.receive(GRADIENTS_FROM_NEXT, specs, looks_ahead)
            self.grad_layer = gradients[0] if torch.is_tensor(outputs) else gradients

    def _forward_pass(self, buffer_id: int) -> None:
        if not self.module.training:
            return super()._exec_forward_pass(buffer_id)
        with self._tuning.watching(self.module.parameters()):
            super()._exec_forward_pass(buffer_id)

    def _backward_pass(self, buffer_id: int) -> None:
        with self._tuning.watching():
            super()._exec_backward_pass(buffer_id)

    # Shapes: told once, and again only while they may differ

    def reset_activation_shape(self) -> None:
        super().reset_activation_shape()
        self._sent_specs = self._received_specs = None

    def _tells_shapes(self, told: Sequence[Spec] | None) -> bool:
        return told is None or self.dynamic_shape or self._stage.shapes_differ

    def _expect_known_shapes(self) -> None:
        """Announces the step's first messages, if they have the shapes of the last step."""
        if self._received_specs is not None and not self._tells_shapes(self._received_specs):
            self._stage.expect(ACTIVATIONS_FROM_PREVIOUS, self._received_specs, self._stage.num_ahead)
        if self._sent_specs is not None and not self._tells_shapes(self._sent_specs):
            self._stage.expect(GRADIENTS_FROM_NEXT, _with_gradient(self._sent_specs), self._stage.num_ahead)

    def _announce(self, outputs: Tensors) -> None:
        specs = [Spec.of(output) for output in _listed(outputs)]
        if self._tells_shapes(self._sent_specs):
            self._send_tensor_meta(outputs, self.next_stage)
        elif specs != self._sent_specs:
            raise ValueError(
                f"stage {self.stage_id}: activations changed from {self._sent_specs} to {specs} while the "
                "batch kept its shape; accepted: PipelineModule(dynamic_shape=True), or "
                "engine.reset_activation_shape() on every rank before the step"
            )
        self._sent_specs = specs

    def _announced(self) -> list[Spec]:
        if self._received_specs is None or self._tells_shapes(self._received_specs):
            buffers = self._recv_tensor_meta(self.prev_stage)
            self._receives_tuple = isinstance(buffers, tuple)
            self._received_specs = [Spec.of(buffer) for buffer in _listed(buffers)]
        return self._received_specs

    @contextmanager
    def _timed(self, timer: str) -> Iterator[None]:
        if not self.wall_clock_breakdown():
            yield
            return
        self.timers(timer).start()
        yield
        self.timers(timer).stop()


def _check_num_stages(model: PipelineModule) -> None:
    if model.num_stages < 2:
        raise ValueError(
            f'"{BLOCK_NAME}" block with PipelineModule(num_stages={model.num_stages}): there is no link to '
            f'compress; accepted: at least 2 stages, or "{BLOCK_NAME}": {{"enabled": false}}'
        )


def _with_gradient(specs: Iterable[Spec]) -> list[Spec]:
    return [spec for spec in specs if spec.dtype.is_floating_point]


def _listed(tensors: Tensors) -> tuple[torch.Tensor, ...]:
    return (tensors,) if isinstance(tensors, torch.Tensor) else tensors
