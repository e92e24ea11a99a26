"""Streams of a GPU beside the one that computes, and time on a device. On the CPU work is done in order, at
once, and there is nothing to do.

This is the only file of the package that uses CUDA's streams and events (on AMD GPUs torch gives HIP's the
same names).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import autocast, cuda

ASYNCHRONOUS = ("cuda",)
"""Types of devices whose work is queued."""


def is_asynchronous(device: torch.device) -> bool:
    """Whether work is queued there. Memory of the host that it copies from or to should be pinned."""
    return device.type in ASYNCHRONOUS


class SideStream:
    """A stream of a device beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = cuda.Stream(device) if is_asynchronous(device) else None

    @contextmanager
    def active(self) -> Iterator[None]:
        """What is queued inside goes to this stream, and memory that is allocated inside belongs to it.
        Autocast is off inside: codecs compute in fp32."""
        with cuda.stream(self.stream), autocast(self.device.type, enabled=False):
            yield

    def follow(self, event: Any = None) -> None:
        """What this stream gets from now on comes after the event; None: after all that compute has got."""
        if self.stream is not None:
            self.stream.wait_event(self.mark_compute() if event is None else event)

    def mark_compute(self) -> Any:
        """An event after all that compute has queued so far; None on the CPU."""
        return None if self.stream is None else cuda.current_stream(self.device).record_event()

    def mark(self) -> Any:
        """An event after all that this stream has got so far; None on the CPU."""
        return None if self.stream is None else self.stream.record_event()

    def hold_compute(self, event: Any) -> None:
        """What compute queues from now on comes after the event. None: nothing to wait for."""
        if event is not None:
            cuda.current_stream(self.device).wait_event(event)

    def wait(self) -> None:
        """The host waits for all that this stream has got so far."""
        if self.stream is not None:
            self.stream.synchronize()


def mark(device: torch.device) -> Callable[[], None]:
    """Waits, when called, for what the current stream has got so far; any thread may call it."""
    if not is_asynchronous(device):
        return lambda: None
    event = cuda.Event(blocking=True)
    event.record(cuda.current_stream(device))

    def wait() -> None:
        with cuda.device(device):  # a thread of its own begins on the first GPU
            event.synchronize()

    return wait


class Stopwatch:
    """Time that a device spends on pieces of work. Nothing waits for the device before the time is read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._elapsed_s = 0.0
        self._pieces: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around each piece."""
        if not is_asynchronous(self.device):
            start_s = time.perf_counter()
            yield
            self._elapsed_s += time.perf_counter() - start_s
            return
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record(cuda.current_stream(self.device))
        yield
        end.record(cuda.current_stream(self.device))
        self._pieces.append((start, end))

    def read_s(self) -> float:
        """Of all pieces so far. The host waits for the last one."""
        for start, end in self._pieces:
            end.synchronize()
            self._elapsed_s += start.elapsed_time(end) / 1e3
        self._pieces.clear()
        return self._elapsed_s


def wait_for_device(device: torch.device) -> None:
    """The host waits for all that the device was asked to do so far."""
    if is_asynchronous(device):
        cuda.synchronize(device)
