"""AC-SGD's published delta compression beside our int4 with error feedback, on CPU tensors, one thread.

    python -m benchmarks.codecs.ac_sgd CHECKOUT [--repeats 21]

CHECKOUT is a clone of https://github.com/DS3Lab/AC-SGD (MIT, not part of this project), at commit
95a0f2ec00e6cf520ed0c74c02f17d09def2f8d4. It needs CUDA only through cupy, for bit packing and for copies
between host and device; numpy answers those calls here, and nothing else of it is replaced. Timed are:

    AC-SGD delta       `DeltaCompressor.compress` and `.decompress` as published
    AC-SGD delta-mem   the same, but its memory already lies where the arithmetic is, so that reading it
                       copies nothing; the copy that writes it back remains
    AC-SGD torch-4bit  its packing in plain torch (`compress_nbits`) around a delta kept here: the fastest
                       that its functions allow
    ours               `int4` in plain torch
    ours compiled      the same bits (checked first), through torch's C++ compiler

All get the same tensors in turn, each 10 % different from the one before. `error` is of the last tensor
that arrived, relative; AC-SGD has one scale per channel, we have one per 128 values. Times are medians in
milliseconds; the last columns are the sum over that of ours, and of ours compiled.
"""

import argparse
import importlib
import statistics
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.files import RESULTS, write_results
from clapping_ds.codecs import Context, Quantizer
from clapping_ds.report import format_table

COMMIT = "95a0f2ec00e6cf520ed0c74c02f17d09def2f8d4"
SHAPES = ((4, 512, 1024), (8, 128, 128))
DTYPES = (torch.float32, torch.bfloat16)
BITS = 4
CHANGE = 0.1
"""Of a tensor against the one before, relative."""
LARGEST_ERROR = 0.2
"""Relative. AC-SGD's first message, at 4 bits and one scale per channel, is off by 0.13."""
NUM_WARM_UP = 2
NAMES = ("ours", "ours compiled")


class HostArray(np.ndarray):
    """A numpy array with the methods of a cupy array that AC-SGD calls."""

    def set(self, source: np.ndarray) -> None:
        np.copyto(self, source)

    def get(self, out: np.ndarray) -> None:
        np.copyto(out, self)

    def toDlpack(self) -> Any:  # noqa: N802
        return self.__dlpack__()


class MemoryItself(HostArray):
    """A device's buffer that is the host's: there is nothing to copy to it."""

    def set(self, source: np.ndarray) -> None:
        assert np.shares_memory(self, source)


class Capsule:
    """A DLPack capsule as the object that numpy wants."""

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # the CPU


def cupy_on_numpy() -> types.ModuleType:
    """A module that stands in for cupy."""

    def on_host(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        return lambda *arguments, **options: function(*arguments, **options).view(HostArray)

    replaced: dict[str, Any] = {
        name: on_host(getattr(np, name)) for name in ("packbits", "unpackbits", "pad", "empty")
    }
    replaced["fromDlpack"] = on_host(lambda capsule: np.from_dlpack(Capsule(capsule)))
    replaced["cuda"] = types.SimpleNamespace(alloc_pinned_memory=bytearray)
    module = types.ModuleType("cupy")
    vars(module).update(replaced)
    return module


def imported(checkout: Path) -> tuple[Any, Any]:
    """AC-SGD's package `compress` and its module `compress.fixpoint`."""
    if not (checkout / "compress" / "delta_modules.py").is_file():
        raise ValueError(f"{checkout} is no checkout of AC-SGD: it has no compress/delta_modules.py")
    path = [str(checkout), *sys.path]
    with patch.dict(sys.modules, {"cupy": cupy_on_numpy()}), patch.object(sys, "path", path):
        return importlib.import_module("compress"), importlib.import_module("compress.fixpoint")


class Link(Protocol):
    """Both ends of a link, with a memory each."""

    def encode(self, value: torch.Tensor) -> Any: ...
    def decode(self, payload: Any) -> torch.Tensor: ...


class TheirDelta:
    """AC-SGD's DeltaCompressor at either end."""

    def __init__(self, package: Any, value: torch.Tensor, reads_copy: bool) -> None:
        self.sender, self.receiver = (self._end(package, value, reads_copy) for _ in range(2))

    def encode(self, value: torch.Tensor) -> Any:
        return self.sender.compress(value, 0)

    def decode(self, payload: Any) -> torch.Tensor:
        return self.receiver.decompress(payload, 0)

    @staticmethod
    def _end(package: Any, value: torch.Tensor, reads_copy: bool) -> Any:
        num_samples = value.shape[0]
        end = package.get_compressor(compress_method="delta", bits=BITS, max_cache_size=num_samples)
        end.build_buffer(num_samples, *value.shape, device="cpu", dtype=value.dtype)
        if not reads_copy:
            end.cp_com_buffers[0] = end.np_com_buffers[0].view(MemoryItself)
            end.cp_dec_buffers[0] = end.np_dec_buffers[0].view(MemoryItself)
        return end


class TheirTorch:
    """AC-SGD's functions in plain torch, around the simplest delta."""

    def __init__(self, fixpoint: Any, value: torch.Tensor) -> None:
        self.fixpoint = fixpoint
        self.sent, self.received = torch.zeros_like(value), torch.zeros_like(value)

    def encode(self, value: torch.Tensor) -> Any:
        payload = self.fixpoint.compress_nbits(value - self.sent, BITS)
        self.sent.add_(self.fixpoint.decompress_nbits(*payload, BITS))
        return payload

    def decode(self, payload: Any) -> torch.Tensor:
        return self.received.add_(self.fixpoint.decompress_nbits(*payload, BITS))


class Ours:
    """Our int4 with error feedback."""

    def __init__(self, value: torch.Tensor, compiles: bool) -> None:
        self.codec = Quantizer(name="int4")
        self.payload = torch.empty(self.codec.nbytes(tuple(value.shape), value.dtype), dtype=torch.uint8)
        self.out = torch.empty_like(value)
        self.sent, self.received = torch.zeros_like(value), torch.zeros_like(value)
        self.sender, self.receiver = (
            Context(memory, carry=True, compiles=compiles) for memory in (self.sent, self.received)
        )

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        self.codec.encode_(value, self.payload, self.sender)
        return self.payload

    def decode(self, payload: torch.Tensor) -> torch.Tensor:
        self.codec.decode_(payload, self.out, self.receiver)
        return self.out


def check_bits(values: list[torch.Tensor]) -> None:
    """Raises unless what we send compiled has the bits of what we send eagerly, and so all that is kept."""
    eager, compiled = (Ours(values[0], compiles) for compiles in (False, True))
    for number, value in enumerate(values * 2):
        for link in (eager, compiled):
            link.decode(link.encode(value))
        for name in ("payload", "out", "sent", "received"):
            expected, found = getattr(eager, name), getattr(compiled, name)
            if not torch.equal(expected.view(torch.uint8), found.view(torch.uint8)):
                raise RuntimeError(f"message {number}: `{name}` has other bits where compiled")


def relative_error(value: torch.Tensor, arrived: torch.Tensor) -> float:
    return ((value.float() - arrived.float()).norm() / value.float().norm()).item()


def timed(links: dict[str, Link], values: list[torch.Tensor], repeats: int) -> list[dict[str, Any]]:
    """One row per link: bits, error, medians of its times. In each round every link has its turn."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in links}
    facts = {}
    for round_ in range(NUM_WARM_UP + repeats):
        value = values[round_ % len(values)]
        for name, link in links.items():
            start = time.perf_counter()
            payload = link.encode(value)
            middle = time.perf_counter()
            arrived = link.decode(payload)
            end = time.perf_counter()
            if round_ >= NUM_WARM_UP:
                times[name].append((1e3 * (middle - start), 1e3 * (end - middle)))
            parts = payload if isinstance(payload, tuple) else (payload,)
            bits = 8 * sum(part.nbytes for part in parts) / value.numel()
            facts[name] = {"bits per value": bits, "error": relative_error(value, arrived)}
            if facts[name]["error"] > LARGEST_ERROR:
                raise RuntimeError(f"{name}: what arrives is {facts[name]['error']:.3f} off; not timed")
    rows: list[dict[str, Any]] = []
    for name, found in times.items():
        columns = {"encode_ms": [e for e, _ in found], "decode_ms": [d for _, d in found]}
        columns["sum_ms"] = [encode + decode for encode, decode in found]
        medians = {column: statistics.median(spent) for column, spent in columns.items()}
        rows.append({"link": name, **facts[name], **medians})
    own = {row["link"]: row["sum_ms"] for row in rows}
    return [row | {f"of {name}": row["sum_ms"] / own[name] for name in NAMES} for row in rows]


def compared(checkout: Path, repeats: int) -> list[dict[str, Any]]:
    """The rows of every tensor."""
    package, fixpoint = imported(checkout)
    rows = []
    for shape in SHAPES:
        for dtype in DTYPES:
            generator = torch.Generator().manual_seed(0)
            first, noise = (torch.randn(shape, generator=generator) for _ in range(2))
            values = [first.to(dtype), (first + CHANGE * noise).to(dtype)]
            torch.compiler.reset()  # a rank has tensors of one shape, for which all is compiled
            check_bits(values)
            links: dict[str, Link] = {
                "AC-SGD delta": TheirDelta(package, values[0], reads_copy=True),
                "AC-SGD delta-mem": TheirDelta(package, values[0], reads_copy=False),
                "AC-SGD torch-4bit": TheirTorch(fixpoint, values[0]),
                NAMES[0]: Ours(values[0], compiles=False),
                NAMES[1]: Ours(values[0], compiles=True),
            }
            tensor = {"shape": "x".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch.")}
            rows += [tensor | row for row in timed(links, values, repeats)]
    return rows


def commit_of(checkout: Path) -> str:
    """The commit that is checked out, with `-dirty` where files were changed."""
    if not (checkout / ".git").exists():
        return "unknown: no git checkout"
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="the CPU path is not compiled")
    commit = commit_of(options.checkout)
    if commit != COMMIT:
        print(f"AC-SGD: expected commit {COMMIT}, found {commit}", file=sys.stderr)
    rows = compared(options.checkout, options.repeats)
    print(format_table(rows))
    write_results(options.results / "ac_sgd", rows, {"AC-SGD commit": commit, "repeats": options.repeats})
    print(f"written to {options.results}: ac_sgd.csv, ac_sgd.json")


if __name__ == "__main__":
    main()
