"""The package's DeepSpeed engine on the ranks of a `Machine`: real but for the stock engine below it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from clapping_ds.hosts.deepspeed.engine import ClappingPipelineEngine
from tests.gpu_model.machine import Machine, Rank
from tests.gpu_model.program import Case, Compute, Steps, count_steps
from tests.gpu_model.torch_model import GPU, torch_on, tracking


class StockEngine:
    """What is called of `PipelineEngine`, as far as messages and streams are concerned."""

    def start(self: Any, has_bool_tensors: bool = False, *args: Any, **kwargs: Any) -> None:
        case: Case = kwargs["case"]
        kwargs["rank"].has_set_device = True
        self.case = case
        self.module = SimpleNamespace(training=True, parameters=lambda: [])
        self.num_stages, self.micro_batches, self.device = case.num_stages, case.num_slots, GPU
        self.stage_id = self.global_rank = kwargs["rank"].number
        self.prev_stage, self.next_stage = self.stage_id - 1, self.stage_id + 1
        self.rank, self.compute = kwargs["rank"], Compute(kwargs["rank"], case)
        self.is_pipe_partitioned = self.is_grad_partitioned = False
        self.has_attention_mask = self.has_bool_tensors = False
        self.dynamic_shape = case.is_dynamic
        self.global_steps = self.global_samples = 0
        self.monitor = SimpleNamespace(enabled=False)
        self.grid = SimpleNamespace(get_pipe_parallel_group=lambda: None, get_data_parallel_id=lambda: 0)
        self.num_pipe_buffers = 0
        self.pipe_buffers = {name: [] for name in ("inputs", "labels", "outputs", "output_tensors")}
        self.optimizer = None

    def train_batch(self: Any, data_iter: Any = None) -> None:
        size = {"stages": self.num_stages, "stage_id": self.stage_id}
        self._exec_schedule(schedule.TrainSchedule(micro_batches=self.micro_batches, **size))
        self.global_steps += 1

    def load(self: Any, buffer_id: int) -> None:
        batch = self._next_batch()
        if self.stage_id == 0:
            self.pipe_buffers["inputs"][buffer_id] = batch

    def forward(self: Any, buffer_id: int) -> None:
        self.pipe_buffers["outputs"][buffer_id] = self.compute.forward(
            self.pipe_buffers["inputs"][buffer_id], is_last=self.stage_id == self.num_stages - 1
        )

    def backward(self: Any, buffer_id: int) -> None:
        inputs = self.pipe_buffers["inputs"][buffer_id]
        inputs.grad = self.compute.backward(inputs, getattr(self, "grad_layer", ()))
        self.pipe_buffers["outputs"][buffer_id] = self.grad_layer = None

    def reduce(self: Any) -> None:
        self.compute.reduce(self.dist)

    def next_batch(self: Any) -> torch.Tensor:
        return torch.zeros(self.case.shape, device=GPU)


@contextmanager
def stock_engine() -> Iterator[None]:
    replaced = {
        "__init__": StockEngine.start,
        "train_batch": StockEngine.train_batch,
        "_INSTRUCTION_MAP": {
            **PipelineEngine._INSTRUCTION_MAP,
            schedule.LoadMicroBatch: StockEngine.load,
            schedule.ForwardPass: StockEngine.forward,
            schedule.BackwardPass: StockEngine.backward,
            schedule.ReduceTiedGrads: StockEngine.reduce,
            schedule.ReduceGrads: lambda self: None,
            schedule.OptimizerStep: lambda self: None,
        },
        "_next_batch": StockEngine.next_batch,
        "fp16_enabled": lambda self: False,
        "bfloat16_enabled": lambda self: False,
        "is_first_stage": lambda self: self.stage_id == 0,
        "is_last_stage": lambda self: self.stage_id == self.num_stages - 1,
        "wall_clock_breakdown": lambda self: False,
        "steps_per_print": lambda self: self.case.steps_per_print,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(PipelineEngine, name, value))
        stack.enter_context(mock.patch("clapping_ds.report.say"))
        yield


def run(machine: Machine, case: Case) -> list[Steps]:
    """Trains; what `count_steps` found on each rank."""
    with torch_on(machine, case.backend) as dist, stock_engine():

        def program(rank: Rank) -> Steps:
            with tracking(rank):
                config = SimpleNamespace(
                    gradient_accumulation_steps=case.num_slots,
                    train_micro_batch_size_per_gpu=1,
                    _param_dict={"clapping": case.block},
                )
                model = SimpleNamespace(num_stages=case.num_stages)
                engine = ClappingPipelineEngine(config_class=config, model=model, case=case, rank=rank)
                engine.dist = dist
                return count_steps(rank, case, engine.train_batch, lambda: engine._tuning.is_watching)

        return machine.run(program)
