"""Messages of bytes between the two ends of a link.

A message is one contiguous uint8 tensor whose size both ends know beforehand. Sends return at once and
keep their payload until it has gone; receives are announced, so that bytes arrive while the stage
computes. No two directions or links of a rank share a process group, so that none queues behind another.
Within a direction of a link messages keep their order.

On a GPU all of it is queued: payloads are written and read on a stream beside the one that computes, and
nothing waits on the host but `drain` and `wait_for_arrivals`.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from clapping_ds.link.groups import find_carrier, naming_peer
from clapping_ds.streams import SideStream

POLL_S = 1e-3


class Pending(NamedTuple):
    """A message on its way. work: None where there are no bytes to wait for."""

    work: Any
    carried: torch.Tensor
    """The bytes where the process group reads or writes them."""


class Wire:
    """One direction of one link, seen from one of its ends.

    peer           global rank at the other end
    device         where payloads are written and read
    group          process group of this direction; None: the default group
    most_pending   sends that may be on their way while another payload is written
    tag            of all messages, where several wires share a gloo group
    """

    def __init__(
        self, peer: int, device: torch.device, group: Any = None, most_pending: int = 1, tag: int = 0
    ) -> None:
        # Configuration
        self.peer = peer
        self.device = device
        self.group = group
        self.most_pending = most_pending
        self.tag = tag
        self.carrier = find_carrier(group, device)
        self.side = SideStream(device)
        # State
        self.payloads = Buffers(self.side, device)
        self.carried = self.payloads if self.carrier == device else Buffers(self.side, self.carrier)
        self._sending: deque[Pending] = deque()
        self._arriving: deque[Pending] = deque()
        self._awaited: deque[Any] = deque()
        """Receives that the side stream waits for, and that the host has not seen complete."""
        self._done: Any = None
        """Event: the last payload is written or read."""

    @contextmanager
    def working(self, after_compute: bool = False) -> Iterator[None]:
        """Where payloads are written and read: beside compute, which goes on once `send` or `done_with` has
        its payload. after_compute: what compute has queued so far is used inside."""
        if after_compute:
            self.side.follow()
        self._done = None
        try:
            with self.side.active():
                yield
        except BaseException:
            self._done = self.side.mark()
            raise
        finally:
            self.side.hold_compute(self._done)

    def new_payload(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] to be written and handed to `send`. All sends but the last `most_pending` have
        gone then."""
        self._release(self.most_pending)
        return self.payloads.lend(num_bytes)

    def send(self, payload: torch.Tensor) -> None:
        """Starts to send what `new_payload` gave; of no bytes, nothing is sent."""
        self._done = self.side.mark()
        if payload.numel() == 0:
            self.payloads.take_back(payload)
            return
        carried = payload
        if self.carried is not self.payloads:
            carried = self.carried.lend(payload.numel()).copy_(payload, non_blocking=True)
            self.payloads.take_back(payload)
            self.side.wait()  # gloo reads bytes from the host
        with naming_peer(self.peer):
            work = dist.isend(carried, dst=self.peer, group=self.group, tag=self.tag)
        self._sending.append(Pending(work, carried))

    def expect(self, num_bytes: int) -> None:
        """Announces the peer's next message, in order, so that it can arrive before `receive` asks."""
        with self.side.active(), naming_peer(self.peer):
            carried = self.carried.lend(num_bytes)
            receives = num_bytes > 0
            work = dist.irecv(carried, self.peer, self.group, self.tag) if receives else None
        self._arriving.append(Pending(work, carried))

    def receive(self) -> torch.Tensor:
        """The message that was expected first: uint8, to be read and handed to `done_with`."""
        work, carried = self._arriving.popleft()
        if work is not None:
            with naming_peer(self.peer):
                work.wait()
            if self.carrier.type != "cpu":
                self._awaited.append(work)
        if self.carried is self.payloads:
            return carried
        payload = self.payloads.lend(carried.numel()).copy_(carried, non_blocking=True)
        self.carried.take_back(carried)
        return payload

    def done_with(self, payload: torch.Tensor) -> None:
        """Gives back what `receive` gave."""
        self._done = self.side.mark()
        self.payloads.take_back(payload)

    def wait_for_arrivals(self, timeout_s: float) -> None:
        """The host waits until all that `receive` was asked for is there. Where `receive` itself only queues
        (NCCL), a peer that is gone is found here. Raises ConnectionError after so long without a message."""
        deadline_s = time.monotonic() + timeout_s
        while self._awaited:
            if self._awaited[0].is_completed():
                with naming_peer(self.peer):
                    self._awaited.popleft().wait()  # one that failed is complete as well, and raises here
                deadline_s = time.monotonic() + timeout_s
            elif time.monotonic() > deadline_s:
                raise ConnectionError(f"rank {self.peer} ended or was silent for more than {timeout_s:g} s")
            else:
                time.sleep(POLL_S)

    def drain(self) -> None:
        """Lets go of all that was sent: after it, on the host (gloo) or on the side stream (NCCL), all of it
        has gone."""
        with self.side.active():
            self._release(0)

    @property
    def most_payloads(self) -> int:
        """How many payloads were held at the same time at most, since the start."""
        return max(self.payloads.num_made, self.carried.num_made)

    def _release(self, most_pending: int) -> None:
        while len(self._sending) > most_pending:
            work, carried = self._sending.popleft()
            with naming_peer(self.peer):
                work.wait()
            self.carried.take_back(carried)


class Buffers:
    """Byte tensors that are allocated once and lent again and again, in the order of one stream: that of
    `side`, which must be active. On the CPU beside a GPU they are pinned, and wait for the GPU's copies."""

    def __init__(self, side: SideStream, device: torch.device) -> None:
        self.side = side
        self.device = device
        self.is_pinned = device.type == "cpu" and side.stream is not None
        self.num_made = 0
        self._most_bytes = 0
        self._free: deque[tuple[torch.Tensor, Any]] = deque()
        """Each with the event after which the host may use it."""

    def lend(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes], not initialised."""
        self._most_bytes = max(self._most_bytes, num_bytes)
        if self._free:
            buffer, copied = self._free.popleft()
            if copied is not None:
                copied.synchronize()
        else:
            buffer = self._new()
            self.num_made += 1
        if buffer.numel() < num_bytes:
            buffer = self._new()
        return buffer[:num_bytes]

    def take_back(self, lent: torch.Tensor) -> None:
        whole = torch.empty(0, dtype=torch.uint8, device=self.device).set_(lent.untyped_storage())
        self._free.append((whole, self.side.mark() if self.is_pinned else None))

    def _new(self) -> torch.Tensor:
        """As large as any that was lent, so that keys and deltas fit into the same ones."""
        return torch.empty(self._most_bytes, dtype=torch.uint8, device=self.device, pin_memory=self.is_pinned)
