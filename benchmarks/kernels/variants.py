"""The one list of compiled kernels: what the codecs launch, recorded from their own launchers.

`variants` lets every codec encode and decode a tensor while Triton's launch is replaced by a note of
what would be launched: kernel, types, constants and options. So a kernel that changes its tile or its
arguments changes here by itself, and no GPU is needed. `tests.commands.compile_kernels` compiles the list,
`benchmarks.kernels.report` takes the compiler's output apart.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime import JITFunction

from clapping_ds.codecs import CODECS, AnyCodec, Context, Eden, Quantizer, TopK, Transform

SHAPE = (1024, 1024)
"""Of the tensor that is sent: every group, segment and block full, as almost all are in use."""
SEED = 0x0123456789ABCDEF
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
         torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8"}  # fmt: skip
ALIGNMENT = 16
CPU = torch.device("cpu")
SCATTERED = {"write_codes_kernel": ("z", "codes"), "read_codes_kernel": ("codes", "out")}
"""By kernel: arguments of which only other data say where they are accessed, value by value, or word of 16
bits by word."""


@dataclass(frozen=True)
class Situation:
    """What a channel asks of a codec."""

    label: str
    dtype: torch.dtype
    memory_dtype: torch.dtype | None

    def context(self, codec: AnyCodec, shape: tuple[int, int] = SHAPE, device: torch.device = CPU) -> Context:
        memory = None
        if self.memory_dtype is not None:
            memory = torch.zeros(shape, dtype=self.memory_dtype, device=device)
        state = codec.new_state(shape[-1], device)
        if isinstance(codec, Transform) and state is not None:
            codec.warm_up_(state, shape[-1])
        return Context(memory, memory is not None, SEED, state)


SITUATIONS = (
    Situation("memory", torch.bfloat16, torch.bfloat16),
    Situation("fp32", torch.float32, torch.float32),
    Situation("direct", torch.bfloat16, None),
)
OPTIONS: dict[str, AnyCodec] = {
    "int4 rotate": Quantizer(name="int4", rotate=True),
    "int4 stochastic": Quantizer(name="int4", stochastic=True),
    "eden2 unbiased": Eden(name="eden2", scale="unbiased"),
    "topk int8": TopK(values="int8"),
    "transform eigen": Transform(basis="eigen"),
}
"""Codecs with options that change their kernels; compiled for the first situation only."""
HEAVY = (
    "int8 rotate stochastic 1024",
    Quantizer(name="int8", rotate=True, stochastic=True, group_size=1024),
    Situation("fp32, fp16 memory", torch.float32, torch.float16),
)
"""What needs most registers, with launch options of its own."""


@dataclass(frozen=True)
class Variant:
    """One kernel as a codec launches it on a large tensor."""

    label: str
    """Codec, situation, and whether it encodes or decodes."""
    kernel: JITFunction
    types: Mapping[str, str]
    """Triton types of the arguments that are not constants, in order, e.g. `*bf16`."""
    aligned: frozenset[str]
    """Arguments that are multiples of 16 (pointers: of 16 bytes), on which Triton specialises."""
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    """Of the compiler, e.g. `num_warps`."""
    values_per_program: int
    num_trips: int
    """Of the kernel's one loop, that over the segments of a grouped codec; 1 where it has none."""
    least_bytes: Mapping[str, float]
    """By pointer argument: bytes per value of the tensor that the algorithm must read plus write."""
    scattered: frozenset[str]
    """Arguments whose accesses can be neither wide nor counted: of `SCATTERED`."""


def named_codecs() -> list[tuple[str, AnyCodec]]:
    """Every codec with its default options, then those with others."""
    defaults = [(name, kind.model_validate({"name": name})) for name, kind in CODECS.items()]
    return [*defaults, *OPTIONS.items()]


def variants(only: str = "") -> list[Variant]:
    """Every kernel of every codec whose label contains `only`."""
    found: list[Variant] = []
    for name, codec in named_codecs():
        for situation in SITUATIONS[:1] if codec in OPTIONS.values() else SITUATIONS:
            label = f"{name} {situation.label}"
            if any(only in f"{label} {action}" for action in ("encode", "decode")):
                found.extend(_launches(label, codec, situation))
    return [variant for variant in found if only in variant.label]


def heavy_variants(only: str = "") -> list[Variant]:
    """The kernels of `HEAVY`, of which `variants` has none."""
    name, codec, situation = HEAVY
    found = _launches(f"{name} {situation.label}", codec, situation)
    return [variant for variant in found if only in variant.label]


def _launches(label: str, codec: AnyCodec, situation: Situation) -> Iterator[Variant]:
    value = torch.zeros(SHAPE, dtype=situation.dtype)
    payload = torch.zeros(codec.nbytes(SHAPE, situation.dtype), dtype=torch.uint8)
    context = situation.context(codec)
    for action in ("encode", "decode"):
        calls: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []

        def note(kernel: JITFunction, *arguments: Any, calls: Any = calls, **keywords: Any) -> None:
            calls.append((kernel, arguments, keywords))

        # The codecs take the Triton path for CUDA tensors only; nothing here runs on a GPU.
        with patch.object(JITFunction, "run", note), patch.object(torch.Tensor, "is_cuda", True, create=True):
            if action == "encode":
                codec.encode_(value, payload, context)
            else:
                codec.decode_(payload, value, context)
        for kernel, arguments, keywords in calls:
            part = f" {kernel.fn.__name__.removesuffix('_kernel')}" if len(calls) > 1 else ""
            yield _variant(f"{label} {action}{part}", kernel, arguments, keywords)


def _variant(
    label: str, kernel: JITFunction, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> Variant:
    """What Triton would compile for this launch."""
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    given |= {name: value for name, value in keywords.items() if name in kernel.arg_names}
    constants = {p.name: given.pop(p.name) for p in kernel.params if p.is_constexpr}
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    num_values = prod(SHAPE)
    times = count_accesses(constants)
    return Variant(
        label,
        kernel,
        {name: _type(given[name]) for name in kernel.arg_names if name in given},
        frozenset(name for name, value in given.items() if _address(value) % ALIGNMENT == 0),
        constants,
        {k: v for k, v in keywords.items() if k not in kernel.arg_names and k not in ("grid", "warmup")},
        num_values // prod(keywords["grid"]),
        constants.get("SEGMENTS", 1) // min(constants.get("SEGMENTS", 1), constants.get("UNROLL", 1)),
        {name: times.get(name, 1) * tensor.nbytes / num_values for name, tensor in tensors.items()},
        frozenset(SCATTERED.get(kernel.fn.__name__, ())),
    )


def count_accesses(constants: Mapping[str, Any]) -> dict[str, int]:
    """How often a kernel reads or writes what may be a stand-in, by argument; what is not named: once."""
    return {
        "memory": constants.get("CARRY", False) + constants.get("HAS_MEMORY", True),
        "out": constants.get("HAS_OUT", True),
    }


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _address(value: Any) -> int:
    return value.data_ptr() if isinstance(value, torch.Tensor) else value
