"""What a codec is: pure arithmetic on one tensor, what both ends know of it, and its section of a payload."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, Protocol

import torch
from pydantic import AfterValidator, ConfigDict, Field

from clapping_ds.streams import is_asynchronous

COMPRESSIBLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SECTION_ALIGNMENT_BYTES = 16

STRICT = ConfigDict(
    extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
)


def ceil_div(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)


def pad_nbytes(num_bytes: int) -> int:
    """`num_bytes` rounded up to whole sections, so that each section starts 16-byte aligned."""
    return ceil_div(num_bytes, SECTION_ALIGNMENT_BYTES) * SECTION_ALIGNMENT_BYTES


def list_to_tuple(items: Any) -> Any:
    """For pydantic: JSON has no tuples."""
    return tuple(items) if isinstance(items, list) else items


def power_of_two(number: int) -> int:
    """A pydantic check: `number`, or ValueError."""
    if number & (number - 1):
        raise ValueError("a power of two")
    return number


GroupSize = Annotated[
    int,
    Field(ge=16, le=1024, json_schema_extra={"enum": [16, 32, 64, 128, 256, 512, 1024]}),
    AfterValidator(power_of_two),
]


@dataclass
class State:
    """What a codec learns from the messages of one tensor, whatever their slots."""

    shared: dict[str, torch.Tensor]
    """Equal at both ends."""
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of this end alone."""
    host: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of this end alone, on the CPU; pinned where the others are on a GPU."""
    num_messages: int = 0
    pending: Future[dict[str, torch.Tensor]] | None = None
    """What is computed beside the messages, to become part of `own`."""
    members: "list[State | None]" = field(default_factory=list)
    """Of the codecs of a sequence."""

    @property
    def nbytes(self) -> int:
        tensors = [*self.shared.values(), *self.own.values(), *self.host.values()]
        members = [member.nbytes for member in self.members if member is not None]
        return sum(tensor.nbytes for tensor in tensors) + sum(members)

    def list_shared(self) -> list[torch.Tensor]:
        """All that is equal at both ends."""
        members = [member.list_shared() for member in self.members if member is not None]
        return [*self.shared.values(), *(tensor for shared in members for tensor in shared)]

    def join_shared(self) -> torch.Tensor:
        """The same in one piece, for comparisons."""
        return torch.cat([tensor.flatten() for tensor in self.list_shared()])

    def list_counts(self) -> list[int]:
        """Messages so far, also equal at both ends."""
        members = [member.list_counts() for member in self.members if member is not None]
        return [self.num_messages, *(count for counts in members for count in counts)]

    def settle(self) -> None:
        """Waits for what is computed beside the messages."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self.own |= pending.result()

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        return {
            "shared": self.shared,
            "own": self.own,
            "host": self.host,
            "num_messages": self.num_messages,
            "members": [None if member is None else member.state_dict() for member in self.members],
        }

    def load_state_dict(self, saved: dict[str, Any], device: torch.device) -> None:
        """Takes what `state_dict` of the same end gave."""
        self.settle()
        self.num_messages = saved["num_messages"]
        for member, of_member in zip(self.members, saved["members"], strict=True):
            if member is not None:
                member.load_state_dict(of_member, device)
        self.shared, self.own = (
            {name: tensor.to(device, copy=True) for name, tensor in saved[part].items()}
            for part in ("shared", "own")
        )
        pins = is_asynchronous(device)
        self.host = {
            name: tensor.clone().pin_memory() if pins else tensor.clone()
            for name, tensor in saved["host"].items()
        }


class Context(NamedTuple):
    """What both ends know alike of one tensor of one message, before it is sent."""

    memory: torch.Tensor | None = None
    """Contiguous, as many elements as the tensor; fp32, fp16 or bf16. None: nothing is kept."""
    carry: bool = False
    """True: what crosses the wire is the difference to `memory`; False: the value itself."""
    seed: int = 0
    """64 bits, new for every message: what the codec draws at random, both ends draw alike."""
    state: State | None = None
    """What `new_state` gave, as the messages since have left it."""
    compiles: bool = False
    """Whether tensors on the CPU take the path that torch's C++ compiler makes of the reference."""

    @property
    def base(self) -> torch.Tensor | None:
        """What the difference is taken to; None: zero."""
        return self.memory if self.carry else None


class Codec(Protocol):
    """Turns a value into a section of a payload and back.

    Both methods leave the same bits in `context.memory` and `context.state.shared`, and `decode_` leaves in
    `out` what the receiving stage computes with: the memory, or without one the decompressed value.

    value, out   contiguous tensor of any shape; fp32, fp16 or bf16 (`none`: any dtype)
    payload      contiguous uint8 tensor of `nbytes(shape, dtype)`, 16-byte aligned; every byte of it
                 is written by `encode_`

    A codec compresses groups of consecutive values. A group in which any difference is not finite
    arrives as NaN throughout and leaves its part of the memory as it was. (`none`: it arrives as it is,
    and the groups are runs of 16.)
    """

    @property
    def name(self) -> str: ...

    @property
    def carries_by_default(self) -> bool: ...

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int: ...

    def new_state(self, width: int, device: torch.device) -> State | None:
        """width: the tensors' last dimension, which is all of their shape that a state may know."""

    def encode_(self, value: torch.Tensor, payload: torch.Tensor, context: Context) -> None: ...

    def decode_(self, payload: torch.Tensor, out: torch.Tensor, context: Context) -> None: ...


def width_of(shape: tuple[int, ...]) -> int:
    """The last dimension; 1 of a scalar."""
    return shape[-1] if shape else 1


def check_block(name: str, block: int, shape: tuple[int, ...]) -> None:
    """Raises ValueError for a tensor smaller than one block."""
    num_values = torch.Size(shape).numel()
    if num_values < block:
        raise ValueError(
            f"{name}: block {block} is larger than the tensor of shape {tuple(shape)}; "
            f"accepted: a block of at most {num_values}"
        )


def limit(*tensors: torch.Tensor | None) -> float:
    """The largest magnitude that is finite in every given tensor's dtype: where a memory saturates."""
    return min(torch.finfo(tensor.dtype).max for tensor in tensors if tensor is not None)


def bits_per_value(codec: Codec, dtype: torch.dtype) -> float:
    """Bits on the wire per value of a large matrix, scales and indexes included."""
    shape = (1 << 12, 1 << 12)
    return codec.nbytes(shape, dtype) * 8 / (shape[0] * shape[1])
