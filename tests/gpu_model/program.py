"""What the ranks of a `Machine` compute, whatever the host: passes of a stage, as the GPU sees them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from tests.gpu_model.machine import Rank
from tests.gpu_model.torch_model import GPU


@dataclass
class Case:
    """A pipeline, and what its user does."""

    num_stages: int = 2
    """Ranks; some schedules have two stages on each."""
    num_slots: int = 4
    num_steps: int = 3
    host: str = "deepspeed"
    schedule: str = ""
    block: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = (4, 64)
    backend: str = "nccl"
    has_one_queue: bool = False
    """CUDA_DEVICE_MAX_CONNECTIONS=1."""
    syncs: float = 0.0
    """Probability that a pass waits for the device: the user's `.item()`, a kernel that is loaded."""
    has_static_outputs: bool = False
    """Whether a stage writes its outputs into the same memory each time, as CUDA graphs do."""
    is_dynamic: bool = False
    """Whether shapes are told with each message."""
    frees_outputs: bool = False
    """Megatron-Core's deallocate_pipeline_outputs."""
    steps_per_print: int = 0


class Compute:
    """Passes of a stage. They read what they are given, and allocate what they return."""

    def __init__(self, rank: Rank, case: Case) -> None:
        self.rank = rank
        self.case = case
        self.weight = torch.zeros(case.shape, device=GPU)
        self.static = torch.zeros(case.shape, device=GPU)
        self.static_grad = torch.zeros(case.shape, device=GPU)

    def forward(self, inputs: torch.Tensor, is_last: bool = False) -> torch.Tensor:
        with torch.no_grad():
            hidden = inputs.detach() * self.weight
            may_sync(self.rank, self.case, hidden)
            outputs = self.static.copy_(hidden) if self.case.has_static_outputs else hidden + 1
        return outputs.detach().requires_grad_()

    def backward(self, inputs: torch.Tensor, gradients: Any) -> torch.Tensor:
        with torch.no_grad():
            gradient = inputs.detach() * self.weight
            for received in gradients or ():
                gradient = gradient + received
            self.weight.add_(gradient)
            may_sync(self.rank, self.case, gradient)
            return self.static_grad.copy_(gradient) if self.case.has_static_outputs else gradient

    def reduce(self, dist: Any) -> None:
        """What ends a step: gradients of all stages, and their norm, which the host reads."""
        with torch.no_grad():
            norm = self.weight.sum()
            if self.case.backend == "nccl":
                dist.all_reduce(norm)
            if not self.rank.forbids_syncs:
                norm.item()


def may_sync(rank: Rank, case: Case, tensor: torch.Tensor) -> None:
    """What a user's pass may do: read a number, load a kernel."""
    if rank.machine.random.random() < case.syncs:
        with torch.no_grad():
            tensor.sum().item()


class Steps(NamedTuple):
    """By step."""

    allocated: list[int]
    """How many blocks of memory it allocated that were not there before."""
    is_steady: list[bool]
    """Whether nothing of it was measured, loaded or new."""


def count_steps(
    rank: Rank, case: Case, train_batch: Callable[[], Any], is_watching: Callable[[], bool] = lambda: False
) -> Steps:
    """Runs the steps. In a steady one without a sync of the user's the package must not wait for the device,
    unless gloo carries its messages."""
    steps = Steps([], [])
    for step in range(case.num_steps):
        num_before = rank.num_allocated
        is_steady = step > 0 and not is_watching()
        rank.forbids_syncs = is_steady and case.syncs == 0 and case.backend == "nccl"
        train_batch()
        rank.forbids_syncs = False
        steps.allocated.append(rank.num_allocated - num_before)
        steps.is_steady.append(is_steady)
    return steps
