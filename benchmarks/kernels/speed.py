"""GB/s of every codec on this machine's GPU, beside a device-to-device copy: `benchmarks.kernels.report`.

A figure appears only for a codec whose payload, memory and output are equal on the GPU, bit for bit, to
what `clapping_ds.codecs.reference` gives on the CPU.

Bytes are the least that must move: the value or output once, the payload once, the memory once where it
is read and once where it is written. The copy beside it reads and writes as many bytes in total, so its
GB/s is what this GPU's memory gives. Reported are medians, with the L2 cache cleared before each call.
"""

from typing import Any

import torch
from triton.testing import do_bench

from benchmarks.kernels.variants import SEED, SITUATIONS, Situation, named_codecs
from clapping_ds.codecs import AnyCodec, Context, State

CHECKED_SHAPE = (768, 1024)
TIMED_SHAPE = (16384, 4096)
"""128 MiB in bfloat16, several times the largest L2 cache."""
TOLERANT = ("lowrank", "transform")
"""Codecs whose payloads hold sums as a library adds them (products, factors, statistics), so that they differ
in their last bits. Of these the decoded output is compared, given the same payload."""


class Message:
    """A value with its payload, context and output, on one device."""

    def __init__(self, codec: AnyCodec, situation: Situation, shape: tuple[int, int], device: str) -> None:
        generator = torch.Generator(device).manual_seed(1)
        self.codec = codec
        self.value = torch.randn(shape, generator=generator, device=device).to(situation.dtype)
        self.out = torch.empty_like(self.value)
        self.payload = torch.zeros(codec.nbytes(shape, situation.dtype), dtype=torch.uint8, device=device)
        of_memory = situation.memory_dtype
        memory = None if of_memory is None else torch.zeros_like(self.value, dtype=of_memory)
        state = codec.new_state(shape[-1], torch.device(device))
        self.context = Context(memory, memory is not None, SEED, state)

    def encode_(self) -> None:
        self.codec.encode_(self.value, self.payload, self.context)

    def decode_(self) -> None:
        self.codec.decode_(self.payload, self.out, self.context)

    @property
    def num_bytes(self) -> int:
        """That encoding, or decoding, must move at least."""
        memory = self.context.memory
        return self.value.nbytes + self.payload.nbytes + (0 if memory is None else 2 * memory.nbytes)


def difference(codec: AnyCodec, situation: Situation) -> str | None:
    """What differs between the GPU and the reference, over three messages; None: nothing."""
    here = Message(codec, situation, CHECKED_SHAPE, "cpu")
    there = Message(codec, situation, CHECKED_SHAPE, "cuda")
    there.value.copy_(here.value)
    for _ in range(3):
        for message in (here, there):
            message.encode_()
        if codec.name in TOLERANT:
            _copy_(here, there)
        elif not _same(here.payload, there.payload):
            return "payload"
        elif not _same(here.context.memory, there.context.memory):
            return "memory after encode_"
        for message in (here, there):
            message.decode_()
        for name, ours, theirs in (
            ("output", here.out, there.out),
            ("memory after decode_", here.context.memory, there.context.memory),
            ("state", _learned(here.context.state), _learned(there.context.state)),
        ):
            if not _same(ours, theirs):
                return name
    return None


def _copy_(source: Message, target: Message) -> None:
    target.payload.copy_(source.payload)
    theirs, ours = target.context, source.context
    if theirs.memory is not None and ours.memory is not None:
        theirs.memory.copy_(ours.memory)
    if theirs.state is not None and ours.state is not None:
        for there, here in zip(theirs.state.list_shared(), ours.state.list_shared(), strict=True):
            there.copy_(here)


def _learned(state: State | None) -> torch.Tensor | None:
    return None if state is None else state.join_shared()


def _same(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    """Bit for bit."""
    if ours is None or theirs is None:
        return ours is theirs
    return torch.equal(ours.view(torch.uint8), theirs.cpu().view(torch.uint8))


def row(name: str, codec: AnyCodec, situation: Situation) -> dict[str, Any]:
    """One line of the report."""
    fault = difference(codec, situation)
    line: dict[str, Any] = {"codec": name, "situation": situation.label, "wrong": fault}
    speeds: list[float | None] = [None] * 3
    if fault is None:
        message = Message(codec, situation, TIMED_SHAPE, "cuda")
        source = torch.empty(message.num_bytes // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        calls = (message.encode_, message.decode_, lambda: target.copy_(source))
        speeds = [message.num_bytes / 1e6 / do_bench(call, return_mode="median") for call in calls]
    encode, decode, copy = speeds
    share = [None if speed is None or not copy else speed / copy for speed in (encode, decode)]
    line |= {"encode GB/s": encode, "decode GB/s": decode, "copy GB/s": copy}
    return line | {"encode/copy": share[0], "decode/copy": share[1]}


def rows(only: str) -> list[dict[str, Any]]:
    """A line per codec and situation whose names contain `only`."""
    return [
        {"gpu": torch.cuda.get_device_name(), **row(name, codec, situation)}
        for name, codec in named_codecs()
        for situation in SITUATIONS
        if only in f"{name} {situation.label}"
    ]
