"""Every codec on this device: the bits that the reference has on the CPU."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from clapping_ds.codecs import (
    CODECS,
    AnyCodec,
    Context,
    Eden,
    Float8,
    LowRank,
    Quantizer,
    RandK,
    State,
    TopK,
    Transform,
)
from clapping_ds.doctor.visit import Finding, Visit, fail, ok

SEED = 0x9ABCDEF012345678
POISON = 0xA5
SHAPE = (37, 131)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MEMORIES = (None, False, True)
"""None: there is none; else whether what is sent is the difference to it."""
VARIANTS: tuple[AnyCodec, ...] = (
    *(Quantizer(name=name, rotate=True) for name in ("int4", "int2")),
    *(Quantizer(name=name, stochastic=True) for name in ("int8", "int4")),
    Quantizer(name="int2", scale="maximum"),
    Quantizer(name="int3", group_size=16, rotate=True, stochastic=True),
    Quantizer(name="sign", group_size=1024),
    Eden(name="eden3", scale="unbiased", group_size=1024),
    Eden(name="eden4", group_size=32),
    Float8(name="fp8_e5m2", group_size=16),
    TopK(ratio=0.5, block=128, values="int8"),
    RandK(ratio=1.0, block=64),
    Transform(bits=1.5, basis="eigen"),
)
MOST_NAMED = 4


class Case(NamedTuple):
    """One message. With memory, that is of the next dtype."""

    codec: AnyCodec
    dtype: torch.dtype
    carry: bool | None

    def __str__(self) -> str:
        kept = "no memory" if self.carry is None else "carry" if self.carry else "fresh"
        return f"{self.codec!r} {str(self.dtype).removeprefix('torch.')} {kept}"


def list_cases() -> Iterator[Case]:
    """Each codec with each dtype and with each kind of memory, each variant with one of each. Every pair of
    them would be minutes of compiling on a GPU."""
    for number, (name, kind) in enumerate(CODECS.items()):
        codec: AnyCodec = kind(name=name)  # type: ignore[arg-type]
        for index, dtype in enumerate(DTYPES):
            yield Case(codec, dtype, MEMORIES[(number + index) % len(MEMORIES)])
    for number, codec in enumerate(VARIANTS):
        yield Case(codec, DTYPES[number % len(DTYPES)], MEMORIES[number // len(DTYPES) % len(MEMORIES)])


def check_codecs(visit: Visit) -> Finding:
    """On a GPU that the kernels have the reference's bits; on the CPU, where the reference is what runs, that
    both ends of a message are left with the same memory."""
    cases = list(list_cases())
    differences = [text for case in cases if (text := find_difference(case, visit.device))]
    if differences:
        named = "; ".join(differences[:MOST_NAMED])
        advice = "do not train with these; please report it"
        return fail(f"{len(differences)} of {len(cases)} configurations differ: {named}", advice)
    what = "both ends equal" if visit.device.type == "cpu" else "all bits of the GPU's equal the CPU's"
    return ok(f"{len(cases)} configurations, {what}")


def find_difference(case: Case, device: torch.device) -> str | None:
    """What is not equal in a message, or the error that it ended with; None: all is well."""
    try:
        value, memory = _make_value(case.dtype), _make_memory(case)
        expected = _exchange(case, value, memory, None)
        if device.type == "cpu":
            kinds = ("memory", "state")
            found = {f"receiver's {kind}": expected[f"sender's {kind}"] for kind in kinds}
        else:
            on_device = None if memory is None else memory.to(device)
            found = _exchange(case, value.to(device), on_device, expected["payload"])
    except Exception as error:
        return f"{case}: {type(error).__name__}: {error}"
    names = [name for name, tensor in found.items() if not is_same(tensor, expected[name])]
    return f"{case}: {', '.join(names)}" if names else None


def _exchange(
    case: Case, value: torch.Tensor, memory: torch.Tensor | None, payload: torch.Tensor | None
) -> dict[str, Any]:
    """What both ends hold and send after one message, by name.

    payload   what the receiver gets; None: what the sender has made. Low-rank factors and a transform's
              statistics are sums as the device adds them: what the sender makes is not looked at then
    """
    codec, device = case.codec, value.device
    memories = [None if memory is None else memory.clone() for _ in range(2)]
    states = [codec.new_state(value.shape[-1], device) for _ in range(2)]
    sender, receiver = (Context(memories[end], bool(case.carry), SEED, states[end]) for end in range(2))
    found: dict[str, Any] = {}
    if payload is None or not isinstance(codec, LowRank | Transform):
        made = torch.full((codec.nbytes(value.shape, value.dtype),), POISON, dtype=torch.uint8, device=device)
        codec.encode_(value, made, sender)
        found = {"payload": made, "sender's memory": memories[0], "sender's state": _learned(states[0])}
    out = torch.full_like(value, 7)
    codec.decode_(found["payload"] if payload is None else payload.to(device), out, receiver)
    return {**found, "receiver's memory": memories[1], "receiver's state": _learned(states[1]), "output": out}


def _learned(state: State | None) -> torch.Tensor | None:
    return None if state is None else state.join_shared()


def is_same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal bits, wherever they are; any NaN equals any other."""
    if a is None or b is None:
        return a is b
    a, b = a.cpu(), b.cpu()
    if a.is_floating_point():
        a, b = (torch.where(x.isnan(), torch.nan, x) for x in (a, b))
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _make_value(dtype: torch.dtype) -> torch.Tensor:
    """Rows of normal values; others of what is hard: outliers, not finite, tiny, largest, zeros, ties."""
    value = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    value[0, ::61] *= 1000.0
    value[1, 5], value[2, 7], value[3, 9] = torch.inf, -torch.inf, torch.nan
    value[4] *= 1e-41
    value[5] = value[5].sign() * torch.finfo(dtype).max
    value[6] = 0.0
    value[7] = value[7].sign() * 0.5
    return value.to(dtype)


def _make_memory(case: Case) -> torch.Tensor | None:
    if case.carry is None:
        return None
    dtype = DTYPES[(DTYPES.index(case.dtype) + 1) % len(DTYPES)]
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).to(dtype)
