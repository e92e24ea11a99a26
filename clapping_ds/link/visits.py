"""Memories that live on the CPU, and visit the GPU while a message uses them.

Both copies are queued: the memory is pinned, and all of it happens on the stream on which codecs work.
"""

import torch


class Visits:
    """To one device. Buffers there are kept for the next visitor of the same shape and dtype."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._here: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """By identity of the memory: it, and what the device has."""
        self._free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}

    def are_of(self, memory: torch.Tensor | None) -> bool:
        """Whether a memory has to visit."""
        return memory is not None and memory.device.type != self.device.type

    def fetch(self, memory: torch.Tensor) -> torch.Tensor:
        """The memory on the device, from now on or since an earlier call."""
        if id(memory) not in self._here:
            free = self._free.setdefault((memory.shape, memory.dtype), [])
            buffer = free.pop() if free else torch.empty_like(memory, device=self.device, pin_memory=False)
            self._here[id(memory)] = memory, buffer.copy_(memory, non_blocking=True)
        return self._here[id(memory)][1]

    def put_back(self, memory: torch.Tensor) -> None:
        """Ends a visit, with what the device has."""
        _, buffer = self._here.pop(id(memory))
        memory.copy_(buffer, non_blocking=True)
        self._free[memory.shape, memory.dtype].append(buffer)

    def end(self) -> None:
        """Ends the visits of memories that no message used."""
        for memory, buffer in self._here.values():
            self._free[memory.shape, memory.dtype].append(buffer)
        self._here.clear()
