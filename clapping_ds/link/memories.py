"""Where the memories of a channel end live: on the device where codecs work, on the CPU, or in a file.

A memory that lives elsewhere visits the device while a message uses it. All copies there are queued on the
stream on which codecs work.
"""

from collections import defaultdict

import torch

from clapping_ds.config import MemoryConfig
from clapping_ds.link.disk import MappedFile, Staging, round_up
from clapping_ds.streams import is_asynchronous, mark


class Memories:
    """Of one end of a channel. device: where codecs work."""

    def __init__(self, device: torch.device, config: MemoryConfig) -> None:
        self.device = device
        self.config = config
        self._file = MappedFile(config.folder) if config.folder is not None else None
        self._staging = Staging() if self._file and is_asynchronous(device) else None
        self._here: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """By identity of the memory: it, and what the device has."""
        self._free: defaultdict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = defaultdict(list)
        """What the device has for the next visitor of the same shape and dtype."""

    def new(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Zeros, for a tensor of this shape and dtype."""
        dtype = self.config.torch_dtype(dtype)
        if self._file is not None:
            return self._file.new(shape.numel() * dtype.itemsize).view(dtype).view(shape)
        device = self.device if self.config.device == "same" else torch.device("cpu")
        return torch.zeros(shape, dtype=dtype, device=device, pin_memory=device != self.device)

    def free(self, memory: torch.Tensor | None) -> None:
        """Of what `new` gave, and no message will use."""
        if memory is not None and self._file is not None:
            self.settle()
            self._file.free(memory)

    def read(self, memory: torch.Tensor) -> None:
        """Has a memory that is in a file on its way from there."""
        if self._staging is not None:
            self._staging.read(memory)
        elif self._file is not None:
            self._file.advise(memory)

    def fetch(self, memory: torch.Tensor) -> torch.Tensor:
        """The memory on the device, from now on or since an earlier call."""
        if memory.device.type == self.device.type:
            return memory
        if id(memory) not in self._here:
            source = memory if self._staging is None else self._staging.copy_of(memory)
            free = self._free[memory.shape, memory.dtype]
            buffer = free.pop() if free else torch.empty_like(memory, device=self.device, pin_memory=False)
            self._here[id(memory)] = memory, buffer.copy_(source, non_blocking=True)
        return self._here[id(memory)][1]

    def put_back(self, memory: torch.Tensor) -> None:
        """Ends a visit, with what the device has."""
        if memory.device.type == self.device.type:
            return
        _, buffer = self._here.pop(id(memory))
        if self._staging is None:
            memory.copy_(buffer, non_blocking=True)
        else:
            self._staging.copy_of(memory).copy_(buffer, non_blocking=True)
            self._staging.write(memory, mark(self.device))
        self._free[memory.shape, memory.dtype].append(buffer)

    def end(self) -> None:
        """Ends the visits of memories that no message used."""
        for memory, buffer in self._here.values():
            self._free[memory.shape, memory.dtype].append(buffer)
        self._here.clear()
        if self._staging is not None:
            self._staging.drop()

    def count_bytes(self, memory: torch.Tensor) -> int:
        """That a memory takes where it lives."""
        return memory.nbytes if self._file is None else round_up(memory.nbytes)

    @property
    def unused_bytes(self) -> int:
        """That were taken and no memory has."""
        return 0 if self._file is None else self._file.unused_bytes

    def settle(self) -> None:
        """Waits until all that was put back is where it lives. The device has done what it got."""
        if self._staging is not None:
            self._staging.settle()
