"""Process groups of links, who is at their other ends, and what all ranks tell each other.

This file and `wire` are the only ones that import torch.distributed.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")
Pair = tuple[int, int]

POLL_S = 1e-3


class Control:
    """What all ranks tell each other: in a gloo group of its own, on the CPU whatever the GPU does, and
    within `timeout_s`. Making one is a collective of all ranks, as are its methods.

    Raises ConnectionError where a rank is gone or silent for too long.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        with self._naming("while a process group was made"):
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def gather(self, item: Any) -> list[Any]:
        """What every rank passed, in the order of ranks."""
        items: list[Any] = [None] * get_world_size()
        with self._naming("while all ranks told what they have"):
            dist.all_gather_object(items, item, group=self.group)
        return items

    def gather_rows(self, rows: Sequence[Any]) -> list[Any]:
        """Those of every rank, one after the other."""
        return [row for rows_of_rank in self.gather(rows) for row in rows_of_rank]

    def agree(self, answers: Sequence[bool]) -> list[bool]:
        """For each question, whether every rank answered yes."""
        votes = torch.tensor(answers, dtype=torch.int32, device="cpu")
        with self._naming("while all ranks voted"):
            dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=self.group)
        return [bool(vote) for vote in votes.tolist()]

    def wait_for_all(self) -> None:
        """Returns once every rank has called it, within the time of the default group: what comes before it,
        such as writing a checkpoint, may take longer than a message."""
        dist.barrier()

    def check(self, check: Callable[[], Result]) -> Result:
        """What `check` returns. If it raises ValueError or OSError on any rank, every rank raises ValueError,
        with the same text."""
        result, mistake = None, None
        try:
            result = check()
        except (ValueError, OSError) as error:
            mistake = str(error)
        mistakes = self.gather(mistake)
        if any(mistakes):
            raise ValueError("\n".join(_grouped(mistakes)))
        return result  # type: ignore[return-value]

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """Raises ValueError on every rank, with the same text, if ranks differ in a fact. facts: by the name
        that an error shall have for it."""
        found = self.gather(dict(facts))
        names = dict.fromkeys(name for rank in found for name in rank)
        differences = [
            f"{name}: " + "; ".join(_grouped([repr(rank.get(name)) for rank in found]))
            for name in names
            if any(rank.get(name) != found[0].get(name) for rank in found)
        ]
        if differences:
            raise ValueError("\n".join(["the ranks differ; accepted: the same everywhere", *differences]))

    @contextmanager
    def _naming(self, when: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ConnectionError(
                f"rank {rank()}: another rank ended, or was silent for more than {self.timeout_s:g} s, "
                f"{when} ({error})"
            ) from error


def _grouped(texts: Sequence[str | None]) -> list[str]:
    """Each text once, with the ranks that it is of, unless it is of all."""
    lines = []
    for text in dict.fromkeys(text for text in texts if text is not None):
        ranks = [number for number, other in enumerate(texts) if other == text]
        where = "" if len(ranks) == len(texts) else f" (rank {', '.join(map(str, ranks))})"
        lines.append(text + where)
    return lines


class Peer(NamedTuple):
    """A neighbouring stage: its global rank, and the process group of each direction of the link to it."""

    rank: int
    activations: Any
    gradients: Any


def make_peers(
    pipelines: Sequence[Sequence[int]], places: Sequence[int], device: torch.device, timeout_s: float
) -> dict[Pair, Peer]:
    """By (stage, neighbouring stage), the neighbours of this rank's stages. A collective of all ranks.

    pipelines   the global ranks of every pipeline; the same on every rank
    places      for each stage, which of its pipeline's ranks has it. Neighbouring stages of one rank
                have no link
    """
    links: list[tuple[int, Pair]] = [
        (stage, (ranks[here], ranks[there]))
        for stage, (here, there) in enumerate(pairwise(places))
        for ranks in pipelines
        if here != there
    ]
    peers = {}
    is_queued = find_carrier(None, device).type != "cpu"
    for members in _share_no_rank(links) if is_queued else [[link] for link in links]:
        groups = make_direction_groups([ends for _, ends in members], device, timeout_s)
        for stage, ends in members:
            if rank() in ends:
                peers[stage, stage + 1] = Peer(ends[1], *groups)
                peers[stage + 1, stage] = Peer(ends[0], *groups)
    return peers


def _share_no_rank(links: Sequence[tuple[int, Pair]]) -> list[list[tuple[int, Pair]]]:
    """The links in as few lists as may be, in none of which a rank has two: two lists for a pipeline."""
    lists: list[list[tuple[int, Pair]]] = []
    for link in links:
        fitting = (each for each in lists if not any(set(ends) & set(link[1]) for _, ends in each))
        chosen = next(fitting, None)
        if chosen is None:
            lists.append([link])
        else:
            chosen.append(link)
    return lists


def make_direction_groups(pairs: Sequence[Pair], device: torch.device, timeout_s: float) -> tuple[Any, Any]:
    """A process group from the first to the second of each pair of global ranks, and one back. A collective
    of all ranks, also of those in no pair.

    No two links or directions of a rank share a group: NCCL may carry a group's messages one after the other,
    and one that has to wait would hold up all behind it. So pairs here have no rank in common. (On NCCL with
    a bound device each group is a split of the communicator by all ranks, and groups of two ranks would be
    2 (S - 1) R of them for S stages and R replicas. With `use_local_synchronization` torch names a group
    after the number of groups that its rank has, which differs along a pipeline.) The first message of an
    NCCL pair waits for the peer, an announced receive as well: so a byte is sent here.

    device      where payloads are written and read
    timeout_s   how long a message is waited for. NCCL's watchdog ends the process: it gets twice the time, so
                that an error that names the peer comes first
    """
    members = sorted({member for pair in pairs for member in pair})
    there, back = (_new_group(members, device, timeout_s) for _ in range(2))
    for ends in pairs:
        if rank() in ends:
            for group, (source, target) in ((there, ends), (back, ends[::-1])):
                byte = torch.zeros(1, dtype=torch.uint8, device=find_carrier(group, device))
                with naming_peer(target if rank() == source else source):
                    if rank() == source:
                        dist.send(byte, dst=target, group=group)
                    else:
                        dist.recv(byte, src=source, group=group)
    return there, back


def _new_group(members: list[int], device: torch.device, timeout_s: float) -> Any:
    is_queued = find_carrier(None, device).type != "cpu"
    return dist.new_group(members, timedelta(seconds=2 * timeout_s if is_queued else timeout_s))


def make_own_group(sets: Sequence[Sequence[int]], device: torch.device, timeout_s: float) -> Any:
    """The process group of the set of global ranks that this rank is in. A collective of all ranks, which all
    pass the same sets, each rank in one of them. Times as in `make_direction_groups`."""
    groups = [_new_group(list(members), device, timeout_s) for members in sets]
    (mine,) = [group for group, members in zip(groups, sets, strict=True) if rank() in members]
    return mine


@contextmanager
def naming_peer(peer: int) -> Iterator[None]:
    """Where the process group may fail: when a message is waited for, or when another one is started after
    the connection broke."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"rank {peer} ended or was silent for too long ({error})") from error


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


# For a program that no host has started


def open_store(address: str | None, port: int, hosts_it: bool, timeout_s: float) -> Any:
    """Where ranks can write and read before they have a process group. Waits for the rank that hosts it, and
    for no other.

    address    of the host of the first rank; None: of a rank that is alone
    hosts_it   whether this rank is where the store is
    """
    if address is None:
        return dist.HashStore()
    waiting = timedelta(seconds=timeout_s)
    return dist.TCPStore(address, port, None, hosts_it, waiting, wait_for_workers=False, multi_tenant=True)


def start_default_group(store: Any, number: int, world_size: int, backend: str, timeout_s: float) -> None:
    """Makes the process group of all ranks. A collective of theirs. number: this rank's."""
    waiting = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, timeout=waiting, rank=number, world_size=world_size, store=store)


def count_ranks(device: torch.device, timeout_s: float) -> int:
    """How many ranks answer in the default group. A collective of theirs. Raises ConnectionError after so
    long; nothing waits on the host for a GPU before that."""
    number = torch.ones((), dtype=torch.int32, device=find_carrier(None, device))
    work = dist.all_reduce(number, async_op=True)
    deadline_s = time.monotonic() + timeout_s
    while not work.is_completed():
        if time.monotonic() > deadline_s:
            raise ConnectionError(f"not all ranks answered within {timeout_s:g} s")
        time.sleep(POLL_S)
    work.wait()
    return int(number)


def has_backend(name: str) -> bool:
    """Whether this build of torch has it."""
    return dist.is_backend_available(name)


def end_groups() -> None:
    """Ends all process groups of this process, if it has any."""
    if dist.is_initialized():
        dist.destroy_process_group()
