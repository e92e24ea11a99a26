"""Ways to break the package on a GPU, each by a change of a few lines, and a pipeline that shows it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import gettempdir
from typing import Any, NamedTuple
from unittest import mock

import torch

from clapping_ds import streams
from clapping_ds.autotune import measurement
from clapping_ds.codecs import learning
from clapping_ds.hosts.deepspeed import engine as deepspeed_engine
from clapping_ds.link import groups, memories
from clapping_ds.link.channel import Arrivals, Channel
from clapping_ds.link.groups import Control
from clapping_ds.link.memories import Memories
from clapping_ds.link.traffic import Traffic
from clapping_ds.link.wire import Buffers, Pending, Wire
from clapping_ds.stage.endpoint import Endpoint
from clapping_ds.streams import SideStream, Stopwatch
from tests.gpu_model.cases import LEARNING, AllocationError, check
from tests.gpu_model.machine import ModelError
from tests.gpu_model.program import Case

NONE = {"activations": {"codec": "none"}, "gradients": {"codec": "none"}}
INT8 = {"key": "none", "delta": {"name": "int8", "group_size": 16}, "min_numel": 16}
LAZY = {"strategy": "key_delta", "lazy": {"refresh": "cycle"}, "activations": INT8, "gradients": INT8}
DISK = {"device": "disk", "folder": gettempdir()}
ON_CPU = {**LAZY, "memory": {"device": "cpu"}}

PLAIN = Case(3, 8, num_steps=3, block={**NONE, "in_flight": 1})
SYNCS = Case(3, 8, num_steps=3, block={**NONE, "in_flight": 1}, syncs=0.3)
STATIC = Case(2, 6, num_steps=2, block={**NONE, "in_flight": 1}, has_static_outputs=True)
STEADY = Case(2, 4, num_steps=6, block={**NONE, "in_flight": 1})
MEASURED = Case(2, 4, num_steps=5, block={**NONE, "in_flight": "auto"})
LAZILY = Case(2, 4, num_steps=4, block={**LAZY, "in_flight": 1})
VISITING = Case(2, 4, num_steps=4, block={**ON_CPU, "in_flight": 1})
ON_DISK = Case(2, 4, num_steps=6, block={**LAZY, "memory": DISK, "in_flight": 1})
ON_GLOO = Case(2, 6, num_steps=3, block={**NONE, "in_flight": 1}, backend="gloo")
REPORTS = Case(2, 4, num_steps=4, block={**LAZY, "in_flight": 1}, steps_per_print=2)
DYNAMIC = Case(2, 13, num_steps=3, block={**NONE, "in_flight": 2}, syncs=0.5, is_dynamic=True)
DEEP = Case(4, 8, num_steps=3, block={**NONE, "in_flight": 2}, syncs=0.5)
TORCH = Case(2, 8, num_steps=3, block=NONE, syncs=0.3, host="torch", schedule="Schedule1F1B")
LEARNED = {"codec": LEARNING, "min_numel": 16}
LEARNS = Case(num_steps=8, block={"activations": LEARNED, "gradients": LEARNED}, shape=(64, 64))


class Mutation(NamedTuple):
    """defect: of those that an adversarial reading found, by number; 0: another one."""

    name: str
    defect: int
    case: Case
    patches: dict[tuple[Any, str], Any]


def _expect_beside(self: Wire, num_bytes: int) -> None:
    """The buffer comes from the compute stream."""
    with in_compute():
        carried = self.carried.lend(num_bytes)
    with self.side.active():
        self._arriving.append(Pending(groups.dist.irecv(carried, self.peer, self.group, self.tag), carried))


def _announce_all(self: Endpoint, end: Any) -> int:
    return len(self.fresh)


@contextmanager
def _running_between_syncs(self: Stopwatch) -> Iterator[None]:
    streams.wait_for_device(self.device)
    yield
    streams.wait_for_device(self.device)


def _hold_nothing(self: SideStream, event: Any) -> None:
    pass


def _follow_nothing(self: SideStream, event: Any = None) -> None:
    pass


def _follow_compute_alone(self: SideStream, event: Any = None) -> None:
    if event is None:
        real_follow(self)


def _receive_without_waiting(self: Wire) -> torch.Tensor:
    if self.device.type == "cpu":
        return real_wire_receive(self)
    _, carried = self._arriving.popleft()
    return carried


def _send_and_take_back(self: Wire, payload: torch.Tensor) -> None:
    real_send(self, payload)
    _, carried = self._sending.pop()
    self.carried.take_back(carried)


def _release_without_waiting(self: Wire, most_pending: int) -> None:
    while len(self._sending) > most_pending:
        self.carried.take_back(self._sending.popleft().carried)


def _send_from_compute(self: Wire, payload: torch.Tensor) -> None:
    """Before the encoding is over."""
    with in_compute():
        real_send(self, payload)


def _start_in_default_group(self: Control, timeout_s: float) -> None:
    self.timeout_s, self.group = timeout_s, groups.dist.world


def _arrivals_beside(self: Channel, specs: Any) -> Arrivals:
    """What compute reads, and gives back, belongs to the side stream."""
    with self.wire.side.active():
        return real_arrivals(self, specs)


def _new_each_time(self: Buffers, num_bytes: int) -> torch.Tensor:
    self._most_bytes = num_bytes
    return self._new()


def _fetch_in_compute(self: Memories, memory: torch.Tensor) -> torch.Tensor:
    with in_compute():
        return real_fetch(self, memory)


def _new_unpinned(self: Memories, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="cpu")


def _mark_nothing(device: torch.device) -> Any:
    return lambda: None


def _not_asynchronous(device: torch.device) -> bool:
    return False


@contextmanager
def in_compute() -> Iterator[None]:
    """The side stream's work goes to the compute stream."""
    rank = streams.cuda.machine.here
    before, rank.current = rank.current, rank.compute
    try:
        yield
    finally:
        rank.current = before


def _count_at_once(self: Traffic, value: torch.Tensor, reconstruction: torch.Tensor) -> None:
    real_count_error(self, value, reconstruction)
    self.settle()


def _agree_on_gpu(self: Control, answers: Any) -> list[bool]:
    votes = torch.zeros(len(answers), device="meta")
    groups.dist.all_reduce(votes, group=groups.dist.world)
    return [bool(vote.item()) for vote in votes]


def _expect_early(self: Endpoint, end: Any, specs: Any, looks_ahead: bool = True) -> list[torch.Tensor]:
    """The next message is announced before this one is waited for, on both ends of a link."""
    self.expect(end, specs, min(self._num_received[end] + 2, len(self.fresh) - 1))
    return real_receive(self, end, specs, looks_ahead)


def _prepare_in_clock(wire: Wire, num_bytes: int) -> torch.Tensor:
    """The payload is made when it is sent, within the clock."""
    return torch.empty(num_bytes, dtype=torch.uint8, device="meta")


def _send_late(wire: Wire, payload: torch.Tensor) -> None:
    real_probe_send(wire, real_prepare(wire, payload.numel()))


real_follow = SideStream.follow
real_send = Wire.send
real_receive = Endpoint.receive
real_wire_receive = Wire.receive
real_arrivals = Channel._new_arrivals
real_count_error = Traffic.count_error
real_probe_send = measurement._send
real_prepare = measurement._prepare
real_fetch = Memories.fetch


def _never(self: Any) -> bool:
    return False


def _no_leads(self: Any) -> dict[Any, int]:
    return {}


def _wait_not(self: SideStream) -> None:
    pass


ENGINE = deepspeed_engine.ClappingPipelineEngine

MUTATIONS = [
    Mutation("all is announced when a step starts", 1, SYNCS, {(Endpoint, "_count_ahead"): _announce_all}),
    Mutation("a few too many are announced, at both ends", 1, SYNCS, {(Endpoint, "receive"): _expect_early}),
    Mutation("the same with torch's schedules", 1, TORCH, {(Endpoint, "_count_ahead"): _announce_all}),
    Mutation("nothing is announced ahead in our order", 1, DEEP, {(ENGINE, "_find_leads"): _no_leads}),
    Mutation("told shapes do not bring stock's order", 1, DYNAMIC, {(ENGINE, "_needs_stock_order"): _never}),
    Mutation(
        "passes are timed between waits for the device",
        1,
        MEASURED,
        {(Stopwatch, "running"): _running_between_syncs, (Endpoint, "_count_ahead"): _announce_all},
    ),
    Mutation(
        "the handshake goes over the default group",
        2,
        PLAIN,
        {(Control, "__init__"): _start_in_default_group},
    ),
    Mutation(
        "a receive's buffer comes from the compute stream",
        3,
        PLAIN,
        {(Wire, "expect"): _expect_beside, (Buffers, "lend"): _new_each_time},
    ),
    Mutation("compute waits for no codec", 7, STATIC, {(SideStream, "hold_compute"): _hold_nothing}),
    Mutation(
        "payloads of a probe are made within its clock",
        8,
        MEASURED,
        {(measurement, "_prepare"): _prepare_in_clock, (measurement, "_send"): _send_late},
    ),
    Mutation("votes go over NCCL", 9, LAZILY, {(Control, "agree"): _agree_on_gpu}),
    Mutation("encoding does not wait for the value", 0, PLAIN, {(SideStream, "follow"): _follow_nothing}),
    Mutation(
        "decoding does not wait for its target's memory",
        0,
        PLAIN,
        {(SideStream, "follow"): _follow_compute_alone},
    ),
    Mutation(
        "decoding does not wait for its message", 0, PLAIN, {(Wire, "receive"): _receive_without_waiting}
    ),
    Mutation(
        "a payload is written again before it has gone", 0, PLAIN, {(Wire, "send"): _send_and_take_back}
    ),
    Mutation(
        "payloads are taken back without a wait", 0, PLAIN, {(Wire, "_release"): _release_without_waiting}
    ),
    Mutation("a send does not wait for its encoding", 0, PLAIN, {(Wire, "send"): _send_from_compute}),
    Mutation(
        "what arrives is allocated on the side stream",
        0,
        PLAIN,
        {(Channel, "_new_arrivals"): _arrivals_beside},
    ),
    Mutation("payloads are new each time", 0, STEADY, {(Buffers, "lend"): _new_each_time}),
    Mutation("errors are read message by message", 0, REPORTS, {(Traffic, "count_error"): _count_at_once}),
    Mutation(
        "memories are fetched by the compute stream", 0, VISITING, {(Memories, "fetch"): _fetch_in_compute}
    ),
    Mutation(
        "what goes into a file is taken before it is there",
        15,
        ON_DISK,
        {(memories, "mark"): _mark_nothing},
    ),
    Mutation("memories on the CPU are not pinned", 15, VISITING, {(Memories, "new"): _new_unpinned}),
    Mutation(
        "rows that are learned from are not pinned",
        0,
        LEARNS,
        {(learning, "is_asynchronous"): _not_asynchronous},
    ),
    Mutation("gloo reads what the GPU has not copied", 15, ON_GLOO, {(SideStream, "wait"): _wait_not}),
]


def find(mutation: Mutation | None, case: Case, num_seeds: int) -> BaseException | None:
    """What the model says of a case with a mutation, in the first of so many orders that show it."""
    for seed in range(num_seeds):
        with ExitStack() as stack:
            for (owner, name), value in ({} if mutation is None else mutation.patches).items():
                stack.enter_context(mock.patch.object(owner, name, value))
            try:
                check(case, seed)
            except (ModelError, AllocationError) as error:
                return error
    return None
