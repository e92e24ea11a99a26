"""Which configuration reaches the uncompressed run's loss first, by link speed, depth and micro-batches.

    python -m benchmarks.training.time_to_loss

Losses are those of `time_to_loss_curves.csv` (`benchmarks.training.curves`), step times those of the model
of a pipeline (`clapping_ds.plan.timeline`, which `benchmarks.links.simulate` checks against measured steps):
all stages compute alike, a backward pass takes twice a forward pass, every link is as fast, no latency. rho
is the time that a micro-batch's bf16 activations take on a link, divided by the time that a stage computes
on a micro-batch, which is the unit of all times here. A message's bits are those of 4,096 x 4,096 values,
what is learned counted over 256 messages. Codecs hold a stage up for as long as they did the CPU in the
runs, as a share of its compute.

Uncompressed training is there twice: stock 1F1B, whose sends and receives block, and with the schedule that
ours have (`in_flight` "auto"), which all others have as well, whoever they are of.

Writes time_to_loss.csv, time_to_loss_best.csv, and a plot per task.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from benchmarks.codecs.peers import tah_quant
from benchmarks.files import RESULTS, new_figure, save_figure, write_csv
from benchmarks.training.curves import (
    TAH_QUANT,
    TASKS,
    UNCOMPRESSED,
    find_target,
    list_blocks,
    read_curves,
)
from clapping_ds.codecs import AnyCodec, CodecSequence, Transform, bits_per_value
from clapping_ds.config import ClappingConfig
from clapping_ds.plan.bounds import automatic_depth
from clapping_ds.plan.timeline import Link, Stage, Step, simulate, slot_bytes
from clapping_ds.report import format_table

STOCK, OVERLAPPED = "uncompressed, stock", "uncompressed, overlapped"
RHOS = (0.5, 1.0, 4.0, 16.0, 64.0)
NUM_LINKS = (1, 3, 7)
MICRO_BATCHES = (2, 4, 8, 16)
RAW_BITS = 16
PERIOD = 256
"""Messages, over which what is learned is counted."""
BASELINES = (STOCK, OVERLAPPED, TAH_QUANT, "aqsgd int4", "Clapping-FU eden2", "Clapping-FC eden4")
"""What others have: all else is ours."""


class Traffic(NamedTuple):
    """What a run sends: bits per value of keys and deltas, and how often which; at first keys alone, of other
    bits."""

    key_bits: float
    delta_bits: float
    p_new: float
    first_bits: float
    first_steps: int


def find_traffic(task: str, name: str) -> Traffic:
    if name == TAH_QUANT:
        return Traffic(tah_quant().bits, 0.0, 1.0, tah_quant().bits, 1)
    block = list_blocks(TASKS[task])[UNCOMPRESSED if name in (STOCK, OVERLAPPED) else name]
    config = ClappingConfig.from_ds_config({"clapping": block})
    plan, sampling = config.plan("activations"), config.sampling
    first = (_bits(plan.key), sampling.pool) if plan.start is None else (_bits(plan.start), plan.start_steps)
    return Traffic(_bits(plan.key), _bits(plan.delta), sampling.p_new, *first)


def _bits(codec: AnyCodec) -> float:
    """Per value, in a large model."""
    if isinstance(codec, CodecSequence):
        return sum(_bits(member) for member in codec.codecs)
    if isinstance(codec, Transform) and (codec.basis == "eigen" or codec.anchors):
        codec = codec.model_copy(update={"refresh": PERIOD})
    return bits_per_value(codec, torch.bfloat16)


@cache
def find_step(
    num_links: int, micro_batches: int, rho: float, key_bits: float, delta_bits: float, fresh: float,
    codec_share: float, is_stock: bool,
) -> float:  # fmt: skip
    """Time of a step, in that of a stage and micro-batch."""
    stage = Stage(1 / 3, 2 / 3, codec_share / 4, codec_share / 4)  # of a link's four passes, one each way
    sizes = slot_bytes(micro_batches, key_bits / RAW_BITS, delta_bits / RAW_BITS, fresh)
    link = Link(1 / rho)
    step = Step((stage,) * (num_links + 1), (link,) * num_links, sizes, sizes)
    return (
        simulate(step, "stock").step_s if is_stock else simulate(step, "ours", automatic_depth(step)).step_s
    )


class Times(NamedTuple):
    """Of steps: at the start or while the pool fills, and later."""

    first: float
    later: float
    first_steps: int

    def after(self, steps: float) -> float:
        """Time of so many steps."""
        return min(steps, self.first_steps) * self.first + max(0.0, steps - self.first_steps) * self.later

    def count_steps(self, time: float) -> float:
        """Steps in so much time."""
        first = self.first_steps * self.first
        return time / self.first if time < first else self.first_steps + (time - first) / self.later


def find_times(
    traffic: Traffic, num_links: int, micro_batches: int, rho: float, share: float, is_stock: bool
) -> Times:
    def step(key_bits: float, fresh: float) -> float:
        sizes = key_bits, traffic.delta_bits
        return find_step(num_links, micro_batches, rho, *sizes, fresh, share, is_stock)

    later = step(traffic.key_bits, traffic.p_new)
    return Times(step(traffic.first_bits, 1.0), later, traffic.first_steps)


Curve = Sequence[tuple[int, float]]
"""(step, loss), of validations."""


def find_crossing(curve: Curve, target: float) -> float | None:
    """The step at which a loss is reached, between two validations; None: never."""
    for (step, loss), (next_step, next_loss) in pairwise(curve):
        if next_loss <= target < loss:
            return step + (next_step - step) * (loss - target) / (loss - next_loss)
    return None


def find_loss(curve: Curve, steps: float) -> float | None:
    """After so many steps, between two validations; of more than were trained, the last one's."""
    if steps < curve[0][0]:
        return None
    for (step, loss), (next_step, next_loss) in pairwise(curve):
        if steps <= next_step:
            return loss + (next_loss - loss) * (steps - step) / (next_step - step)
    return curve[-1][1]


class Trained(NamedTuple):
    """What was measured of a run, mean over its seeds."""

    steps: float | None
    """To the uncompressed run's loss; None: not reached with every seed."""
    curves: list[Curve]
    codec_share: float


def list_trained(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, int], Trained]:
    """By task, name and number of links. Links change nothing of an uncompressed run."""
    by_seed: defaultdict[tuple[str, str, int], dict[int, list[Any]]] = defaultdict(dict)
    for row in rows:
        by_seed[row["task"], row["name"], row["num_links"]].setdefault(row["seed"], []).append(row)
    found = {}
    for (task, name, num_links), seeds in by_seed.items():
        curves = {seed: [(row["step"], row["loss"]) for row in mine] for seed, mine in seeds.items()}
        crossings = [find_crossing(curve, find_target(rows, task, seed)) for seed, curve in curves.items()]
        known = [crossing for crossing in crossings if crossing is not None]
        steps = mean(known) if len(known) == len(crossings) else None
        share = mean(mine[-1]["codec share"] for mine in seeds.values())
        if name == UNCOMPRESSED:
            for links in NUM_LINKS:
                for variant in (STOCK, OVERLAPPED):
                    found[task, variant, links] = Trained(
                        float(TASKS[task].steps), list(curves.values()), 0.0
                    )
        else:
            found[task, name, num_links] = Trained(steps, list(curves.values()), share)
    return found


def list_rows(trained: Mapping[tuple[str, str, int], Trained]) -> Iterator[dict[str, Any]]:
    """A line per task, pipeline, link speed and run."""
    for task in dict.fromkeys(task for task, _, _ in trained):
        for num_links in NUM_LINKS:
            mine = {
                name: found
                for (of, name, links), found in trained.items()
                if (of, links) == (task, num_links)
            }
            for micro_batches in MICRO_BATCHES:
                for rho in RHOS:
                    yield from _compare(task, mine, num_links, micro_batches, rho)


def _compare(
    task: str, mine: Mapping[str, Trained], num_links: int, micro_batches: int, rho: float
) -> Iterator[dict[str, Any]]:
    place = num_links, micro_batches, rho
    times = {
        name: find_times(find_traffic(task, name), *place, found.codec_share, name == STOCK)
        for name, found in mine.items()
    }
    steps = TASKS[task].steps
    stock, overlapped = (times[name].after(steps) for name in (STOCK, OVERLAPPED))
    for name, found in mine.items():
        taken = None if found.steps is None else times[name].after(found.steps)
        losses = [find_loss(curve, times[name].count_steps(overlapped / 4)) for curve in found.curves]
        reached = [loss for loss in losses if loss is not None]
        yield {
            "task": task, "links": num_links, "micro-batches": micro_batches, "rho": rho, "run": name,
            "steps": None if found.steps is None else round(found.steps, 1),
            "step": round(times[name].later, 3),
            "time": None if taken is None else round(taken, 1),
            "of stock": None if taken is None else round(taken / stock, 4),
            "of overlapped": None if taken is None else round(taken / overlapped, 4),
            "loss at a quarter": round(mean(reached), 4) if len(reached) == len(losses) else None,
        }  # fmt: skip


def find_best(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each task, pipeline and link speed: our fastest run, and the fastest of the others'."""
    found = []
    groups: defaultdict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["links"], row["micro-batches"], row["rho"]].append(row)
    for (task, links, micro_batches, rho), mine in groups.items():
        reached = [row for row in mine if row["time"] is not None]
        ours = min((row for row in reached if row["run"] not in BASELINES), key=_time, default=None)
        others = min((row for row in reached if row["run"] in BASELINES), key=_time)
        direct = min((row for row in reached if row["run"].startswith("direct")), key=_time, default=None)
        found.append({
            "task": task, "links": links, "micro-batches": micro_batches, "rho": rho,
            "ours": "-" if ours is None else ours["run"],
            "of stock": None if ours is None else ours["of stock"],
            "of overlapped": None if ours is None else ours["of overlapped"],
            "best direct, of stock": None if direct is None else direct["of stock"],
            "best of others": others["run"], "of stock, others": others["of stock"],
        })  # fmt: skip
    return found


def _time(row: Mapping[str, Any]) -> float:
    time: float = row["time"]
    return time


def plot(rows: Sequence[Mapping[str, Any]], task: str, target: Path) -> None:
    """Time against rho, a line per run, a panel per number of links, with 8 micro-batches."""
    figure, axes = new_figure(1, len(NUM_LINKS), inches=(15, 5.5), sharey=True)
    names = list(dict.fromkeys(row["run"] for row in rows if row["task"] == task))
    for axis, num_links in zip(axes.flat, NUM_LINKS, strict=True):
        for name in names:
            mine = [
                row
                for row in rows
                if (row["task"], row["run"], row["links"], row["micro-batches"]) == (task, name, num_links, 8)
            ]
            points = [(row["rho"], row["of overlapped"]) for row in mine if row["of overlapped"] is not None]
            axis.plot(*zip(*points, strict=True), marker=".", label=name) if points else axis.plot([], [])
        axis.set(xscale="log", yscale="log", xlabel="rho", title=f"{num_links} link{'s' * (num_links > 1)}")
        axis.grid(alpha=0.3)
    axes.flat[0].set_ylabel("time to the uncompressed loss, of overlapped uncompressed")
    axes.flat[1].legend(fontsize=7)
    figure.suptitle(task)
    save_figure(figure, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = list(list_rows(list_trained(read_curves(options.results / "time_to_loss_curves.csv"))))
    write_csv(options.results / "time_to_loss.csv", rows)
    best = find_best(rows)
    write_csv(options.results / "time_to_loss_best.csv", best)
    for number, task in enumerate(dict.fromkeys(row["task"] for row in rows)):
        plot(rows, task, options.results / f"time_to_loss_{number + 1}.png")
    print(format_table([row for row in best if row["micro-batches"] == 8]))


if __name__ == "__main__":
    main()
