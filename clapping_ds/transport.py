"""Messages of bytes between the two ends of a link. The only file that imports torch.distributed.

A message is one contiguous uint8 tensor whose size both ends know beforehand. Sends and receives
block, in the order in which they are called, which is the order of the host's schedule.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class Wire:
    """One direction of one link, seen from one of its ends."""

    def __init__(self, peer: int, device: torch.device) -> None:
        """peer: global rank at the other end; device: where payloads are received."""
        self.peer = peer
        self.device = device

    def send(self, payload: torch.Tensor) -> None:
        """Hands the payload to the peer's `receive`; of no bytes, nothing is sent."""
        if payload.numel():
            dist.send(payload, dst=self.peer)

    def receive(self, num_bytes: int) -> torch.Tensor:
        """A new uint8 tensor of `num_bytes` with the next message of the peer."""
        payload = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        if num_bytes:
            dist.recv(payload, src=self.peer)
        return payload


def all_agree(answers: Sequence[bool], device: torch.device) -> list[bool]:
    """For each question, whether every rank answered yes. A collective of all ranks."""
    votes = torch.tensor(answers, dtype=torch.int32, device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return [bool(vote) for vote in votes.tolist()]


def gather(item: Any) -> list[Any]:
    """What every rank passed, in the order of ranks. A collective of all ranks."""
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items
