"""A small discrete model of several ranks with a GPU each, on the CPU: streams, events, memory, messages.

Every rank is a host thread that queues work on the streams of its device. What is queued runs later, in any
order that the rules allow, drawn at random:

* work on one stream runs in order; streams are ordered by events alone
* a message of a process group on a GPU (NCCL) is work on a stream of its own, which first waits for the
  stream that was current; it runs until its counterpart runs as well, and occupies its stream so long
* `wait` of such a message makes the current stream wait, not the host
* freed memory is given to the next tensor of the stream that it was allocated on, at once
* with one hardware queue per device (CUDA_DEVICE_MAX_CONNECTIONS=1) nothing starts before all that was
  queued before it has started

The model finds deadlocks (nothing can move), and races: two accesses to the same memory, one of them a
write, that no chain of events orders. Order is kept as vector clocks: per stream, how many of its pieces of
work are known to come before.
"""

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Clock = dict["Stream", int]


class ModelError(Exception):
    """What the model found."""


class DeadlockError(ModelError):
    """Nothing can move."""


class RaceError(ModelError):
    """Two accesses to the same memory in no order."""


class HostSyncError(ModelError):
    """The host waited for the device where it should not."""


class Stopped(BaseException):
    """Ends the threads of a machine that has failed."""


def merge(first: Clock, *others: Clock) -> Clock:
    merged = dict(first)
    for clock in others:
        for stream, tick in clock.items():
            if merged.get(stream, 0) < tick:
                merged[stream] = tick
    return merged


@dataclass(eq=False)
class Work:
    """A piece of work on a stream."""

    name: str
    stream: "Stream"
    tick: int
    clock: Clock
    may_start: Callable[[], bool]
    may_end: Callable[[], bool]
    at_end: Callable[[], None]
    started: bool = False
    done: bool = False


def always() -> bool:
    return True


def nothing() -> None:
    pass


class Stream:
    """Work that runs in order."""

    def __init__(self, rank: "Rank", name: str) -> None:
        self.rank = rank
        self.name = name
        self.clock: Clock = {}
        self.queue: deque[Work] = deque()

    def add(
        self,
        name: str,
        may_start: Callable[[], bool] = always,
        may_end: Callable[[], bool] = always,
        at_end: Callable[[], None] = nothing,
    ) -> Work:
        if self.rank.log is not None:
            self.rank.log.append(name)
        tick = self.clock.get(self, 0) + 1
        self.clock = merge(self.clock, self.rank.host_clock, {self: tick})
        work = Work(name, self, tick, self.clock, may_start, may_end, at_end)
        self.queue.append(work)
        self.rank.unstarted.append(work)
        return work

    def wait_for(self, work: Work) -> None:
        """What is added from now on comes after the work."""
        self.add(f"wait for {work.name}", may_start=lambda: work.done)
        self.clock = merge(self.clock, work.clock)

    def __repr__(self) -> str:
        return f"{self.rank} {self.name}"


@dataclass(eq=False)
class Block:
    """Memory of a device, or pinned memory of its host."""

    pool: Any
    num_bytes: int
    written: Work | None = None
    read: list[Work] = field(default_factory=list)
    used_by: set["Stream"] = field(default_factory=set)
    """Streams that `record_stream` named."""


class Rank:
    """A host and its device."""

    def __init__(self, machine: "Machine", number: int) -> None:
        self.machine = machine
        self.number = number
        self.compute = Stream(self, "compute")
        self.current = self.compute
        self.streams = [self.compute]
        self.unstarted: deque[Work] = deque()
        """Of all streams, as they were queued."""
        self.host_clock: Clock = {}
        self.free: list[Block] = []
        self.still_used: list[tuple[Block, list[Work]]] = []
        self.num_allocated = 0
        self.forbids_syncs = False
        self.has_set_device = False
        self.log: list[str] | None = None
        """Of all work that is queued, while a clock runs."""
        self.baton = threading.Semaphore(0)
        self.why = "start"
        self.is_ready: Callable[[], bool] = always
        self.is_finished = False
        self.result: Any = None
        self.error: BaseException | None = None

    def __repr__(self) -> str:
        return f"rank {self.number}"

    def new_stream(self, name: str) -> Stream:
        self.streams.append(Stream(self, name))
        return self.streams[-1]

    # The host

    def pause(self, why: str, is_ready: Callable[[], bool] = always) -> None:
        """Other ranks and the devices go on, at least until `is_ready`."""
        self.why, self.is_ready = why, is_ready
        self.machine.baton.release()
        self.baton.acquire()
        if self.machine.failure is not None:
            raise Stopped

    def wait_on_host(self, work: Work) -> None:
        self.pause(f"host waits for {work.name}", lambda: work.done)
        self.host_clock = merge(self.host_clock, work.clock)

    def synchronize(self, why: str, streams: Sequence[Stream] | None = None) -> None:
        """The host waits for all that streams have got; None: all streams of the device."""
        if self.forbids_syncs:
            raise HostSyncError(f"{self}: {why}")
        chosen = self.streams if streams is None else streams
        last = [stream.queue[-1] for stream in chosen if stream.queue]
        self.pause(f"{why} waits for {[work.name for work in last]}", lambda: all(w.done for w in last))
        self.host_clock = merge(self.host_clock, *(stream.clock for stream in chosen))

    # Memory

    def allocate(self, num_bytes: int, pool: Any) -> Block:
        """pool: the stream, or "pinned"."""
        for block, works in self.still_used[:]:
            if all(work.done for work in works):
                self.host_clock = merge(self.host_clock, *(work.clock for work in works))
                self.still_used.remove((block, works))
                self.free.append(block)
        fitting = [block for block in self.free if block.pool is pool and block.num_bytes >= num_bytes]
        if fitting:
            block = min(reversed(fitting), key=lambda block: block.num_bytes)
            self.free.remove(block)
            return block
        self.num_allocated += 1
        return Block(pool, num_bytes)

    def give_back(self, block: Block) -> None:
        works = [stream.add("end of use") for stream in block.used_by]
        block.used_by = set()
        if works:
            self.still_used.append((block, works))
        else:
            self.free.append(block)

    def access(self, work: Work, reads: Iterable[Block], writes: Iterable[Block]) -> None:
        for block in reads:
            self._check(work, block.written, "reads what", "writes")
        for block in writes:
            self._check(work, block.written, "overwrites what", "writes")
            for reader in block.read:
                self._check(work, reader, "overwrites what", "reads")
        for block in reads:
            block.read.append(work)
        for block in writes:
            block.written, block.read = work, []

    def access_on_host(self, reads: Iterable[Block], writes: Iterable[Block]) -> None:
        """Of pinned memory, by what the host does itself."""
        written = [block.written for block in (*reads, *writes)]
        for work in (*written, *(read for block in writes for read in block.read)):
            if work is not None and self.host_clock.get(work.stream, 0) < work.tick:
                raise RaceError(f"{self}: the host uses what {work.stream}: {work.name} uses, in no order")

    def _check(self, work: Work, before: Work | None, does: str, did: str) -> None:
        if before is not None and work is not before and work.clock.get(before.stream, 0) < before.tick:
            raise RaceError(
                f"{work.stream}: {work.name} {does} {before.stream}: {before.name} {did}, in no order"
            )

    # The device

    def advance(self, most: int) -> bool:
        """Runs up to so many pieces of work; whether any."""
        num_run = 0
        streams = self.streams[:]
        self.machine.random.shuffle(streams)
        for stream in streams:
            while num_run < most and stream.queue and self._run(stream.queue[0]):
                num_run += 1
        return num_run > 0

    def _run(self, work: Work) -> bool:
        if not work.started and self._may_start(work):
            work.started = True
            while self.unstarted and self.unstarted[0].started:
                self.unstarted.popleft()
            if not work.may_end():
                return True
        if not (work.started and work.may_end()):
            return False
        work.done = True
        work.at_end()
        work.stream.queue.popleft()
        return True

    def _may_start(self, work: Work) -> bool:
        is_next = not self.machine.has_one_queue or self.unstarted[0] is work
        return is_next and work.may_start()


class Machine:
    """Several ranks, and the order in which things happen."""

    def __init__(self, num_ranks: int, seed: int = 0, has_one_queue: bool = False) -> None:
        self.random = random.Random(seed)
        self.has_one_queue = has_one_queue
        self.ranks = [Rank(self, number) for number in range(num_ranks)]
        self.baton = threading.Semaphore(0)
        self.failure: BaseException | None = None
        self._here = threading.local()

    @property
    def here(self) -> Rank:
        """The rank whose host is running."""
        rank: Rank = self._here.rank
        return rank

    def run(self, program: Callable[[Rank], Any]) -> list[Any]:
        """What `program` returns on each rank. Raises what the model finds, or what a rank raises."""
        threads = [threading.Thread(target=self._host, args=(rank, program)) for rank in self.ranks]
        for thread in threads:
            thread.start()
        while self.failure is None and not all(rank.is_finished for rank in self.ranks):
            self._go_on()
        for rank in self.ranks:
            rank.baton.release()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        return [rank.result for rank in self.ranks]

    def _host(self, rank: Rank, program: Callable[[Rank], Any]) -> None:
        rank.baton.acquire()
        self._here.rank = rank
        try:
            if self.failure is None:
                rank.result = program(rank)
        except Stopped:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        finally:
            rank.is_finished = True
            self.baton.release()

    def _go_on(self) -> None:
        """One host until it pauses, or some devices for a while."""
        ready = [rank for rank in self.ranks if not rank.is_finished and rank.is_ready()]
        if ready and self.random.random() < 0.7:
            rank = self.random.choice(ready)
            rank.baton.release()
            self.baton.acquire()
            return
        has_moved = [rank.advance(self.random.randint(1, 40)) for rank in self._shuffled()]
        if not ready and not any(has_moved):
            self.failure = DeadlockError(self._describe())

    def _shuffled(self) -> list[Rank]:
        return self.random.sample(self.ranks, len(self.ranks))

    def _describe(self) -> str:
        lines = []
        for rank in self.ranks:
            lines.append(f"{rank}: {'finished' if rank.is_finished else rank.why}")
            heads = [(stream, stream.queue[0]) for stream in rank.streams if stream.queue]
            lines += [
                f"  {stream.name}: {work.name} {'runs' if work.started else 'waits to start'}"
                for stream, work in heads
            ]
        return "\n".join(lines)
