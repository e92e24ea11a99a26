"""torch on the ranks of a `Machine`: tensors on the device "meta" stand for tensors on a GPU.

Each operation on them becomes a piece of work on the current stream, which reads and writes their memory;
there are no numbers. What needs numbers on the host (`item`, a copy to the CPU) waits for the whole device.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clapping_ds import streams
from clapping_ds.autotune import measurement
from clapping_ds.codecs import learning, transform
from clapping_ds.codecs.reference import transform_reference
from clapping_ds.link import disk, groups, wire
from tests.gpu_model.machine import Block, Machine, ModelError, Rank, Stream, Work
from tests.gpu_model.process_groups import ProcessGroups

GPU = torch.device("meta")
aten = torch.ops.aten


class Memory:
    """The blocks that the tensors of one rank lie in."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self._blocks: dict[int, tuple[StorageWeakRef, Block]] = {}

    def block_of(self, tensor: torch.Tensor) -> Block | None:
        """None for memory of the host that is not pinned, and for nothing."""
        storage = tensor.untyped_storage()
        found = self._blocks.get(storage._cdata)
        if found is None and tensor.device == GPU and storage.nbytes():
            return self.place(tensor, self.rank.current)
        return None if found is None else found[1]

    def place(self, tensor: torch.Tensor, pool: Any) -> Block:
        """New memory for a new tensor."""
        storage = tensor.untyped_storage()
        self.collect()
        block = self.rank.allocate(storage.nbytes(), pool)
        self._blocks[storage._cdata] = StorageWeakRef(storage), block
        return block

    def knows(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._blocks

    def collect(self) -> None:
        for key in [key for key, (storage, _) in self._blocks.items() if storage.expired()]:
            self.rank.give_back(self._blocks.pop(key)[1])


class Tracking(TorchDispatchMode):
    """Turns each operation on the GPU's tensors into work on the current stream."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        self.rank = memory.rank

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written_arguments, is_view = _read_schema(func)
        if is_view:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func is aten._local_scalar_dense.default and tensors[0].device == GPU:
            self.rank.synchronize("item()")
            return 1
        if func is aten.record_stream.default:
            return None
        if func in (aten.copy_.default, aten._to_copy.default):
            return self._copy(func, args, kwargs)
        is_pinned = bool(kwargs.get("pin_memory"))
        if is_pinned:
            kwargs = {**kwargs, "pin_memory": False}
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if is_pinned:
            self.memory.place(outputs[0], "pinned")
        if any(tensor.device == GPU for tensor in tensors + outputs):
            self._track(func, tensors, outputs, _pick(written_arguments, args, kwargs))
        return out

    def _track(
        self, func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor], written: list[torch.Tensor]
    ) -> None:
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in known]
        if not new and not written:
            return
        new_blocks = [
            self.memory.block_of(tensor)
            if self.memory.knows(tensor)
            else self.memory.place(tensor, self.rank.current)
            for tensor in new
            if tensor.device == GPU and tensor.untyped_storage().nbytes()
        ]
        if func.name().startswith(("aten::empty", "aten::new_empty", "aten::set_")):
            return
        work = self.rank.current.add(func.name())
        written_blocks = [self.memory.block_of(tensor) for tensor in written if tensor.device == GPU]
        read_blocks = [self.memory.block_of(tensor) for tensor in inputs if tensor.device == GPU]
        self.rank.access(work, _there(read_blocks), _there(written_blocks + new_blocks))

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Between host and device, or on either."""
        source = args[0] if func is aten._to_copy.default else args[1]
        non_blocking = bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        if func is aten._to_copy.default:
            like = {name: kwargs[name] for name in ("dtype", "device") if kwargs.get(name) is not None}
            target = torch.empty_like(source, **like)
        else:
            target = args[0]
        if source.device.type == "cpu" and target.device.type == "cpu":
            pinned = [_there([self.memory.block_of(tensor)]) for tensor in (source, target)]
            self.rank.access_on_host(*pinned)
            return target.copy_(source)
        blocks = self.memory.block_of(source), self.memory.block_of(target)
        if non_blocking:  # torch's pinned memory is not given away again before such a copy is done
            for tensor, block in ((source, blocks[0]), (target, blocks[1])):
                if tensor.device.type == "cpu" and block is not None:
                    block.used_by.add(self.rank.current)
        if source.device != target.device and not (non_blocking and None not in blocks):
            self.rank.synchronize(f"a copy from {source.device} to {target.device}")
        work = self.rank.current.add("copy")
        self.rank.access(work, _there([blocks[0]]), _there([blocks[1]]))
        return target


def _there(blocks: list[Block | None]) -> list[Block]:
    return [block for block in blocks if block is not None]


@cache
def _read_schema(func: Any) -> tuple[list[tuple[int, str]], bool]:
    """The arguments that an operation writes, by position and name; and whether it returns a view."""
    arguments = enumerate(func._schema.arguments)
    written = [(n, a.name) for n, a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return written, not written and any(r.alias_info is not None for r in func._schema.returns)


def _pick(arguments: list[tuple[int, str]], args: Any, kwargs: Any) -> list[torch.Tensor]:
    found = [args[number] if number < len(args) else kwargs.get(name) for number, name in arguments]
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]


class Event:
    """As torch.cuda.Event."""

    def __init__(self, cuda: "Cuda", work: Work | None = None) -> None:
        self.cuda = cuda
        self.work = work

    def record(self, stream: Any) -> None:
        self.work = stream.stream.add("event")

    def synchronize(self) -> None:
        assert self.work is not None
        rank = self.cuda.machine.here
        if rank.forbids_syncs:
            rank.synchronize("an event")
        rank.wait_on_host(self.work)

    def elapsed_time(self, end: "Event") -> float:
        assert self.work is not None and self.work.done
        assert end.work is not None and end.work.done
        return self.cuda.machine.random.uniform(0.1, 10.0)


class StreamHandle:
    """As torch.cuda.Stream."""

    def __init__(self, cuda: "Cuda", stream: Stream) -> None:
        self.cuda = cuda
        self.stream = stream

    def wait_event(self, event: Event) -> None:
        assert event.work is not None
        self.stream.wait_for(event.work)

    def wait_stream(self, other: "StreamHandle") -> None:
        self.wait_event(other.record_event())

    def record_event(self) -> Event:
        return Event(self.cuda, self.stream.add("event"))

    def synchronize(self) -> None:
        self.stream.rank.synchronize("a stream", [self.stream])


class Cuda:
    """The names of torch.cuda that the package uses."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def Stream(self, device: torch.device) -> StreamHandle:  # noqa: N802
        rank = self.machine.here
        return StreamHandle(self, rank.new_stream(f"side {len(rank.streams)}"))

    def Event(self, enable_timing: bool = False, blocking: bool = False) -> Event:  # noqa: N802
        return Event(self)

    def current_stream(self, device: torch.device) -> StreamHandle:
        return StreamHandle(self, self.machine.here.current)

    @contextmanager
    def stream(self, handle: StreamHandle | None) -> Iterator[None]:
        rank = self.machine.here
        before = rank.current
        rank.current = before if handle is None else handle.stream
        try:
            yield
        finally:
            rank.current = before

    def synchronize(self, device: torch.device | None = None) -> None:
        self.machine.here.synchronize("synchronize()")

    def device(self, device: torch.device) -> AbstractContextManager[None]:
        return nullcontext()


class Clock:
    """As the module time, for a probe. Between two readings a link's messages are queued and nothing else."""

    ALLOWED = ("event", "wait for", "before", "send to", "receive from")

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def perf_counter(self) -> float:
        rank = self.machine.here
        other = [name for name in rank.log or () if not name.startswith(self.ALLOWED)]
        if other:
            raise ModelError(f"{rank}: a probe's clock runs during {other}")
        rank.log = [] if rank.log is None else None
        return self.machine.random.uniform(1.0, 2.0)


class Codes:
    """As the kernels of the transform codec: what they read and write."""

    @staticmethod
    def write_codes_(rows: torch.Tensor, coding: Any, seed: int, codes: torch.Tensor) -> None:
        codes.copy_((rows + coding.means)[:, :1].to(torch.int16).expand_as(codes))

    @staticmethod
    def read_codes(codes: torch.Tensor, coding: Any, scales: torch.Tensor, seed: int) -> torch.Tensor:
        return codes[:, :1] * coding.deviations * scales[:, None] + coding.means

    apply_ = staticmethod(transform_reference.apply_)

    @staticmethod
    def multiply(integers: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        return integers + basis[:1]


class Job:
    """What a `Thread` was given, done when its result is asked for."""

    def __init__(self, machine: Machine, work: Any, arguments: tuple[Any, ...]) -> None:
        self.machine = machine
        self.work = work
        self.arguments = arguments
        self.found: Any = None

    def done(self) -> bool:
        return self.work is None

    def result(self) -> Any:
        """The thread waits for the device: the host only where it asks for what it gave a moment ago."""
        if self.work is not None:
            rank, work, self.work = self.machine.here, self.work, None
            forbids, rank.forbids_syncs = rank.forbids_syncs, False
            self.found = work(*self.arguments)
            rank.forbids_syncs = forbids
        return self.found


class Thread:
    """As a thread beside the host's own, which works when it must."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def submit(self, work: Any, *arguments: Any) -> Job:
        return Job(self.machine, work, arguments)


class Learner:
    """As a thread beside the host's own, which ends when its result is asked for."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.arguments: tuple[Any, ...] = ()

    def submit(self, compute: Any, *arguments: Any) -> "Learner":
        self.arguments = arguments
        return self

    def shutdown(self, wait: bool) -> None:
        pass

    def result(self) -> dict[str, torch.Tensor]:
        """Of the right sizes. It has read what was copied before: the thread waited for that, not the
        host."""
        _, wait, layout, _ = self.arguments
        rank, self.arguments = self.machine.here, ()
        forbids, rank.forbids_syncs = rank.forbids_syncs, False
        wait()
        rank.forbids_syncs = forbids
        size = layout.num_coordinates
        found = {"computed": torch.empty(layout.nbytes, dtype=torch.int8, pin_memory=True)}
        if layout.has_basis:
            found["inverse_CC"] = torch.empty(size, size, pin_memory=True)
        return found


@contextmanager
def torch_on(machine: Machine, backend: str = "nccl") -> Iterator[ProcessGroups]:
    """The package's streams and process groups are the machine's."""
    memories = {rank.number: Memory(rank) for rank in machine.ranks}
    dist = ProcessGroups(machine, backend, lambda tensor: memories[machine.here.number].block_of(tensor))
    machine.memories = memories  # type: ignore[attr-defined]
    with ExitStack() as stack:
        for module, name, value in (
            (streams, "cuda", Cuda(machine)),
            (streams, "ASYNCHRONOUS", ("meta",)),
            (streams, "autocast", lambda device_type, enabled: nullcontext()),
            (wire, "dist", dist),
            (groups, "dist", dist),
            (measurement, "time", Clock(machine)),
            (transform, "_implementation", lambda tensor: Codes),
            (learning, "ThreadPoolExecutor", lambda num_threads: Learner(machine)),
            (disk, "Worker", lambda: Thread(machine)),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield dist


@contextmanager
def tracking(rank: Rank) -> Iterator[None]:
    """Around the program of a rank."""
    with Tracking(rank.machine.memories[rank.number]):  # type: ignore[attr-defined]
        yield
