"""Memory in a file, and its way to a device that works asynchronously: through pinned memory, which threads
read and write, so that nobody waits for a disk but for what is not there yet."""

import mmap
import os
import socket
import tempfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

LARGEST_GROWTH_BYTES = 1 << 30


def check_folder(folder: str) -> None:
    """Raises ValueError if no file can be made there."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"clapping.memory.folder = {folder!r} on {socket.gethostname()}: {error.strerror}; accepted: a "
            "folder that can be written"
        ) from None


class Piece(NamedTuple):
    """Of a file: whole pages."""

    bytes: torch.Tensor
    pages: mmap.mmap
    start: int
    """In `pages`."""


class MappedFile:
    """Memory of a file that no folder shows, so that it is gone when the process is, however that ends."""

    def __init__(self, folder: str) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (open as long as this is)
        self._num_bytes = 0
        self._pieces: dict[int, Piece] = {}
        """By address."""
        self._free: defaultdict[int, list[Piece]] = defaultdict(list)
        """By size."""
        self._left: list[Piece] = []
        """What the file grew by and nobody has."""

    def new(self, num_bytes: int) -> torch.Tensor:
        """Zeros, uint8 [num_bytes]. Raises OSError where the disk is full: to find that out later, at a page
        that has no place there, would end the process."""
        size = _round_up(num_bytes)
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
        """So many bytes that nobody has. The file doubles when it grows, so that it has few maps."""
        left = self._left.pop() if self._left else None
        if left is None or len(left.bytes) < size:
            growth = max(size, min(self._num_bytes, LARGEST_GROWTH_BYTES))
            os.posix_fallocate(self._file.fileno(), self._num_bytes, growth)
            pages = mmap.mmap(self._file.fileno(), growth, offset=self._num_bytes)
            self._num_bytes += growth
            left = _piece(pages, 0, growth)
        if len(left.bytes) > size:
            self._left = [_piece(left.pages, left.start + size, len(left.bytes) - size)]
        return _piece(left.pages, left.start, size)


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _piece(pages: mmap.mmap, start: int, size: int) -> Piece:
    return Piece(torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=start), pages, start)


class Staging:
    """Pinned copies of memories that are in a file. Of each there is at most one."""

    def __init__(self) -> None:
        self._reader, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._copies: dict[int, tuple[torch.Tensor, Future[torch.Tensor]]] = {}
        """By identity of the memory: it, and its copy."""
        self._written: dict[int, tuple[torch.Tensor, Future[None]]] = {}
        """By identity of the memory: it, and that it has what was written last."""
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
        written = self._writer.submit(self._write, memory, copy.result(), wait)
        self._written[id(memory)] = memory, written

    def drop(self) -> None:
        """Ends all copies. What still uses one keeps it."""
        self._copies.clear()

    def settle(self) -> None:
        """Waits until all is written."""
        for _, written in self._written.values():
            written.result()
        self._written.clear()

    def _write(self, memory: torch.Tensor, copy: torch.Tensor, wait: Callable[[], None]) -> None:
        wait()
        memory.copy_(copy)
        self._free[copy.shape, copy.dtype].append(copy)


def _read(memory: torch.Tensor, copy: torch.Tensor, written: Future[None] | None) -> torch.Tensor:
    if written is not None:
        written.result()
    return copy.copy_(memory)
