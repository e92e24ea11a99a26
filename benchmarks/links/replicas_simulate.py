"""How long an exchange of gradients takes with more replicas than are at hand, from parts that were measured.

    python -m benchmarks.links.replicas_simulate [--values N]

Measured here: the seconds that each codec takes per value, on one core; and the steps of two replicas
over real links (`replicas_links.csv`), which the model is first compared with. Then 2 to 64 replicas, one
per node, with links of their own that are full duplex. Stock is a ring in fp32: 2 (N - 1) messages one
after the other. Ours is `clapping_ds.gradients.exchange.Round`, bucket by bucket: one core encodes,
averages and decodes, while what was encoded travels. A codec of no time stands for one that hides behind
the link, as on a GPU it should.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.files import RESULTS, read_csv, write_results
from benchmarks.model.replicas import Replicas
from clapping_ds.codecs import Context
from clapping_ds.config import DataParallelConfig
from clapping_ds.gradients.equalized import GradientCodec
from clapping_ds.gradients.exchange import GATHER, SCATTER
from clapping_ds.gradients.layout import BUCKET_NUMEL, Parameter, Piece, Section
from clapping_ds.report import format_table

SHAPE = torch.Size((1024, 1024))
NUM_TIMED = 5
NUM_REPLICAS = (2, 4, 8, 16, 64)
RATES_BITS_PER_S = (1e8, 1e9, 1e10)
LATENCIES_S = (0.0, 0.02)
NUM_VALUES = 124_000_000
FP32_BITS = 32


class Coding(NamedTuple):
    """Of a codec, per value."""

    bits: float
    encode_s: float
    decode_s: float


def time_codec(codec: GradientCodec) -> Coding:
    """On this core, in fp32, compiled as users of CPU ranks have it."""
    value = torch.randn(SHAPE.numel())
    payload = torch.empty(codec.nbytes(value.shape, torch.float32), dtype=torch.uint8)
    out = torch.empty_like(value)
    context = Context(state=codec.new_state(len(value), value.device), compiles=True)
    encodes, decodes = [], []
    for number in range(2 + NUM_TIMED):
        start_s = time.perf_counter()
        codec.encode_(value, payload, context._replace(seed=number))
        middle_s = time.perf_counter()
        codec.decode_(payload, out, context._replace(seed=number))
        encodes.append(middle_s - start_s)
        decodes.append(time.perf_counter() - middle_s)
    numel = SHAPE.numel()
    return Coding(8 * payload.numel() / numel, median(encodes[2:]) / numel, median(decodes[2:]) / numel)


def ring_s(num_values: float, num_replicas: int, bits_per_s: float, latency_s: float) -> float:
    """Of stock's all-reduce in fp32."""
    num_messages = 2 * (num_replicas - 1)
    return num_messages * (num_values / num_replicas * FP32_BITS / bits_per_s + latency_s)


def exchange_s(
    scatter: Coding, gather: Coding, num_values: float, num_replicas: int, bits_per_s: float, latency_s: float
) -> float:
    """Of ours: encode all buckets, average each once it has come, decode each mean once that has come.
    Between two replicas all is sent at once, and there is no second way."""
    num_buckets = max(1, -(-int(num_values) // BUCKET_NUMEL))
    size = num_values / num_buckets
    is_direct = num_replicas == 2
    others = 1.0 if is_direct else (num_replicas - 1) / num_replicas
    core_s = wire_s = 0.0
    come = []
    for _ in range(num_buckets):
        core_s += size * scatter.encode_s
        wire_s = max(wire_s, core_s) + others * size * scatter.bits / bits_per_s
        come.append(wire_s + latency_s)
    decoded = num_replicas * size if is_direct else size
    """Every replica's part of this one's own, or all of both."""
    for bucket in range(num_buckets):
        core_s = max(core_s, come[bucket]) + decoded * scatter.decode_s
        if not is_direct:
            core_s += size / num_replicas * gather.encode_s
            wire_s = max(wire_s, core_s) + others * size * gather.bits / bits_per_s
            come[bucket] = wire_s + latency_s
    for bucket in range(num_buckets if not is_direct else 0):
        core_s = max(core_s, come[bucket]) + size * gather.decode_s
    return core_s


PLANS: dict[str, dict[str, Any]] = {
    "int8": {"scatter": "int8", "gather": "int8"},
    "eden4": {},
    "sign + EF, eden4 back": {"scatter": "sign"},
}
MEASURED = {"int8": "fp32, int8", "eden4": "fp32, eden4"}
"""Names in `replicas_links.csv`."""


def make_codings(plan: DataParallelConfig) -> tuple[Coding, Coding]:
    legs = Replicas(plan, [Parameter("weight", SHAPE)], size=2).exchanges[0].legs
    section = Section((Piece(0, 0, SHAPE.numel()),), torch.Size((SHAPE.numel(),)))
    scatter, gather = (time_codec(legs[way].choose(section)[0]) for way in (SCATTER, GATHER))
    return scatter, gather


def check(
    codings: dict[str, tuple[Coding, Coding]], measured: Sequence[dict[str, str]]
) -> list[dict[str, Any]]:
    """Two replicas: the model's step (stock's without a limit, and the exchange) against the measured one."""
    steps_s = {(row["run"], row["rho"]): float(row["step_s"]) for row in measured}
    found = []
    for row in measured:
        names = [name for name, run in MEASURED.items() if run == row["run"]]
        if row["rate_bits_per_s"] and (names or row["run"] == "fp32, stock"):
            rate, num_values = float(row["rate_bits_per_s"]), float(row["num_values"])
            modelled = steps_s["fp32, stock", measured[0]["rho"]]
            modelled += (
                exchange_s(*codings[names[0]], num_values, 2, rate, 0.0)
                if names
                else ring_s(num_values, 2, rate, 0.0)
            )
            found.append({
                "run": row["run"], "rho": row["rho"], "measured_s": round(float(row["step_s"]), 4),
                "model_s": round(modelled, 4), "model/measured": round(modelled / float(row["step_s"]), 3),
            })  # fmt: skip
    return found


def predict(codings: dict[str, tuple[Coding, Coding]], num_values: float) -> list[dict[str, Any]]:
    """How many times as fast as stock's the exchange is: with the codecs of this core, and of no time."""
    found = []
    for rate in RATES_BITS_PER_S:
        for latency_s in LATENCIES_S:
            for num_replicas in NUM_REPLICAS:
                stock_s = ring_s(num_values, num_replicas, rate, latency_s)
                for name, legs in codings.items():
                    scatter, gather = (leg._replace(encode_s=0.0, decode_s=0.0) for leg in legs)
                    taken = [
                        exchange_s(*of, num_values, num_replicas, rate, latency_s)
                        for of in (legs, (scatter, gather))
                    ]
                    found.append({
                        "Mbit/s": rate / 1e6, "latency_s": latency_s, "replicas": num_replicas, "plan": name,
                        "stock_s": round(stock_s, 2), "ours_s": round(taken[0], 2),
                        "faster": round(stock_s / taken[0], 2),
                        "faster, codec of no time": round(stock_s / taken[1], 2),
                    })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--values", type=float, default=NUM_VALUES)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    codings = {name: make_codings(DataParallelConfig.model_validate(plan)) for name, plan in PLANS.items()}
    checked = check(codings, read_csv(options.results / "replicas_links.csv"))
    print(format_table(checked))
    rows = predict(codings, options.values)
    print(format_table(rows))
    facts = {"values": options.values, "codings": codings, "check": checked}
    write_results(options.results / "replicas_simulated", rows, facts)


if __name__ == "__main__":
    main()
