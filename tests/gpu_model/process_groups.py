"""The names of torch.distributed that the package uses, for the ranks of a `Machine`.

A gloo group's messages wait on the host and have contents; an NCCL group's wait on a device's stream.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import torch

from tests.gpu_model.machine import Machine, ModelError, Rank, Stream, Work


class Group:
    """A process group. Every rank has an object of its own."""

    def __init__(self, number: int, members: Sequence[int], backend: str) -> None:
        self.number = number
        self.members = list(members)
        self.backend = backend


class Transfer:
    """A message; both ends put in what they have."""

    def __init__(self) -> None:
        self.sends: Any = None
        self.receives: Any = None

    @property
    def has_both(self) -> bool:
        return self.sends is not None and self.receives is not None


class Handle:
    """What isend and irecv return on NCCL: `wait` is the current stream's. Holds the tensor until then."""

    def __init__(self, groups: "ProcessGroups", work: Work, tensor: torch.Tensor) -> None:
        self.groups = groups
        self.work = work
        self.tensor: torch.Tensor | None = tensor

    def wait(self) -> None:
        self.groups.machine.here.current.wait_for(self.work)
        self.tensor = None

    def is_completed(self) -> bool:
        rank = self.groups.machine.here
        rank.pause(f"host polls {self.work.name}", lambda: self.work.done)
        return True


class HostHandle:
    """What isend and irecv return on gloo: `wait` is the host's."""

    def __init__(self, groups: "ProcessGroups", transfer: Transfer, work: Work, name: str) -> None:
        self.groups = groups
        self.transfer = transfer
        self.work = work
        self.name = name

    def wait(self) -> None:
        rank = self.groups.machine.here
        rank.pause(f"host waits for {self.name}", lambda: self.transfer.has_both)
        rank.host_clock = {**rank.host_clock, **{self.work.stream: self.work.tick}}

    def is_completed(self) -> bool:
        return self.transfer.has_both


class ProcessGroups:
    """Stands in for the module torch.distributed. backend: of the default group."""

    class ReduceOp:
        MIN = "min"

    def __init__(self, machine: Machine, backend: str, block_of: Any) -> None:
        self.machine = machine
        self.world = Group(0, range(len(machine.ranks)), backend)
        self.block_of = block_of
        self._num_groups = [0] * len(machine.ranks)
        self._streams: dict[tuple[int, int], Stream] = {}
        self._transfers: dict[Any, list[deque[Transfer]]] = defaultdict(lambda: [deque(), deque()])
        self._rounds: dict[Any, dict[int, Any]] = defaultdict(dict)
        self._num_rounds: dict[tuple[int, int], int] = defaultdict(int)

    # Who there is

    def get_rank(self, group: Group | None = None) -> int:
        number = self.machine.here.number
        return number if group is None else group.members.index(number)

    def get_world_size(self, group: Group | None = None) -> int:
        return len((group or self.world).members)

    def get_backend(self, group: Group | None = None) -> str:
        return (group or self.world).backend

    def get_process_group_ranks(self, group: Group | None = None) -> list[int]:
        return (group or self.world).members

    def new_group(self, ranks: Any = None, timeout: Any = None, backend: str | None = None) -> Group:
        rank = self.machine.here
        self._num_groups[rank.number] += 1
        group = Group(
            self._num_groups[rank.number], ranks or self.world.members, backend or self.world.backend
        )
        self._meet(self.world, (group.number, group.members))
        return group

    # Messages

    def isend(self, tensor: torch.Tensor, dst: int, group: Group | None = None, tag: int = 0) -> Any:
        return self._start(True, tensor, dst, group or self.world, tag)

    def irecv(self, tensor: torch.Tensor, src: int, group: Group | None = None, tag: int = 0) -> Any:
        return self._start(False, tensor, src, group or self.world, tag)

    def send(self, tensor: torch.Tensor, dst: int, group: Group | None = None) -> None:
        self.isend(tensor, dst, group).wait()

    def recv(self, tensor: torch.Tensor, src: int, group: Group | None = None) -> None:
        self.irecv(tensor, src, group).wait()

    def _start(self, sends: bool, tensor: torch.Tensor, peer: int, group: Group, tag: int) -> Any:
        rank = self.machine.here
        ends = (rank.number, peer) if sends else (peer, rank.number)
        transfer = self._match((group.number, *ends, tag), sends)
        name = f"{'send to' if sends else 'receive from'} rank {peer} in group {group.number}"
        if group.backend == "gloo":
            assert tensor.device.type == "cpu", "gloo was given a tensor of the GPU"
            return self._start_on_host(sends, tensor, transfer, rank, name)
        assert tensor.device.type != "cpu", "NCCL was given a tensor of the CPU"
        stream = self._stream(group, rank)
        stream.wait_for(rank.current.add(f"before {name}"))

        def put() -> bool:
            setattr(transfer, "sends" if sends else "receives", True)
            return True

        work = stream.add(name, may_start=put, may_end=lambda: transfer.has_both)
        blocks = [self.block_of(tensor)]
        rank.access(work, blocks if sends else [], [] if sends else blocks)
        handle = Handle(self, work, tensor)
        rank.pause(f"after {name}")
        return handle

    def _start_on_host(
        self, sends: bool, tensor: torch.Tensor, transfer: Transfer, rank: Rank, name: str
    ) -> HostHandle:
        setattr(transfer, "sends" if sends else "receives", tensor)
        if transfer.has_both:
            transfer.receives.copy_(transfer.sends)
        work = Stream(rank, name).add(name)
        rank.unstarted.remove(work)
        block = self.block_of(tensor)
        if block is not None:
            rank.access(work, [block] if sends else [], [] if sends else [block])
        handle = HostHandle(self, transfer, work, name)
        rank.pause(f"after {name}")
        return handle

    def _match(self, key: Any, sends: bool) -> Transfer:
        mine, theirs = self._transfers[key] if sends else self._transfers[key][::-1]
        if theirs:
            return theirs.popleft()
        mine.append(Transfer())
        return mine[-1]

    def _stream(self, group: Group, rank: Rank) -> Stream:
        key = group.number, rank.number
        if key not in self._streams:
            self._streams[key] = rank.new_stream(f"NCCL group {group.number}")
        return self._streams[key]

    # Collectives

    def all_gather_object(self, items: list[Any], item: Any, group: Group | None = None) -> None:
        """On NCCL, of bytes on the current device, which the host then reads."""
        group = group or self.world
        if group.backend != "gloo":
            if not self.machine.here.has_set_device:
                raise ModelError("an object collective on cuda:0, on every rank: none has set its device")
            self.all_reduce(torch.empty(1, device="meta"), group=group)
            self.machine.here.synchronize("an object collective")
        found = self._meet(group, item)
        items[:] = [found[member] for member in group.members]

    def barrier(self, group: Group | None = None) -> None:
        self._meet(group or self.world, None)

    def all_reduce(self, tensor: torch.Tensor, op: Any = None, group: Group | None = None) -> None:
        group, rank = group or self.world, self.machine.here
        if group.backend == "gloo":
            found = self._meet(group, tensor.clone())
            tensor.copy_(torch.stack(list(found.values())).amin(0))
            return
        stream = self._stream(group, rank)
        stream.wait_for(rank.current.add("before all-reduce"))
        arrived = self._round(group)

        def put() -> bool:
            arrived[rank.number] = True
            return True

        work = stream.add("all-reduce", put, lambda: len(arrived) == len(group.members))
        rank.access(work, [], [self.block_of(tensor)])
        rank.current.wait_for(work)

    def _meet(self, group: Group, item: Any) -> dict[int, Any]:
        rank, arrived = self.machine.here, self._round(group)
        arrived[rank.number] = item
        rank.pause("host waits for all ranks", lambda: len(arrived) == len(group.members))
        return arrived

    def _round(self, group: Group) -> dict[int, Any]:
        key = group.number, self.machine.here.number
        self._num_rounds[key] += 1
        return self._rounds[group.number, self._num_rounds[key]]
