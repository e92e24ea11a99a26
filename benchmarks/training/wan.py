"""Protocol NanoGPT's setting at a scale that fits: time to the dense run's loss over 8 stages of one block.

    python -m benchmarks.training.wan [--seeds 1 2 3]

The contest (github.com/PluralisResearch/ProtocolNanoGPT) trains a GPT of 203M parameters on 8 stages of one
block, joined by 200 Mbit/s and 50 ms, and counts T, the steps to a loss of 3.276 times the time of a step.
Here the steps are those of a byte GPT of 8 blocks, 7 links, to the loss of its own dense bf16 run (what
crosses a link is bf16, and no more compressed), and the time of a step is the contest's, for its own shapes:
64 micro-batches of 8 sequences of 1,024 tokens and 1,024 channels, one inbound wire per rank, which both
directions share.

    stock 1F1B    (2 M + 2 (S - 2)) * (transfer + latency)          the contest's meter: latency is not hidden
    in_flight     2 M * transfer + 2 (S - 1) * (transfer + latency)    it is, but while the pipeline fills

Compute counts in neither, as the meter has it. T is given relative to dense. Ten to twenty minutes a run on
one core; what `wan_curves.csv` has is not measured again.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from benchmarks.files import RESULTS, provenance, write_csv, write_json
from benchmarks.training.compare import block
from benchmarks.training.curves import TASKS, Run, measure, read_curves
from benchmarks.training.finetune import add_rows
from benchmarks.training.time_to_loss import find_crossing
from clapping_ds.codecs import Transform
from clapping_ds.config import ClappingConfig
from clapping_ds.report import format_table

TASK, NUM_LINKS = "byte GPT", 7
NUM_STAGES, MICRO_BATCHES = 8, 64
TOKENS, CHANNELS = 8 * 1024, 1024
"""Of a micro-batch; of a token."""
BYTES_PER_S, LATENCY_S = 200e6 / 8, 0.05
PERIOD = 256
"""Messages, over which what is learned is counted: a run of 3,000 steps has 192,000 per channel."""
DENSE = "dense bf16"


class Record(NamedTuple):
    """Of the contest itself, at 203M parameters."""

    steps: int
    step_s: float


RECORDS = {DENSE: Record(2925, 100.475), "ReparamSSN (subspace reference)": Record(9125, 19.889)}


def find_stock_step_s(bits: float) -> float:
    """bits: per value."""
    transfer_s = TOKENS * CHANNELS * bits / 8 / BYTES_PER_S
    return (2 * MICRO_BATCHES + 2 * (NUM_STAGES - 2)) * (transfer_s + LATENCY_S)


def find_in_flight_step_s(bits: float) -> float:
    """bits: per value."""
    transfer_s = TOKENS * CHANNELS * bits / 8 / BYTES_PER_S
    return 2 * MICRO_BATCHES * transfer_s + 2 * (NUM_STAGES - 1) * (transfer_s + LATENCY_S)


def transform(bits: float) -> dict[str, Any]:
    return {"name": "transform", "bits": bits, "basis": "eigen", "anchors": 256, "refresh": 16}


BLOCKS: dict[str, dict[str, Any]] = {
    DENSE: block("direct", "none"),
    "direct eden4": block("direct", "eden4"),
    **{f"direct transform {bits}": block("direct", transform(bits)) for bits in (2, 1.5, 1)},
    **{
        f"direct transform {bits}, gradients eden1 unbiased": {
            "strategy": "direct",
            "activations": {"codec": transform(bits)},
            "gradients": {"codec": {"name": "eden1", "scale": "unbiased"}},
        }
        for bits in (1, 0.5, 0.25)
    },
}
"""Gradients pass all links before the first stage trains on them: a codec that drops coordinates drops them
for good, which costs more there than noise that averages out over tokens."""


def find_bits(block: dict[str, Any]) -> float:
    """Per value, mean of both directions, of the contest's messages."""
    config = ClappingConfig.from_ds_config({"clapping": block})
    found = []
    for plan in config.plans.values():
        codec = plan.key
        if isinstance(codec, Transform):
            codec = codec.model_copy(update={"refresh": PERIOD})
        num_bytes = codec.nbytes(torch.Size((TOKENS, CHANNELS)), torch.bfloat16)
        found.append(num_bytes * 8 / (TOKENS * CHANNELS))
    return mean(found)


def list_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per run and schedule, then the contest's own."""
    found = []
    targets = {row["seed"]: row["loss"] for row in rows if row["name"] == DENSE}
    dense_steps = TASKS[TASK].steps
    for name in dict.fromkeys(row["name"] for row in rows):
        mine: dict[int, list[tuple[int, float]]] = {}
        for row in rows:
            if row["name"] == name and row["seed"] in targets:
                mine.setdefault(row["seed"], []).append((row["step"], row["loss"]))
        crossings = [find_crossing(curve, targets[seed]) for seed, curve in mine.items()]
        if name == DENSE:
            crossings = [float(dense_steps)]
        known = [crossing for crossing in crossings if crossing is not None]
        steps = mean(known) / dense_steps if len(known) == len(crossings) else None
        bits = find_bits(BLOCKS[name])
        for schedule, find_s in (("stock 1F1B", find_stock_step_s), ("in_flight", find_in_flight_step_s)):
            step_s = find_s(bits)
            share = step_s / find_stock_step_s(find_bits(BLOCKS[DENSE]))
            found.append(_row(name, schedule, len(mine), bits, steps, step_s, share))
    dense = RECORDS[DENSE]
    for name, record in RECORDS.items():
        steps, share = record.steps / dense.steps, record.step_s / dense.step_s
        found.append(_row(f"contest, 203M: {name}", "stock 1F1B", 1, None, steps, record.step_s, share))
    return found


def _row(
    name: str,
    schedule: str,
    seeds: int,
    bits: float | None,
    steps: float | None,
    step_s: float,
    share: float,
) -> dict[str, Any]:
    """share: of dense's step."""
    return {
        "run": name, "schedule": schedule, "seeds": seeds,
        "bits per value": None if bits is None else round(bits, 3),
        "steps of dense": None if steps is None else round(steps, 3),
        "step s": round(step_s, 2), "T of dense": None if steps is None else round(steps * share, 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", default=list(BLOCKS), help="names of runs")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.results / "wan_curves.csv"
    rows = read_curves(path)
    known = {(row["name"], row["seed"]) for row in rows}
    for is_dense in (True, False):
        wanted = [
            Run(TASK, name, NUM_LINKS, seed)
            for seed in options.seeds
            for name in options.only
            if (name == DENSE) == is_dense and (name, seed) not in known
        ]
        targets = {row["seed"]: row["loss"] for row in rows if row["name"] == DENSE}
        jobs = [partial(measure, run, targets.get(run.seed), BLOCKS[run.name]) for run in wanted]
        add_rows(jobs, rows, path, options.processes)
    found = list_rows(rows)
    write_csv(options.results / "wan.csv", found)
    write_json(options.results / "wan.json", {**provenance(), "records": RECORDS})
    print(format_table(found))


if __name__ == "__main__":
    main()
