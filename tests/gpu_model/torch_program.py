"""The package's pipeline for torch.distributed.pipelining on the ranks of a `Machine`: torch's schedules."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed import pipelining
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining import stage as torch_stage

from clapping_ds.hosts.torch.pipeline import ClappingPipeline
from clapping_ds.hosts.torch.stage import ClappingStage
from tests.gpu_model.machine import Machine, Rank
from tests.gpu_model.process_groups import ProcessGroups
from tests.gpu_model.program import Case, Steps, count_steps, may_sync
from tests.gpu_model.torch_model import GPU, torch_on, tracking

STAGES_PER_RANK = {
    "ScheduleGPipe": 1,
    "Schedule1F1B": 1,
    "ScheduleInterleaved1F1B": 2,
    "ScheduleLoopedBFS": 2,
    "ScheduleInterleavedZeroBubble": 2,
    "ScheduleZBVZeroBubble": 2,
    "ScheduleDualPipeV": 2,
}


class Layer(nn.Module):
    """Its passes may wait for the device."""

    def __init__(self, rank: Rank, case: Case) -> None:
        super().__init__()
        self.rank, self.case = rank, case
        self.weight = nn.Parameter(torch.zeros(case.shape, device=GPU))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs * self.weight
        may_sync(self.rank, self.case, hidden)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: may_sync(self.rank, self.case, gradient))
        return hidden + 1


class ModelStage(ClappingStage):
    """Its metadata take no way of torch's: they are sent before the first step."""

    mail: Any

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Any = None) -> torch.Tensor:
        return torch.tensor([0])

    def _warmup_backward_result(self, received_result: Any = None) -> torch.Tensor:
        return torch.tensor([0])

    def _send_meta(self, meta: Any, dst_stage: int) -> None:
        self.mail.put((self.stage_index, dst_stage), meta)

    def _recv_meta(self, src_stage: int) -> Any:
        return self.mail.get((src_stage, self.stage_index))


class Mail:
    """Objects between hosts."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.boxes: dict[Any, list[Any]] = defaultdict(list)

    def put(self, key: Any, item: Any) -> None:
        self.boxes[key].append(item)

    def get(self, key: Any) -> Any:
        self.machine.here.pause(f"host waits for mail {key}", lambda: bool(self.boxes[key]))
        return self.boxes[key].pop(0)


@contextmanager
def torchs_groups(dist: ProcessGroups) -> Iterator[None]:
    """What torch's stages and schedules ask of process groups; they send nothing."""
    names = SimpleNamespace(
        get_rank=dist.get_rank,
        get_world_size=dist.get_world_size,
        get_global_rank=lambda group, member: member,
        get_debug_level=lambda: 0,
        DebugLevel=SimpleNamespace(DETAIL=1),
        P2POp=lambda operation, tensor, peer, group: SimpleNamespace(tensor=tensor),
        isend=None,
        irecv=None,
        distributed_c10d=SimpleNamespace(_get_default_group=lambda: None),
    )
    with (
        mock.patch.object(torch_stage, "dist", names),
        mock.patch.object(torch_schedules, "dist", names),
        mock.patch("clapping_ds.report.say"),
    ):
        yield


def run(machine: Machine, case: Case) -> list[Steps]:
    """Trains; what `count_steps` found on each rank."""
    mail = Mail(machine)
    num_ranks = len(machine.ranks)
    per_rank = STAGES_PER_RANK[case.schedule]
    is_v = case.schedule in ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")

    def program(rank: Rank) -> Steps:
        with tracking(rank):
            places = [rank.number + turn * num_ranks for turn in range(per_rank)]
            if is_v:
                places = [rank.number, 2 * num_ranks - 1 - rank.number]
            stages = [
                ModelStage(Layer(rank, case), index, num_ranks * per_rank, GPU, group=dist.world)
                for index in places
            ]
            for stage in stages:
                stage.mail = mail
            schedule = getattr(pipelining, case.schedule)(
                stages if per_rank > 1 else stages[0], case.num_slots, loss_fn=lambda out, _: out.sum()
            )
            pipeline = ClappingPipeline({"clapping": case.block}, schedule)

            def batches() -> Iterator[Any]:
                while True:
                    yield torch.zeros(case.shape, device=GPU), torch.zeros(case.shape, device=GPU)

            data = batches()

            def step() -> None:
                pipeline.step(data)
                for stage in stages:
                    stage.submod.zero_grad()

            return count_steps(rank, case, step)

    with torch_on(machine, case.backend) as dist, torchs_groups(dist):
        return machine.run(program)
