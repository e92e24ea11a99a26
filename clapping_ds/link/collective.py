"""Bytes and sums among ranks that all have something alike, in a process group of their own: replicas, sites.

It knows no codec: payloads are contiguous uint8 tensors, and every rank knows the size of each. All calls
return at once; `Transfer.wait` gives what arrived.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from clapping_ds.link.groups import find_carrier, get_group_ranks, make_own_group, rank

POLL_S = 1e-3


class Transfer:
    """A collective on its way."""

    def __init__(
        self,
        collective: "Collective",
        works: Sequence[Any],
        kept: Any,
        take: Callable[[], Any],
        peers: Sequence[int] = (),
    ) -> None:
        self._collective = collective
        self._works = works
        self._peers = peers if len(peers) == len(works) else [None] * len(works)
        """Global ranks at the other ends; None where a work is of several, as NCCL's are."""
        self._kept = kept
        """What the process group reads until it is done."""
        self._take = take

    def wait(self) -> Any:
        """What arrived. What compute queues from now on comes after it.

        Raises ConnectionError where a rank is gone or silent for too long.
        """
        if self._collective.carrier.type != "cpu":
            self._poll()
        for work, peer in zip(self._works, self._peers, strict=True):
            with self._collective.naming(peer):
                work.wait()
        self._kept = None
        return self._take()

    def _poll(self) -> None:
        """NCCL lets the GPU wait, without end, where gloo lets the host wait: here the host does."""
        deadline_s = time.monotonic() + self._collective.timeout_s
        while not all(work.is_completed() for work in self._works):
            if time.monotonic() > deadline_s:
                text = f"was silent for {self._collective.timeout_s:g} s"
                raise ConnectionError(self._collective.describe(text))
            time.sleep(POLL_S)


class Collective:
    """Among some ranks.

    group    their process group
    device   where payloads are written and read
    what     is exchanged, for errors
    """

    def __init__(self, group: Any, device: torch.device, timeout_s: float, what: str) -> None:
        # Configuration
        self.what = what
        self.group = group
        self.device = device
        self.timeout_s = timeout_s
        self.ranks = get_group_ranks(group)
        self.size = len(self.ranks)
        self.place = self.ranks.index(rank())
        self.carrier = find_carrier(group, device)

    def scatter(self, payload: torch.Tensor, sizes: Sequence[int]) -> Transfer:
        """Sends a part of the payload to each rank. Arrives: what each rank sent here, in their order.

        sizes   bytes for each rank, this one included; the same everywhere
        """
        return self.swap(payload.split(list(sizes)), [sizes[self.place]] * self.size)

    def gather(self, payload: torch.Tensor, sizes: Sequence[int]) -> Transfer:
        """Sends the payload to all ranks. Arrives: all payloads, in the order of ranks.

        sizes   bytes of each rank's payload; the same everywhere
        """
        return self.swap([payload.to(self.carrier)] * self.size, sizes)

    def swap(self, parts: Sequence[torch.Tensor], sizes: Sequence[int]) -> Transfer:
        """Sends a part to each rank, and receives so many bytes from each; of no bytes, nothing is sent.
        Arrives: what each rank sent here, in their order.

        Point to point, as an all-gather over gloo takes half as long again on a slow link. Receives come
        first: a gloo peer sends once it is told of one, and that would wait behind what is sent to it.
        """
        carried = [part.to(self.carrier) for part in parts]
        received = [torch.empty(size, dtype=torch.uint8, device=self.carrier) for size in sizes]
        received[self.place].copy_(carried[self.place])
        sources = [(self.place - offset) % self.size for offset in range(1, self.size)]
        targets = [(self.place + offset) % self.size for offset in range(1, self.size)]
        sources = [source for source in sources if sizes[source]]
        targets = [target for target in targets if carried[target].numel()]
        operations = [
            dist.P2POp(dist.irecv, received[source], self.ranks[source], self.group) for source in sources
        ] + [dist.P2POp(dist.isend, carried[target], self.ranks[target], self.group) for target in targets]
        works = self._start(operations)
        peers = [self.ranks[place] for place in (*sources, *targets)]
        return Transfer(self, works, carried, lambda: [each.to(self.device) for each in received], peers)

    def _start(self, operations: Sequence[Any]) -> list[Any]:
        """One work for each, but for NCCL's, which are one."""
        if self.carrier.type == "cpu":
            works = []
            for each in operations:
                with self.naming(each.peer):
                    works.append(each.op(each.tensor, each.peer, each.group))
            return works
        with self.naming():
            return dist.batch_isend_irecv(list(operations)) if operations else []

    def sum(self, values: torch.Tensor) -> Transfer:
        """Arrives: the sum over all ranks, the same bits on each. values: fp32, or what the process group can
        add up."""
        total = values.to(self.carrier, copy=True)
        with self.naming():
            work = dist.all_reduce(total, group=self.group, async_op=True)
        return Transfer(self, [work], None, lambda: total.to(self.device))

    @contextmanager
    def naming(self, peer: int | None = None) -> Iterator[None]:
        """Errors of the process group say whose it is."""
        try:
            yield
        except RuntimeError as error:
            text = f"ended or was silent for too long ({error})"
            raise ConnectionError(self.describe(text, peer)) from error

    def describe(self, what: str, peer: int | None = None) -> str:
        who = f"one of the ranks {self.ranks}" if peer is None else f"rank {peer}"
        return f"{self.what}: {who} {what}"


def make_collective(
    sets: Sequence[Sequence[int]], device: torch.device, timeout_s: float, what: str
) -> Collective:
    """Of the set of global ranks that this rank is in. A collective of all ranks, with the same sets."""
    return Collective(make_own_group(sets, device, timeout_s), device, timeout_s, what)
