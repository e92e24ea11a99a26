"""The package's Megatron-Core pipeline on the ranks of a `Machine`, with Megatron-Core's own schedules."""

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.overrides import TorchFunctionMode

from clapping_ds.hosts.megatron.pipeline import MegatronPipeline
from tests.gpu_model.machine import Machine, Rank
from tests.gpu_model.program import Case, Steps, count_steps, may_sync
from tests.gpu_model.torch_model import GPU, torch_on, tracking


class ModelGpu(TorchFunctionMode):
    """What is asked to be on a GPU is on the model's."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = GPU
        return function(*args, **kwargs)


class PipelineGroup:
    """As far as the package and Megatron-Core ask."""

    def __init__(self, members: list[int], place: int, backend: str) -> None:
        self.backend = backend
        self.members = members
        self.place = place

    def rank(self) -> int:
        return self.place

    def size(self) -> int:
        return len(self.members)


class Chunk(nn.Module):
    """A layer, whose passes may wait for the device."""

    def __init__(self, config: TransformerConfig, rank: Rank, case: Case, is_first: bool) -> None:
        super().__init__()
        self.config, self.rank, self.case, self.is_first = config, rank, case, is_first
        self.model_type = ModelType.encoder_or_decoder
        self.weight = nn.Parameter(torch.zeros(case.shape, device=GPU))

    def set_input_tensor(self, received: list[torch.Tensor | None]) -> None:
        self.received = received[0]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = (inputs if self.is_first else self.received) * self.weight
        may_sync(self.rank, self.case, hidden)
        hidden.register_hook(lambda gradient: may_sync(self.rank, self.case, gradient))
        return hidden + 1


def forward_step(data_iterator: Any, model: Chunk) -> Any:
    inputs = next(data_iterator) if data_iterator is not None else None
    return model(inputs), lambda output: (output.sum(), output.detach().sum())


def run(machine: Machine, case: Case) -> list[Steps]:
    """Trains; what `count_steps` found on each rank. case.schedule: "", "interleaved" or "overlap"."""
    num_ranks, is_interleaved = len(machine.ranks), case.schedule != ""
    num_chunks = 2 if is_interleaved else 1
    overlap = {"overlap_p2p_comm": True, "batch_p2p_comm": False} if case.schedule == "overlap" else {}

    def program(rank: Rank) -> Steps:
        with tracking(rank), ModelGpu():
            config = TransformerConfig(
                num_layers=8, hidden_size=case.shape[-1], num_attention_heads=1,
                pipeline_dtype=torch.float32, pipeline_model_parallel_size=num_ranks,
                virtual_pipeline_model_parallel_size=num_chunks if is_interleaved else None,
                deallocate_pipeline_outputs=case.frees_outputs, variable_seq_lengths=case.is_dynamic,
                moe_token_dispatcher_type="alltoall", **overlap,
            )  # fmt: skip
            alone = PipelineGroup([rank.number], 0, case.backend)
            groups = ProcessGroupCollection()
            for name in ("tp", "cp", "embd", "pos_embd", "dp", "dp_cp", "tp_dp_cp"):
                setattr(groups, name, alone)
            groups.pp = PipelineGroup(list(range(num_ranks)), rank.number, case.backend)
            pipeline = MegatronPipeline({"clapping": case.block}, config, groups, GPU)
            chunks = [
                Chunk(config, rank, case, is_first=rank.number == chunk == 0) for chunk in range(num_chunks)
            ]
            is_end = rank.number in (0, num_ranks - 1)

            def batches() -> Any:
                while True:
                    yield torch.zeros(case.shape, device=GPU)

            data = [batches() if is_end else None for _ in chunks]
            name = "with" if is_interleaved else "without"
            forward_backward = pipeline.wrap(
                getattr(schedules, f"forward_backward_pipelining_{name}_interleaving")
            )

            def step() -> None:
                forward_backward(
                    forward_step_func=forward_step, data_iterator=data if is_interleaved else data[0],
                    model=chunks if is_interleaved else chunks[0], num_microbatches=case.num_slots,
                    seq_length=case.shape[0], micro_batch_size=1, forward_only=False,
                )  # fmt: skip
                for chunk in chunks:
                    chunk.zero_grad()

            return count_steps(rank, case, step)

    with torch_on(machine, case.backend), ExitStack() as stack:
        for name, value in {
            "clapping_ds.report.say": mock.DEFAULT,
            "torch.cuda.synchronize": lambda *_: machine.here.synchronize("torch.cuda.synchronize()"),
            "torch.cuda.current_device": lambda: GPU,
            "torch.distributed.is_initialized": lambda: True,
            "torch.distributed.get_rank": lambda group=None: machine.here.number,
            "torch.distributed.get_process_group_ranks": lambda group: group.members,
            "torch.distributed.get_global_rank": lambda group, member: group.members[member],
        }.items():
            stack.enter_context(mock.patch(name, value))
        return machine.run(program)
