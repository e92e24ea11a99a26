"""The order of `clapping_ds.autotune.depth` as a DeepSpeed `TrainSchedule`."""

from collections.abc import Iterator

from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    ReduceTiedGrads,
    SendActivation,
    SendGrad,
    TrainSchedule,
)

from clapping_ds.autotune.depth import count_warmup, order_work


class InFlightSchedule(TrainSchedule):
    """in_flight: micro-batches that every link holds beyond stock 1F1B."""

    def __init__(self, micro_batches: int, stages: int, stage_id: int, in_flight: int) -> None:
        super().__init__(micro_batches, stages, stage_id)
        self.in_flight = in_flight

    def num_pipe_buffers(self) -> int:
        """Micro-batches whose activations are stored at the same time; the engine wants at least two."""
        return max(2, count_warmup(self.micro_batches, self.stages, self.stage_id, self.in_flight))

    def steps(self) -> Iterator[list[PipeInstruction]]:
        for kind, micro_batch in order_work(self.micro_batches, self.stages, self.stage_id, self.in_flight):
            buffer = self._buffer_idx(micro_batch)
            yield self._forward(buffer) if kind == "forward" else self._backward(buffer)
        yield [ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]

    def _forward(self, buffer: int) -> list[PipeInstruction]:
        steps = [] if self.is_first_stage else [RecvActivation(buffer)]
        steps += [LoadMicroBatch(buffer)] if self.is_first_stage or self.is_last_stage else []
        steps += [ForwardPass(buffer)]
        return steps if self.is_last_stage else [*steps, SendActivation(buffer)]

    def _backward(self, buffer: int) -> list[PipeInstruction]:
        steps = [] if self.is_last_stage else [RecvGrad(buffer)]
        steps += [BackwardPass(buffer)]
        return steps if self.is_first_stage else [*steps, SendGrad(buffer)]
