"""Protocol NanoGPT's setting at a scale that fits: time to the dense run's loss over 8 stages of one block.

    python -m benchmarks.training.wan [--seeds 1 2 3]

The contest (github.com/PluralisResearch/ProtocolNanoGPT) trains a GPT of 203M parameters on 8 stages of one
block, joined by 200 Mbit/s and 50 ms, and counts T, the steps to a loss of 3.276 times the time of a step.
Here the steps are those of a byte GPT of 8 blocks, 7 links, to the loss of its own dense bf16 run (what
crosses a link is bf16, and no more compressed), with the contest's schedule of the learning rate: it falls
linearly to zero over the last 70 % of the steps that a run is given. Runs of one configuration are given more
and more steps (`HORIZONS`), each from the start, until one reaches the loss; what counts is the first
validation that has it. The time of a step is the contest's, for its own shapes: 512 sequences of 1,024 tokens
and 1,024 channels in M micro-batches, one inbound wire per rank, which both directions share:

    contest's meter, M = 64    (2 M + 2 (S - 2)) * (transfer + latency)
    contest's meter, best M    the same with the M of 8 to 64 that is fastest
    latency hidden             2 M * transfer + 2 (S - 1) * (transfer + latency), M = 64

The contest's meter lets a message have the wire for its latency too, which no schedule can hide; M is free
there. A real wire carries the next message while one is on its way, and with `in_flight` the stages use that.
Compute counts in none, as the meter has it. The first steps of a run with a `start` have more bits; bits per
value are those after it. T is given relative to dense with the contest's meter and M = 64.
Five to twenty minutes a run on one core; what `wan_curves.csv` has is not measured again.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from benchmarks.files import RESULTS, provenance, write_csv, write_json
from benchmarks.training import curves
from benchmarks.training.compare import block
from benchmarks.training.curves import TASKS, read_curves, validations
from benchmarks.training.finetune import add_rows
from benchmarks.training.time_to_loss import Times
from clapping_ds.codecs import AnyCodec, Transform
from clapping_ds.config import ClappingConfig
from clapping_ds.report import format_table

TASK, NUM_LINKS = "byte GPT", 7
DENSE_STEPS = TASKS[TASK].steps
HORIZONS = (1.125, 1.25, 1.375, 1.5, 2.0)
"""Steps that runs are given, of dense's."""
COOLDOWN = 0.7
"""Last part of a run, in which the learning rate falls."""
LARGEST_RATE = 2.0
"""Of the task's, which is for runs that end at any step. Dense ended lower with 2 than with 1; 4 was behind
at half of the run, and was stopped there. One seed."""
NUM_STAGES, MICRO_BATCHES = 8, 64
TOKENS, CHANNELS = 512 * 1024, 1024
"""Of a step; of a token."""
BYTES_PER_S, LATENCY_S = 200e6 / 8, 0.05
PERIOD = 256
"""Messages, over which what is learned is counted: a run of 3,000 steps has 192,000 per channel."""
DENSE = "dense bf16"
COLUMNS = ("step", "loss", "training loss", "bits as sent")
"""Of a validation, that are kept."""


class Record(NamedTuple):
    """Of the contest itself, at 203M parameters."""

    steps: int
    step_s: float


RECORDS = {DENSE: Record(2925, 100.475), "ReparamSSN (subspace reference)": Record(9125, 19.889)}


class Run(NamedTuple):
    """One training."""

    name: str
    seed: int
    horizon: int
    """Steps."""


def find_transfer_s(bits: float, micro_batches: int) -> float:
    """Of a message. bits: per value."""
    return TOKENS / micro_batches * CHANNELS * bits / 8 / BYTES_PER_S


def find_metered_s(bits: float, micro_batches: int = MICRO_BATCHES) -> float:
    """Of a step, by the contest's meter. bits: per value."""
    num_messages = 2 * micro_batches + 2 * (NUM_STAGES - 2)
    return num_messages * (find_transfer_s(bits, micro_batches) + LATENCY_S)


def find_best_metered_s(bits: float) -> float:
    """With the best number of micro-batches."""
    return min(find_metered_s(bits, number) for number in (8, 16, 32, 64))


def find_hidden_s(bits: float) -> float:
    """Of a step, where latency does not keep the next message from the wire. bits: per value."""
    transfer_s = find_transfer_s(bits, MICRO_BATCHES)
    return 2 * MICRO_BATCHES * transfer_s + 2 * (NUM_STAGES - 1) * (transfer_s + LATENCY_S)


SCHEDULES = {
    f"contest's meter, M = {MICRO_BATCHES}": find_metered_s,
    "contest's meter, best M": find_best_metered_s,
    "latency hidden": find_hidden_s,
}


REFRESH = 16
"""Messages: four steps, as `PERIOD` of the contest's."""


def transform(bits: float, refresh: int = REFRESH) -> dict[str, Any]:
    learned = {"basis": "eigen", "anchors": 256, "refresh": refresh}
    return {"name": "transform", "bits": bits, "rows_per_outlier": 1024, **learned}


class Start(NamedTuple):
    """Bits of `transform`: of activations and gradients, and of both in the first steps."""

    activations: float
    gradients: float
    steps: int
    bits: float
    refresh: int = REFRESH

    def __str__(self) -> str:
        own = f", refresh {self.refresh}" if self.refresh != REFRESH else ""
        return f"activations {self[0]}, gradients {self[1]}, {self[2]} steps with {self[3]}{own}"

    def block(self) -> dict[str, Any]:
        start = {"steps": self.steps, "bits": self.bits}
        bits = {"activations": self.activations, "gradients": self.gradients}
        directions = {
            name: {"codec": transform(few, self.refresh), "start": start} for name, few in bits.items()
        }
        return {"strategy": "direct", **directions}


STARTS = [
    Start(1, 1, 40, 4),
    Start(1, 0.5, 40, 4),
    Start(0.5, 1.5, 40, 4),
    Start(0.5, 2, 20, 4),
    Start(0.5, 1.5, 20, 8),
    Start(0.5, 1.5, 20, 4),
    Start(0.5, 1.5, 20, 4, refresh=8),
    Start(0.5, 1, 20, 4, refresh=8),
]
BLOCKS: dict[str, dict[str, Any]] = {
    DENSE: block("direct", "none"),
    "direct eden4": block("direct", "eden4"),
    **{f"direct transform {bits}": block("direct", transform(bits)) for bits in (2, 1)},
    **{str(start): start.block() for start in STARTS},
}
"""With few bits from the first step on, half of what activations are does not arrive in the beginning, and
runs stay behind: hence the starts."""


class Traffic(NamedTuple):
    """Bits per value, mean of both directions, of the contest's messages."""

    bits: float
    start_bits: float = 0.0
    start_steps: int = 0

    def find_times(self, find_step_s: Callable[[float], float]) -> Times:
        """Of steps, by one of `SCHEDULES`."""
        return Times(find_step_s(self.start_bits), find_step_s(self.bits), self.start_steps)


def find_traffic(block: dict[str, Any]) -> Traffic:
    """Both directions have a start alike."""
    plans = ClappingConfig.from_ds_config({"clapping": block}).plans.values()
    bits, start_bits = (
        _find_bits([codec for codec in codecs if codec is not None])
        for codecs in ([plan.key for plan in plans], [plan.start for plan in plans])
    )
    return Traffic(bits, start_bits, max(plan.start_steps for plan in plans))


def _find_bits(codecs: Sequence[AnyCodec]) -> float:
    shape = torch.Size((TOKENS // MICRO_BATCHES, CHANNELS))
    num_bytes = [_in_contest(codec).nbytes(shape, torch.bfloat16) for codec in codecs]
    return 8 * mean(num_bytes) / shape.numel() if codecs else 0.0


def _in_contest(codec: AnyCodec) -> AnyCodec:
    """With what is learned counted over many messages."""
    if not isinstance(codec, Transform):
        return codec
    return codec.model_copy(update={"refresh": PERIOD * codec.refresh // REFRESH})


def measure(runs: Sequence[Run], target: float | None) -> list[dict[str, Any]]:
    """A row per validation of runs that are given more and more steps, up to the first that reaches the
    target. target: None: dense."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        told = curves.Run(TASK, run.name, NUM_LINKS, run.seed)
        rate = partial(find_rate, horizon=run.horizon)
        found = [
            {**run._asdict(), **{name: row[name] for name in COLUMNS}}
            for row in validations(told, BLOCKS[run.name], run.horizon, rate)
        ]
        rows += found
        if target is not None and min(row["loss"] for row in found) <= target:
            break
    return rows


def find_rate(step: int, horizon: int) -> float:
    """The learning rate, as a share of the task's."""
    return LARGEST_RATE * min(TASKS[TASK].warm_up(step), (1 - step / horizon) / COOLDOWN)


def find_targets(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """By seed: dense's last loss."""
    return {row["seed"]: row["loss"] for row in rows if row["name"] == DENSE}


def find_steps(rows: Sequence[Mapping[str, Any]], name: str, seed: int) -> int | None:
    """To the loss that dense ends at, fewest of its runs; None: none has reached it."""
    target = find_targets(rows)[seed]
    reached = [
        row["step"] for row in rows if (row["name"], row["seed"]) == (name, seed) and row["loss"] <= target
    ]
    return min(reached, default=None)


def list_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line per run and schedule, then the contest's own."""
    found = []
    dense_s = DENSE_STEPS * find_metered_s(find_traffic(BLOCKS[DENSE]).bits)
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        seeds = dict.fromkeys(row["seed"] for row in mine)
        steps = [find_steps(rows, name, seed) for seed in seeds]
        known = [number for number in steps if number is not None]
        traffic = find_traffic(BLOCKS[name])
        for schedule, find_step_s in SCHEDULES.items():
            times = [traffic.find_times(find_step_s).after(number) for number in known]
            is_known = len(known) == len(steps)
            found.append({
                "run": name, "schedule": schedule, "seeds": len(seeds),
                "start": traffic.start_steps or None, "bits per value": round(traffic.bits, 3),
                "steps of dense": round(mean(known) / DENSE_STEPS, 3) if is_known else None,
                "mean step s": round(sum(times) / sum(known), 2) if is_known else None,
                "T of dense": round(mean(times) / dense_s, 4) if is_known else None,
            })  # fmt: skip
    dense = RECORDS[DENSE]
    for name, record in RECORDS.items():
        share = record.steps / dense.steps
        found.append({
            "run": f"contest, 203M: {name}", "schedule": next(iter(SCHEDULES)), "seeds": 1, "start": None,
            "bits per value": None, "steps of dense": round(share, 3), "mean step s": round(record.step_s, 2),
            "T of dense": round(share * record.step_s / dense.step_s, 4),
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", default=list(BLOCKS), help="names of runs")
    parser.add_argument("--horizons", type=float, nargs="+", default=HORIZONS, help="of dense's steps")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.results / "wan_curves.csv"
    rows = read_curves(path)
    known = {Run(row["name"], row["seed"], row["horizon"]) for row in rows}
    dense = [Run(DENSE, seed, DENSE_STEPS) for seed in options.seeds]
    jobs = [partial(measure, [run], None) for run in dense if run not in known]
    add_rows(jobs, rows, path, options.processes)
    jobs = []
    for seed in options.seeds:
        for name in options.only:
            if name == DENSE or find_steps(rows, name, seed) is not None:
                continue
            runs = [Run(name, seed, round(horizon * DENSE_STEPS)) for horizon in options.horizons]
            new = [run for run in runs if run not in known]
            if new:
                jobs.append(partial(measure, new, find_targets(rows)[seed]))
    add_rows(jobs, rows, path, options.processes)
    found = list_rows(rows)
    write_csv(options.results / "wan.csv", found)
    write_json(options.results / "wan.json", {**provenance(), "records": RECORDS})
    print(format_table(found))


if __name__ == "__main__":
    main()
