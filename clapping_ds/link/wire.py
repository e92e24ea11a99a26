"""Messages of bytes between the two ends of a link.

A message is one contiguous uint8 tensor whose size both ends know beforehand. Sends return at once and
keep their payload until it has gone; receives are announced, so that bytes arrive while the stage
computes. Each direction of a link has a process group of its own, so that none queues behind another.
Within a direction of a link messages keep their order.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from clapping_ds.link.groups import find_carrier


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
    most_pending   sends that may be on their way while another payload is written, and messages
                   that may be announced beyond the one that is waited for
    overlaps       False: a send returns when its payload has gone
    """

    def __init__(
        self, peer: int, device: torch.device, group: Any = None, most_pending: int = 1, overlaps: bool = True
    ) -> None:
        # Configuration
        self.peer = peer
        self.device = device
        self.group = group
        self.most_pending = most_pending
        self.overlaps = overlaps
        self.carrier = find_carrier(group, device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # State
        self.payloads = Buffers(device)
        self.carried = self.payloads if self.carrier == device else Buffers(self.carrier)
        self._sending: deque[Pending] = deque()
        self._arriving: deque[Pending] = deque()

    @contextmanager
    def working(self, *values: torch.Tensor) -> Iterator[None]:
        """Where payloads are written and read: on CUDA a stream beside the compute stream, after what
        that has queued so far. values: tensors of the compute stream that are used inside."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        for value in values:
            value.record_stream(self.stream)

    def join(self) -> None:
        """What the compute stream queues from now on comes after the work on payloads so far."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def new_payload(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] to be written and handed to `send`. Waits while too many are on their way."""
        self._release(self.most_pending)
        return self.payloads.lend(num_bytes)

    def send(self, payload: torch.Tensor) -> None:
        """Starts to send what `new_payload` gave; of no bytes, nothing is sent."""
        if payload.numel():
            carried = self._moved(payload, self.carried)
            with torch.cuda.stream(self.stream), self._naming_peer():
                work = dist.isend(carried, dst=self.peer, group=self.group)
            self._sending.append(Pending(work, carried))
        else:
            self.payloads.take_back(payload)
        if not self.overlaps:
            self.drain()

    def expect(self, num_bytes: int) -> None:
        """Announces the peer's next message, in order, so that it can arrive before `receive` asks."""
        carried = self.carried.lend(num_bytes)
        with torch.cuda.stream(self.stream), self._naming_peer():
            work = dist.irecv(carried, src=self.peer, group=self.group) if num_bytes else None
        self._arriving.append(Pending(work, carried))

    def receive(self) -> torch.Tensor:
        """The message that was expected first: uint8, to be read and handed to `done_with`."""
        work, carried = self._arriving.popleft()
        with torch.cuda.stream(self.stream):
            if work is not None:
                with self._naming_peer():
                    work.wait()
            return self._moved(carried, self.payloads)

    def done_with(self, payload: torch.Tensor) -> None:
        """Gives back what `receive` gave."""
        self.payloads.take_back(payload)

    def drain(self) -> None:
        """Waits until everything sent has gone."""
        self._release(0)

    @property
    def most_payloads(self) -> int:
        """How many payloads were held at the same time at most, since the start."""
        return max(self.payloads.num_made, self.carried.num_made)

    def _release(self, most_pending: int) -> None:
        while self._sending and (len(self._sending) > most_pending or self._sending[0].work.is_completed()):
            work, carried = self._sending.popleft()
            with torch.cuda.stream(self.stream), self._naming_peer():
                work.wait()
            self.carried.take_back(carried)

    @contextmanager
    def _naming_peer(self) -> Iterator[None]:
        """Where the process group may fail: when a message is waited for, or when another one is started
        after the connection broke."""
        try:
            yield
        except RuntimeError as error:
            raise ConnectionError(f"rank {self.peer} ended or was silent for too long ({error})") from error

    def _moved(self, payload: torch.Tensor, target: "Buffers") -> torch.Tensor:
        """The payload on the target's device. Between GPU and CPU this waits for one copy, not for the
        device: the host needs the bytes before gloo may read them."""
        if self.carried is self.payloads:
            return payload
        source = self.payloads if target is self.carried else self.carried
        moved = target.lend(payload.numel()).copy_(payload, non_blocking=True)
        if self.stream is not None:
            self.stream.record_event().synchronize()
        source.take_back(payload)
        return moved


class Buffers:
    """Byte tensors that are allocated once and lent again and again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_made = 0
        self._free: list[torch.UntypedStorage] = []

    def lend(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes], not initialised."""
        if not self._free:
            self._free.append(torch.UntypedStorage(0, device=self.device))
            self.num_made += 1
        storage = self._free.pop()
        if storage.nbytes() < num_bytes:
            storage = torch.UntypedStorage(num_bytes, device=self.device)
        lent = torch.empty(0, dtype=torch.uint8, device=self.device)
        return lent.set_(storage, 0, (num_bytes,), (1,))

    def take_back(self, lent: torch.Tensor) -> None:
        self._free.append(lent.untyped_storage())
