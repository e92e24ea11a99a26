"""Memory in a file, and its way to a device that works asynchronously: through pinned memory, which threads
read and write, so that nobody waits for a disk but for what is not there yet."""

import mmap
import os
import shutil
import socket
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NamedTuple
from weakref import finalize

import torch

LARGEST_GROWTH_BYTES = 1 << 30
"""Of a file of up to eight times as much."""
PATIENCE_S = 10.0
"""With a thread, when it is to end."""


class DiskError(RuntimeError):
    """A disk has no room for a memory."""


def _name(folder: str) -> str:
    """As errors name it."""
    return f"clapping.memory.folder = {folder!r} on {socket.gethostname()}"


def check_folder(folder: str) -> None:
    """Raises ValueError if no file can be made there."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"{_name(folder)}: {error.strerror}; accepted: a folder that can be written"
        ) from None


def measure_disk(folder: str) -> tuple[tuple[str, int], int]:
    """Which disk of which machine it is, and how many bytes are free. Raises ValueError if it is gone."""
    try:
        return (socket.gethostname(), os.stat(folder).st_dev), shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(f"{_name(folder)}: {error.strerror}; accepted: a folder that stays") from None


class Piece(NamedTuple):
    """Of a file: whole pages."""

    bytes: torch.Tensor
    pages: mmap.mmap
    start: int
    """In `pages`."""


class MappedFile:
    """Memory of a file that no folder shows, so that it is gone when the process is, however that ends."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (open as long as this is)
        finalize(self, self._file.close)
        self._num_bytes = 0
        self._pieces: dict[int, Piece] = {}
        """By address."""
        self._free: defaultdict[int, list[Piece]] = defaultdict(list)
        """By size."""
        self._left: list[Piece] = []
        """What the file grew by and nobody has."""

    def new(self, num_bytes: int) -> torch.Tensor:
        """Zeros, uint8 [num_bytes]. Raises DiskError where the disk is full: to find that out later, at a
        page that has no place there, would end the process."""
        size = round_up(num_bytes)
        if self._free[size]:
            piece = self._free[size].pop()
            piece.bytes.zero_()
        else:
            piece = self._cut(size)
        self._pieces[piece.bytes.data_ptr()] = piece
        return piece.bytes[:num_bytes]

    def free(self, memory: torch.Tensor) -> None:
        """Of what `new` gave: it may be given again."""
        piece = self._pieces.pop(memory.data_ptr())
        self._free[len(piece.bytes)].append(piece)

    def advise(self, memory: torch.Tensor) -> None:
        """Has the system read what `new` gave, which will be needed."""
        piece = self._pieces[memory.data_ptr()]
        piece.pages.madvise(mmap.MADV_WILLNEED, piece.start, len(piece.bytes))

    def _cut(self, size: int) -> Piece:
        """So many bytes that nobody has."""
        fitting = (number for number, piece in enumerate(self._left) if len(piece.bytes) >= size)
        number = next(fitting, None)
        left = self._grow(size) if number is None else self._left.pop(number)
        if len(left.bytes) > size:
            self._left.append(_piece(left.pages, left.start + size, len(left.bytes) - size))
        return _piece(left.pages, left.start, size)

    @property
    def unused_bytes(self) -> int:
        """Of what the file has taken of its disk."""
        free = sum(size * len(pieces) for size, pieces in self._free.items())
        return free + sum(len(piece.bytes) for piece in self._left)

    def _grow(self, size: int) -> Piece:
        """By a multiple of a size. The file doubles at first, so that it has few maps, each of which keeps a
        descriptor."""
        most = min(self._num_bytes, max(LARGEST_GROWTH_BYTES, self._num_bytes // 8))
        try:
            return self._grow_by(size * max(1, most // size))
        except OSError:
            pass  # there may be room for less
        try:
            return self._grow_by(size)
        except OSError as error:
            raise DiskError(
                f"{_name(self.folder)}: no room for {size} bytes beside {self._num_bytes} "
                f"({error.strerror}); accepted: a folder with more room"
            ) from None

    def _grow_by(self, growth: int) -> Piece:
        os.posix_fallocate(self._file.fileno(), self._num_bytes, growth)
        pages = mmap.mmap(self._file.fileno(), growth, offset=self._num_bytes)
        self._num_bytes += growth
        return _piece(pages, 0, growth)


def round_up(num_bytes: int) -> int:
    """To whole pages, and to one of four sizes between two powers of two: what is freed fits again."""
    step = max(mmap.PAGESIZE, 1 << max(0, num_bytes.bit_length() - 3))
    return -(-num_bytes // step) * step


def _piece(pages: mmap.mmap, start: int, size: int) -> Piece:
    return Piece(torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=start), pages, start)


class Worker:
    """A thread that does what it is given, in order. The process waits for it when it ends, but not for long:
    it may wait for a device that waits for a rank that is gone."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Any] = SimpleQueue()
        thread = threading.Thread(target=_work, args=[self._jobs], daemon=True)
        thread.start()
        finalize(self, _end, self._jobs, thread)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self._jobs.put((future, function, arguments))
        return future


def _end(jobs: "SimpleQueue[Any]", thread: threading.Thread) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join(PATIENCE_S)


def _work(jobs: "SimpleQueue[Any]") -> None:
    while (job := jobs.get()) is not None:
        future, function, arguments = job
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # whoever asks for the result gets it
            future.set_exception(error)
        del job, future, function, arguments


class Staging:
    """Pinned copies of memories that are in a file. Of each there is at most one."""

    def __init__(self) -> None:
        self._reader, self._writer = Worker(), Worker()
        self._copies: dict[int, tuple[torch.Tensor, Future[torch.Tensor]]] = {}
        """By identity of the memory: it, and its copy."""
        self._written: dict[int, tuple[torch.Tensor, Future[None]]] = {}
        """By identity of the memory: it, and that it will have what was written last."""
        self._free: defaultdict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = defaultdict(list)

    def read(self, memory: torch.Tensor) -> None:
        """Has a copy made, after what is being written there."""
        if id(memory) not in self._copies:
            free = self._free[memory.shape, memory.dtype]
            copy = free.pop() if free else torch.empty_like(memory, pin_memory=True)
            _, written = self._written.pop(id(memory), (memory, None))
            self._copies[id(memory)] = memory, self._reader.submit(_read, memory, copy, written)

    def copy_of(self, memory: torch.Tensor) -> torch.Tensor:
        """Waits for the copy."""
        self.read(memory)
        return self._copies[id(memory)][1].result()

    def write(self, memory: torch.Tensor, wait: Callable[[], None]) -> None:
        """Ends a copy, which has what is to be written once `wait` returns."""
        _, copy = self._copies.pop(id(memory))
        for key in [key for key, (_, written) in self._written.items() if written.done()]:
            self._written.pop(key)[1].result()
        written = self._writer.submit(self._write, memory, copy.result(), wait)
        self._written[id(memory)] = memory, written

    def drop(self) -> None:
        """Ends all copies. What still uses one keeps it."""
        self._copies.clear()

    def settle(self) -> None:
        """Waits until all is written, and all copies are there, which some of it may have been left to."""
        for _, copy in self._copies.values():
            copy.result()
        for _, written in self._written.values():
            written.result()
        self._written.clear()

    def _write(self, memory: torch.Tensor, copy: torch.Tensor, wait: Callable[[], None]) -> None:
        wait()
        memory.copy_(copy)
        self._free[copy.shape, copy.dtype].append(copy)


def _read(memory: torch.Tensor, copy: torch.Tensor, written: "Future[None] | None") -> torch.Tensor:
    if written is not None:
        written.result()
    return copy.copy_(memory)
