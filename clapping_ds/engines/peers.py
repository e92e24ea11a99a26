"""Who is at the other end of each link of this rank's stages."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from clapping_ds.transport import direction_groups, rank


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
            groups = direction_groups(ends, device, timeout_s)
            if rank() in ends:
                peers[stage, following] = Peer(ends[1], *groups)
                peers[following, stage] = Peer(ends[0], *groups)
    return peers
