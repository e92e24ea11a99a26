"""What the codec `transform` costs beside the computation of a stage: operations, and bytes moved on a GPU.

Counted, not estimated: encoding and decoding run on tensors without storage, with every launch of a Triton
kernel replaced by a note, and each operation of torch's adds the bytes of the tensors it takes and gives.
So a pass more in the codec is a pass more here.

Operations are those of matrix products (two per multiplication and addition), and for all else one per value
of the largest tensor, or PER_VALUE in a Triton kernel that codes. "least" is one reading of the value, or
writing of the output, and one of the payload, and of a memory both.

A product of fp32 matrices takes far longer than its share of operations says, one of int8 matrices less. So
the last columns are times: products and bytes at the peak rates of an H100, a stage's own products at
STAGE_UTILISATION of theirs; the last one is with torch.set_float32_matmul_precision("high"). They are a
model, not a measurement.

Not counted: what a thread of the CPU computes once in `refresh` messages; the time from one launch to the
next; and what caches save where a tensor is read again at once.
"""

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from typing import Any, get_args
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import JITFunction

from benchmarks.kernels.variants import SITUATIONS, Situation, count_accesses
from clapping_ds.codecs import Context, Transform

SHAPE = (4096, 4096)
"""Tokens and channels."""
NUM_LAYERS = 4
PARAMETERS_PER_LAYER = 12
"""Times the square of the channels: 4 of attention, 8 of the MLP."""
FLOPS_PER_PARAMETER = 6
"""And token: 2 forward, 4 backward."""
PER_VALUE = 10
"""Less mean, times inverse, sign, four additions of Hadamard's, times 1/4, code, word."""
BITS = 2
CODECS = {
    f"{basis}{f' {anchors} anchors' if anchors else ''}": Transform(bits=BITS, basis=basis, anchors=anchors)
    for basis in get_args(Transform.model_fields["basis"].annotation)
    for anchors in (0, 1024)
}
H100 = {"fp32": 67e12, "tf32": 495e12, "int8": 1979e12, "bf16": 989e12, "bytes": 3.35e12}
"""Per second, from the data sheet of the SXM: matrix products, and bytes of memory."""
STAGE_UTILISATION = 0.5
"""Of the bf16 rate, by the stage's own products."""
PRODUCTS = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.mv.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.addmm_.default: 1,
    torch.ops.aten._int_mm.default: 0,
}
"""Matrix products, by the place of their first factor among the arguments."""


@dataclass
class Cost:
    """Of one message, at one of its ends."""

    operations: Counter[str] = field(default_factory=Counter)
    """By kind: fp32 and int8 of products, else `others`."""
    num_bytes: int = 0
    num_passes: int = 0
    """Operations of torch's, and kernels, that take or give a tensor as large as the value."""

    def add(self, arguments: list[torch.Tensor], results: list[torch.Tensor]) -> None:
        tensors = [*arguments, *results]
        self.num_bytes += sum(_count_bytes(tensor) for tensor in tensors)
        self.num_passes += any(2 * tensor.numel() >= SHAPE[0] * SHAPE[1] for tensor in tensors)


class Counting(TorchDispatchMode):
    """Adds to a cost what runs under it."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost = cost

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or func in NOTHING_MOVES:
            return result
        given, got = _list_tensors([args, kwargs]), _list_tensors(result)
        # In place, an argument is a result as well: torch's schema says which are written.
        written = [args[n] for n, a in enumerate(func._schema.arguments[: len(args)]) if _is_written(a)]
        is_overwritten = func in OVERWRITE
        read = [t for t in given if not (is_overwritten and any(t is w for w in written))]
        self.cost.add(read, [*got, *[w for w in written if not any(w is g for g in got)]])
        if func in PRODUCTS:
            left, right = args[PRODUCTS[func] :][:2]
            kind = "int8" if left.dtype == torch.int8 else "fp32"
            self.cost.operations[kind] += 2 * left.numel() * (right.shape[1] if right.ndim == 2 else 1)
        else:
            self.cost.operations["others"] += max((t.numel() for t in (*given, *got)), default=0)
        return result

    def note(self, kernel: JITFunction, *arguments: Any, **keywords: Any) -> None:
        """In the place of a launch: every tensor is read or written once, a memory as often as it is."""
        times = count_accesses(keywords)
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        tensors = [
            x for name, x in given.items() if isinstance(x, torch.Tensor) for _ in range(times.get(name, 1))
        ]
        self.cost.add(tensors, [])
        codes = kernel.__name__.endswith("codes_kernel")
        self.cost.operations["others"] += max(t.numel() for t in tensors) * (PER_VALUE if codes else 1)


NOTHING_MOVES = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten._unsafe_view.default,
)
OVERWRITE = (
    torch.ops.aten.copy_.default,
    torch.ops.aten.zero_.default,
    torch.ops.aten.fill_.Scalar,
    torch.ops.aten.index_copy_.default,
)
"""Of these the tensor that is written is not read."""


def _count_bytes(tensor: torch.Tensor) -> int:
    """Each value once, where it stands for a whole row or column too."""
    extents = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return prod(extents) * tensor.itemsize


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _list_tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for branch in tree for tensor in _list_tensors(branch)]


def count(codec: Transform, situation: Situation) -> dict[str, Cost]:
    """Of encoding and of decoding."""
    device = torch.device("meta")
    value = torch.empty(SHAPE, dtype=situation.dtype, device=device)
    payload = torch.empty(codec.nbytes(SHAPE, situation.dtype), dtype=torch.uint8, device=device)
    costs = {}
    for action in ("encode", "decode"):
        context = situation.context(codec, SHAPE, device)
        layout = codec.layout(SHAPE[1])
        if context.state is not None and layout is not None:
            num_rows = layout.rows_per_message * layout.refresh
            context.state.host["rows_RC"] = torch.empty(
                num_rows, SHAPE[1], dtype=torch.bfloat16, device=device
            )
        costs[action] = _count_one(codec, action, value, payload, context)
    return costs


def _count_one(
    codec: Transform, action: str, value: torch.Tensor, payload: torch.Tensor, context: Context
) -> Cost:
    counting = Counting(Cost())
    with (
        patch.object(JITFunction, "run", lambda kernel, *a, **k: counting.note(kernel, *a, **k)),
        patch.object(torch.Tensor, "is_cuda", True, create=True),
        counting,
    ):
        if action == "encode":
            codec.encode_(value, payload, context)
        else:
            codec.decode_(payload, value, context)
    return counting.cost


def count_least_bytes(codec: Transform, situation: Situation) -> int:
    """Of either end: value or output, and payload, once; a memory read and written."""
    num_values = SHAPE[0] * SHAPE[1]
    of_memory = 0 if situation.memory_dtype is None else 2 * situation.memory_dtype.itemsize
    return num_values * (situation.dtype.itemsize + of_memory) + codec.nbytes(SHAPE, situation.dtype)


def rows() -> list[dict[str, Any]]:
    """A line per codec, situation and end, and their sums; for both directions, activations and gradients."""
    num_parameters = NUM_LAYERS * PARAMETERS_PER_LAYER * SHAPE[1] ** 2
    of_stage = FLOPS_PER_PARAMETER * num_parameters * SHAPE[0]
    stage_ms = of_stage / H100["bf16"] / STAGE_UTILISATION * 1e3
    found = []
    for label, codec in CODECS.items():
        for situation in (s for s in SITUATIONS if s.dtype == torch.bfloat16):
            costs = count(codec, situation)
            least = count_least_bytes(codec, situation)
            total = Cost(costs["encode"].operations + costs["decode"].operations)
            total.num_bytes = sum(cost.num_bytes for cost in costs.values())
            total.num_passes = sum(cost.num_passes for cost in costs.values())
            for name, cost in (*costs.items(), ("both", total)):
                num_ends = 2 if name == "both" else 1
                int8_ms = 2e3 * cost.operations["int8"] / H100["int8"]
                fp32_ms, tf32_ms = (2e3 * cost.operations["fp32"] / H100[kind] for kind in ("fp32", "tf32"))
                moved_ms = 2e3 * cost.num_bytes / H100["bytes"]
                found.append(
                    {
                        "transform": f"{label} {situation.label} {name}",
                        "GFLOP of products": 2e-9 * (cost.operations["fp32"] + cost.operations["int8"]),
                        "other GFLOP": 2e-9 * cost.operations["others"],
                        "% of stage": 200 * cost.operations.total() / of_stage,
                        "passes": 2 * cost.num_passes,
                        "MB moved": 2e-6 * cost.num_bytes,
                        "MB least": 2e-6 * least * num_ends,
                        "moved / least": cost.num_bytes / (least * num_ends),
                        "products ms": fp32_ms + int8_ms,
                        "moved ms": moved_ms,
                        "% of stage's ms": 100 * (fp32_ms + int8_ms + moved_ms) / stage_ms,
                        "% with TF32": 100 * (tf32_ms + int8_ms + moved_ms) / stage_ms,
                    }
                )
    return found
