"""What each codec loses, costs and how fast it is, on real activations and gradients.

    python -m benchmarks.codecs.quality

Reads `captured.npz` (see `benchmarks.codecs.capture`). A key message is a value, a delta message its change
in one optimizer step on the same sample. Errors are over all captured depths and steps, without a memory:
the root of the mean squared relative error, and the mean cosine. Speed is of the plain-torch path on this
CPU, and of the compiled one for the codecs that have it, with error feedback for ours: in bytes of
uncompressed bfloat16 per second, and as a share of a plain copy that is measured in turn with it.

The captured matrices have only 64 rows. `lowrank` looks dear here: its bits per value are
16 * rank * (1 / rows + 1 / columns). It also starts cold, where in training it starts from the last message.
`transform` has one outlier among 64 rows, 0.25 bits per value, and 0.5 for means and deviations of channels:
0.12 in a large matrix, both together.
"""

import argparse
import json
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.codecs.peers import peers
from benchmarks.files import RESULTS, new_figure, read_csv, save_figure, write_results
from clapping_ds.codecs import CODECS, AnyCodec, Context
from clapping_ds.codecs.grouped import GroupedCodec
from clapping_ds.report import format_table

SCALES = ("unbiased", "least_squares")
CONFIGURATIONS: list[dict[str, Any]] = [
    *({"name": name, **options} for name in ("int8", "int4") for options in ({}, {"rotate": True})),
    {"name": "int4", "stochastic": True},
    *(
        {"name": name, **options}
        for name in ("int3", "int2")  # their default scale is least squares
        for options in ({}, {"rotate": True}, {"scale": "maximum"})
    ),
    {"name": "sign"},
    *({"name": f"eden{bits}", "scale": scale} for bits in (1, 2, 3, 4) for scale in SCALES),
    {"name": "fp8_e4m3"},
    {"name": "fp8_e5m2"},
    *({"name": "topk", "ratio": bits / 32} for bits in (1, 2, 3)),
    *({"name": "topk", "ratio": bits / 24, "values": "int8"} for bits in (1, 2, 3)),
    *({"name": "randk", "ratio": bits / 16} for bits in (1, 2, 3)),
    *({"name": "lowrank", "rank": rank} for rank in (1, 4, 16)),
    *({"name": "transform", "bits": bits} for bits in (1, 2, 3, 4)),
]
MESSAGES = [
    (direction, message) for direction in ("activations", "gradients") for message in ("key", "delta")
]
SEED = 1234
SPEED_SHAPE = (2048, 1024)
NUM_WARM_UP, NUM_ROUNDS = 2, 9
PATHS = ("", "compiled ")
"""What the columns of the plain-torch path and of the compiled one begin with."""


class Method(Protocol):
    """A codec of ours or of another library. decode gets the tensor that was encoded for its form."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def encode(self) -> Callable[[torch.Tensor], Any]: ...
    @property
    def decode(self) -> Callable[[Any, torch.Tensor], torch.Tensor]: ...

    def bits_per_value(self, x: torch.Tensor) -> float: ...


class Ours:
    """A codec of this package; `encode` and `decode` without a memory, so that errors are one message's."""

    def __init__(self, codec: AnyCodec, name: str) -> None:
        kind, *options = name.split()
        self.codec = codec
        self.name = name
        self.family = " ".join([re.sub(r"\d.*", "", kind), *(word for word in options if "=" not in word)])

    def bits_per_value(self, x: torch.Tensor) -> float:
        return self.codec.nbytes(tuple(x.shape), x.dtype) * 8 / x.numel()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        payload = self.payload_for(x)
        self.codec.encode_(x, payload, self.context_for(x))
        return payload

    def decode(self, payload: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        self.codec.decode_(payload, out, self.context_for(x))
        return out

    def payload_for(self, x: torch.Tensor) -> torch.Tensor:
        return torch.empty(self.codec.nbytes(tuple(x.shape), x.dtype), dtype=torch.uint8)

    def context_for(self, x: torch.Tensor) -> Context:
        """The state is new: lowrank starts cold."""
        return Context(seed=SEED, state=self.codec.new_state(x.shape[-1], x.device))


def ours() -> Iterator[Ours]:
    """One method per configuration."""
    for options in CONFIGURATIONS:
        label = " ".join(_word(key, value) for key, value in options.items())
        yield Ours(CODECS[options["name"]].model_validate(options), label)


def _word(key: str, value: Any) -> str:
    if value is True:
        return key
    if isinstance(value, str):
        return value
    return f"{key}={value:.3g}"


def messages(path: Path) -> dict[tuple[str, str], list[torch.Tensor]]:
    """By direction and message: fp32 tensors [sample, token, width], one for each depth and step."""
    found = {}
    with np.load(path) as captured:
        for direction, message in MESSAGES:
            value = torch.from_numpy(captured[direction]).flatten(0, 1)
            first = value[:, 0]
            found[direction, message] = list(first if message == "key" else value[:, 1] - first)
    return found


def errors(method: Method, tensors: list[torch.Tensor]) -> tuple[float, float]:
    """(root mean square of the tensors' relative errors, mean cosine)."""
    squares, cosines = [], []
    for x in tensors:
        y = method.decode(method.encode(x), x)
        assert torch.isfinite(y).all(), method.name
        squares.append(((x - y).norm() / x.norm()).item() ** 2)
        cosines.append(torch.cosine_similarity(x.flatten(), y.flatten(), dim=0).item())
    return statistics.mean(squares) ** 0.5, statistics.mean(cosines)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def calls(method: Method, x: torch.Tensor, compiles: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Encode and decode of what is in x; ours with error feedback, as ranks use it."""
    if not isinstance(method, Ours):
        message = method.encode(x)
        return lambda: method.encode(x), lambda: method.decode(message, x)
    codec, payload, out = method.codec, method.payload_for(x), torch.empty_like(x)
    sender, receiver = (
        method.context_for(x)._replace(memory=torch.zeros_like(x), carry=True, compiles=compiles)
        for _ in range(2)
    )
    return lambda: codec.encode_(x, payload, sender), lambda: codec.decode_(payload, out, receiver)


def speed(method: Method, shape: tuple[int, int] = SPEED_SHAPE) -> dict[str, float | None]:
    """Median GB/s of encode and decode, and as a share of a copy's, all measured in turn. None: no such
    path."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).bfloat16()
    target = torch.empty_like(x)
    timed: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(x)}
    for path in PATHS:
        if path == PATHS[0] or (isinstance(method, Ours) and isinstance(method.codec, GroupedCodec)):
            encode, decode = calls(method, x, compiles=path != PATHS[0])
            timed |= {f"{path}encode": encode, f"{path}decode": decode}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(NUM_WARM_UP + NUM_ROUNDS):
        x.neg_()  # so that there always is a change to send
        for name, call in timed.items():
            spent_s = seconds(call)
            if round_ >= NUM_WARM_UP:
                times[name].append(spent_s)
    median_s = {name: statistics.median(found) for name, found in times.items()}
    figures: dict[str, float | None] = {}
    for name in (f"{path}{action}" for path in PATHS for action in ("encode", "decode")):
        spent = median_s.get(name)
        figures[f"{name} GB/s"] = x.nbytes / spent / 1e9 if spent else None
        figures[f"{name} of copy"] = median_s["copy"] / spent if spent else None
    return figures


def row(method: Method, captured: dict[tuple[str, str], list[torch.Tensor]]) -> dict[str, Any]:
    """One line of the CSV."""
    example = captured["activations", "key"][0]
    figures: dict[str, Any] = {
        "codec": method.name,
        "family": method.family,
        "bits per value": method.bits_per_value(example),
    }
    for direction, message in MESSAGES:
        error, cosine = errors(method, captured[direction, message])
        figures |= {f"{direction} {message} error": error, f"{direction} {message} cosine": cosine}
    return figures | speed(method)


def plot(source: Path, target: Path) -> None:
    """Draws what the CSV says: error against bits, one panel for each direction and message."""
    rows = read_csv(source)
    families = list(dict.fromkeys(row["family"] for row in rows))
    figure, axes = new_figure(2, 2, inches=(12, 9), sharex=True)
    for axis, (direction, message) in zip(axes.flat, MESSAGES, strict=True):
        points = [(float(row["bits per value"]), float(row[f"{direction} {message} error"])) for row in rows]
        for index, family in enumerate(families):
            mine = [point for point, row in zip(points, rows, strict=True) if row["family"] == family]
            axis.plot(*zip(*mine, strict=True), "osD^vP*X"[index % 8], label=family, alpha=0.8)
        best: list[tuple[float, float]] = []
        for point in sorted(points):
            if not best or point[1] < best[-1][1]:
                best.append(point)
        axis.step(*zip(*best, strict=True), where="post", color="grey", lw=0.8, zorder=0)
        axis.set(title=f"{direction}, {message}", yscale="log")
        axis.grid(alpha=0.3, which="both")
    for axis in axes[1]:
        axis.set_xlabel("bits per value")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error")
    axes[0, 0].legend(fontsize=8)
    save_figure(figure, target)


def report(rows: list[dict[str, Any]], facts: dict[str, Any], folder: Path) -> None:
    """Writes codecs.csv, codecs.png and codecs.json, and prints the table."""
    write_results(folder / "codecs", rows, facts)
    plot(folder / "codecs.csv", folder / "codecs.png")
    print(format_table([_show(row, " error") for row in rows]))
    print(format_table([_show(row, " cosine") for row in rows]))
    print(format_table([_show(row, " GB/s", " of copy") for row in rows]))
    print(f"written to {folder}: codecs.csv, codecs.json, codecs.png")


def _show(row: dict[str, Any], *endings: str) -> dict[str, Any]:
    """The codec, its bits and the figures whose names end so."""
    return {name: row[name] for name in row if name.endswith(("codec", "bits per value", *endings))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captured", type=Path, default=RESULTS / "captured.npz")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="the CPU path is not compiled")
    facts = {"captured": json.loads(options.captured.with_suffix(".json").read_text())}
    captured = messages(options.captured)
    methods: list[Method] = [*ours(), *peers()]
    rows = [row(method, captured) for method in methods]
    report(rows, facts, options.results)


if __name__ == "__main__":
    main()
