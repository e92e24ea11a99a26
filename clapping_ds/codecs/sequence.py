"""A sequence of codecs: each codes what those before it left of the value, all in one payload.

    m <- base + C1(v - base)        m <- m + C2(v - m)        ...

So a codec that is cheap for most of a tensor (`lowrank`) can be followed by one that spends few bits on the
rest. Without error feedback m is there for one message. Each codec has its own section, draws its own random
numbers and keeps what it learns itself. What one of them finds not finite arrives as NaN; the memory is kept
by the groups of the last.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from clapping_ds.codecs.base import STRICT, Context, State, list_to_tuple
from clapping_ds.codecs.eden import Eden
from clapping_ds.codecs.float8 import Float8
from clapping_ds.codecs.lowrank import LowRank
from clapping_ds.codecs.quant import Quantizer
from clapping_ds.codecs.randk import RandK
from clapping_ds.codecs.raw import Raw
from clapping_ds.codecs.topk import TopK
from clapping_ds.codecs.transform import Transform

SEED_STRIDE = 0x9E3779B97F4A7C15
SEED_MASK = (1 << 64) - 1


def name_codec(codec: Any) -> Any:
    """`"int4"` is short for `{"name": "int4"}`."""
    return {"name": codec} if isinstance(codec, str) else codec


Member = Annotated[
    Quantizer | Eden | Float8 | TopK | RandK | LowRank | Transform,
    Field(discriminator="name"),
    BeforeValidator(name_codec),
]
"""`none` leaves nothing to code."""


def _check_number(codecs: tuple[Member, ...]) -> tuple[Member, ...]:
    if not 2 <= len(codecs) <= 4:
        raise ValueError("2 to 4 codecs in a list")
    return codecs


class CodecSequence(BaseModel):
    """Codecs, each of what those before it left."""

    model_config = STRICT

    name: Literal["sequence"] = "sequence"
    codecs: Annotated[tuple[Member, ...], BeforeValidator(list_to_tuple), AfterValidator(_check_number)]
    """Two to four."""

    @property
    def carries_by_default(self) -> bool:
        return self.codecs[0].carries_by_default

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """The sum of its codecs'."""
        return sum(codec.nbytes(shape, dtype) for codec in self.codecs)

    def new_state(self, width: int, device: torch.device) -> State:
        """Its codecs'."""
        return State({}, members=[codec.new_state(width, device) for codec in self.codecs])

    def encode_(self, value: torch.Tensor, payload: torch.Tensor, context: Context) -> None:
        for codec, section, its_context in self._parts(value, payload, context):
            codec.encode_(value, section, its_context)

    def decode_(self, payload: torch.Tensor, out: torch.Tensor, context: Context) -> None:
        for codec, section, its_context in self._parts(out, payload, context):
            codec.decode_(section, out, its_context)

    def _parts(
        self, tensor: torch.Tensor, payload: torch.Tensor, context: Context
    ) -> list[tuple[Member, torch.Tensor, Context]]:
        """Each codec with its section and its context. tensor: of the message's shape, dtype and device."""
        memory, state = context.memory, context.state
        assert state is not None
        if memory is None:
            memory = torch.zeros_like(tensor, dtype=torch.float32)
        sections = payload.split([codec.nbytes(tensor.shape, tensor.dtype) for codec in self.codecs])
        contexts = [
            context._replace(
                memory=memory,
                carry=context.carry or number > 0,
                seed=(context.seed + number * SEED_STRIDE) & SEED_MASK,
                state=state.members[number],
            )
            for number in range(len(self.codecs))
        ]
        return list(zip(self.codecs, sections, contexts, strict=True))


def list_members(codec: Raw | Member | CodecSequence) -> tuple[Raw | Member, ...]:
    """The codecs of a sequence, or the one."""
    return codec.codecs if isinstance(codec, CodecSequence) else (codec,)


def label(codec: Raw | Member | CodecSequence) -> str:
    """For tables: the name, and the options that are not the defaults."""
    if isinstance(codec, CodecSequence):
        return " + ".join(map(label, codec.codecs))
    given = codec.model_dump(exclude_defaults=True, exclude={"name"})
    return " ".join([codec.name, *(f"{option}={value}" for option, value in given.items())])
