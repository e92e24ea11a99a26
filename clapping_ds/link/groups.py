"""Process groups of links, who is at their other ends, and what all ranks agree on.

This file and `wire` are the only ones that import torch.distributed.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Peer(NamedTuple):
    """A neighbouring stage: its global rank, and the process group of each direction of the link to it."""

    rank: int
    activations: Any
    gradients: Any


def make_peers(
    pipelines: Sequence[Sequence[int]], places: Sequence[int], device: torch.device, timeout_s: float
) -> dict[tuple[int, int], Peer]:
    """By (stage, neighbouring stage), the neighbours of this rank's stages. A collective of all ranks.

    pipelines   the global ranks of every pipeline; the same on every rank
    places      for each stage, which of its pipeline's ranks has it. Neighbouring stages of one rank
                have no link
    """
    peers = {}
    for stage in range(len(places) - 1):
        following = stage + 1
        for ranks in pipelines if places[stage] != places[following] else []:
            ends = ranks[places[stage]], ranks[places[following]]
            groups = make_direction_groups(ends, device, timeout_s)
            if rank() in ends:
                peers[stage, following] = Peer(ends[1], *groups)
                peers[following, stage] = Peer(ends[0], *groups)
    return peers


def make_direction_groups(ends: tuple[int, int], device: torch.device, timeout_s: float) -> tuple[Any, Any]:
    """A process group from the first to the second of two global ranks, and one back. A collective of all
    ranks, also of those at neither end.

    No link or direction shares a group with another: NCCL may carry a group's messages one after the
    other, and one that has to wait would hold up all behind it. The first message of an NCCL group waits
    for its peer, an announced receive as well: so a byte is sent here.

    device      where payloads are written and read
    timeout_s   how long a message is waited for
    """
    there, back = (dist.new_group(list(ends), timedelta(seconds=timeout_s)) for _ in range(2))
    if rank() in ends:
        for group, (source, target) in ((there, ends), (back, ends[::-1])):
            byte = torch.zeros(1, dtype=torch.uint8, device=find_carrier(group, device))
            if rank() == source:
                dist.send(byte, dst=target, group=group)
            else:
                dist.recv(byte, src=source, group=group)
    return there, back


def find_carrier(group: Any, device: torch.device) -> torch.device:
    """Where a process group reads and writes bytes."""
    return torch.device("cpu") if dist.get_backend(group) == "gloo" else device


def rank() -> int:
    """Global rank of this process."""
    return dist.get_rank()


def get_world_size() -> int:
    """Number of all ranks."""
    return dist.get_world_size()


def get_group_ranks(group: Any) -> list[int]:
    """The global ranks of a process group, in its order. None: the default group."""
    return dist.get_process_group_ranks(group)


def wait_for_all() -> None:
    """Returns once every rank has called it."""
    dist.barrier()


def all_agree(answers: Sequence[bool], device: torch.device) -> list[bool]:
    """For each question, whether every rank answered yes. A collective of all ranks."""
    votes = torch.tensor(answers, dtype=torch.int32, device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return [bool(vote) for vote in votes.tolist()]


def gather(item: Any) -> list[Any]:
    """What every rank passed, in the order of ranks. A collective of all ranks."""
    items: list[Any] = [None] * get_world_size()
    dist.all_gather_object(items, item)
    return items
