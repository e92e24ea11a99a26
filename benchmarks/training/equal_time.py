"""Which way to train is ahead at equal time, over 1 and 10 Gbit/s between four nodes: pipelines with and
without compression, data parallelism, ZeRO-3 and ZeRO++, DiLoCo, LoRA.

    python -m benchmarks.training.equal_time

Losses are those of `ways.csv` (`benchmarks.training.ways`), of small models; step times and memory those of
`clapping_ds.plan` for large ones, with all that it assumes. A step of the small model stands for one of the
large one. The unit of time is that of REFERENCE_STEPS on all GPUs over links that take no time.

Writes equal_time.csv and a plot.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from benchmarks.files import RESULTS, new_figure, save_figure, write_csv
from benchmarks.training.curves import UNCOMPRESSED, read_curves
from benchmarks.training.time_to_loss import Curve, find_crossing, find_loss
from benchmarks.training.ways import NUM_LINKS, SCRATCH, TUNING, WAYS
from clapping_ds.plan.machines import GPUS, Machines
from clapping_ds.plan.models import from_numbers
from clapping_ds.plan.ways import TRAININGS, Estimate, Task, list_ways, train_alone
from clapping_ds.report import format_table

NUM_NODES = NUM_LINKS + 1
LATENCY_S = 1e-3
RATES_GBIT_PER_S = (1, 10)
BATCHES = (32, 256)
"""Sequences of a step."""
REFERENCE_STEPS = {SCRATCH: 300, TUNING: 28}
"""Uncompressed, to the loss that all are to reach."""
BUDGETS = (1.0, 1.5)
"""Units of time, after which losses are compared."""
BEYOND = 1.05
"""Of the steps that were measured: a loss after more is not known."""
PIPELINE = f"pipeline of {NUM_NODES}, "
EXCHANGED = "data parallel, eden4"
NOT_COMPRESSED = ("stock", "overlapped")


class Setting(NamedTuple):
    """What is trained: of `from_numbers`, with sequences of 2,048 tokens; on what, one GPU per node."""

    kind: str
    parameters: float
    num_layers: int
    width: int
    gpu: str

    @property
    def name(self) -> str:
        return f"{self.parameters / 1e9:g}B {self.kind}, {NUM_NODES} x {self.gpu}"

    def make_task(self, batch: int, gbit_per_s: float, train: str = "full") -> Task:
        machines = Machines(GPUS[self.gpu], NUM_NODES, 1, gbit_per_s * 1e9 / 8, LATENCY_S)
        model = from_numbers(self.parameters, self.num_layers, self.width, 2048)
        return Task(model, machines, batch, TRAININGS[train])

    def find_unit_s(self, batch: int) -> float:
        """Of time: of REFERENCE_STEPS on all GPUs, over links that take none."""
        task = self.make_task(batch, RATES_GBIT_PER_S[0])
        return REFERENCE_STEPS[self.kind] * task.compute_s(batch / NUM_NODES)

    def has_room(self, memory_bytes: float) -> bool:
        """Whether a GPU has."""
        return memory_bytes <= GPUS[self.gpu].memory_gb * 1e9


SETTINGS = (
    Setting(SCRATCH, 1.3e9, 24, 2048, "A100"),
    Setting(SCRATCH, 7e9, 32, 4096, "A100"),
    Setting(TUNING, 3e9, 28, 3072, "RTX 4090"),
    Setting(TUNING, 7e9, 32, 4096, "A100"),
)


class Candidate(NamedTuple):
    """A way to train: whose losses it has, and what a step takes."""

    way: str
    curve: str
    step_s: float
    memory_bytes: float


def list_candidates(setting: Setting, batch: int, gbit_per_s: float) -> Iterator[Candidate]:
    """Those whose losses were measured."""
    task = setting.make_task(batch, gbit_per_s)
    for found in [*list_ways(task), train_alone(task, 30)]:
        curve, memory_bytes = _find_curve(found), found.memory_bytes
        if found.way == EXCHANGED:  # what was measured does not split the optimizer
            memory_bytes = task.whole_bytes(1)
        if curve in WAYS[setting.kind]:
            yield Candidate(found.way, curve, found.step_s, memory_bytes)
    if setting.kind == TUNING:
        lora = setting.make_task(batch, gbit_per_s, "lora")
        ways = {found.way: found for found in list_ways(lora)}
        one, replicas, pipeline = (ways[name] for name in ("one GPU", "data parallel", f"{PIPELINE}eden4"))
        yield Candidate("one GPU, LoRA", "LoRA", one.step_s, one.memory_bytes)
        quarter = replace(lora, batch=batch // NUM_NODES)
        (one,) = (found for found in list_ways(quarter) if found.way == "one GPU")
        small = "LoRA, a quarter of the batch"
        yield Candidate(f"one GPU, {small}", small, one.step_s, one.memory_bytes)
        yield Candidate("data parallel, LoRA", "LoRA", replicas.step_s, replicas.memory_bytes)
        yield Candidate(
            f"{PIPELINE}LoRA, eden4", "LoRA, pipeline, eden4", pipeline.step_s, pipeline.memory_bytes
        )


def _find_curve(found: Estimate) -> str | None:
    """Whose losses a way of the plan has; None: pipelines of another number of stages, and LoRA."""
    if found.shape:
        codec = found.way.removeprefix(PIPELINE)
        if codec == found.way:
            return None
        return UNCOMPRESSED if codec in NOT_COMPRESSED else f"pipeline, {codec}"
    return UNCOMPRESSED if found.way in ("one GPU", "data parallel", "ZeRO-3") else found.way


Curves = Mapping[tuple[str, str], Mapping[int, Curve]]
"""By task and name: of each seed."""


def list_curves(rows: Sequence[Mapping[str, Any]]) -> Curves:
    found: defaultdict[tuple[str, str], dict[int, list[tuple[int, float]]]] = defaultdict(dict)
    for row in rows:
        found[row["task"], row["name"]].setdefault(row["seed"], []).append((row["step"], row["loss"]))
    return found


def compare(curves: Curves, setting: Setting, batch: int, gbit_per_s: float) -> Iterator[dict[str, Any]]:
    """A row per way. Losses and steps are means over seeds; None where one seed has none."""
    kind, steps = setting.kind, REFERENCE_STEPS[setting.kind]
    unit_s = setting.find_unit_s(batch)
    targets = {seed: find_target(curve, steps) for seed, curve in curves[kind, UNCOMPRESSED].items()}
    for candidate in list_candidates(setting, batch, gbit_per_s):
        measured = curves.get((kind, candidate.curve), {})
        mine = {seed: curve for seed, curve in measured.items() if seed in targets}
        if not mine:
            continue
        is_stepped = candidate.curve.startswith("DiLoCo")
        taken = [find_step(curve, targets[seed], is_stepped) for seed, curve in mine.items()]
        needed = _mean(taken)
        losses = {}
        for budget in BUDGETS:
            after = budget * unit_s / candidate.step_s
            found = [find_loss_after(curve, after, is_stepped) for curve in mine.values()]
            losses[f"loss at {budget:g}"] = _rounded(_mean(found), 3)
        yield {
            "setting": setting.name, "batch": batch, "Gbit/s": gbit_per_s, "way": candidate.way,
            "seeds": len(mine), "reached": len(taken) - taken.count(None),
            "GB per GPU": round(candidate.memory_bytes / 1e9, 1),
            "fits": setting.has_room(candidate.memory_bytes),
            "step s": round(candidate.step_s, 3), "step": round(candidate.step_s * steps / unit_s, 2),
            "steps": _rounded(needed, 1),
            "time": None if needed is None else round(needed * candidate.step_s / unit_s, 2),
            **losses,
            "steps measured": max(step for curve in mine.values() for step, _ in curve),
            f"steps at {BUDGETS[-1]:g}": round(BUDGETS[-1] * unit_s / candidate.step_s, 1),
        }  # fmt: skip


def find_target(curve: Curve, steps: int) -> float:
    """The loss of the uncompressed run after so many steps. ValueError where it was not measured so early."""
    loss = find_loss(curve, steps)
    if loss is None:
        raise ValueError(f"first validation = step {curve[0][0]}; accepted: at most {steps}")
    return loss


def find_step(curve: Curve, target: float, is_stepped: bool) -> float | None:
    """After which a loss is reached, between two validations, at the first at most; None: never. is_stepped:
    the model exists at validations alone."""
    if curve[0][1] <= target:
        return float(curve[0][0])
    if is_stepped:
        return next((float(step) for step, loss in curve if loss <= target), None)
    return find_crossing(curve, target)


def find_loss_after(curve: Curve, steps: float, is_stepped: bool) -> float | None:
    """As `find_loss`, and None after more steps than were measured."""
    if is_stepped:
        steps = max((step for step, _ in curve if step <= steps), default=0)
    return find_loss(curve, steps) if steps <= BEYOND * curve[-1][0] else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def list_times(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A line per way, its time in each setting: "too large" where it does not fit a GPU, "-" where the loss
    was not reached."""
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        place = f"{row['setting']}, {row['Gbit/s']} Gbit/s"
        told = "-" if row["time"] is None else f"{row['time']:.2f}"
        found[row["way"]][place] = told if row["fits"] else "too large"
    places = list(dict.fromkeys(place for cells in found.values() for place in cells))
    return [{"way": way, **{place: cells.get(place, "") for place in places}} for way, cells in found.items()]


def plot(curves: Curves, target: Path) -> None:
    """Loss against time, a line per way that fits, a panel per setting and rate, with the larger batch."""
    figure, axes = new_figure(len(SETTINGS), len(RATES_GBIT_PER_S), inches=(14, 5 * len(SETTINGS)))
    for setting, row in zip(SETTINGS, axes, strict=True):
        for gbit_per_s, axis in zip(RATES_GBIT_PER_S, row, strict=True):
            _draw(axis, curves, setting, gbit_per_s)
    save_figure(figure, target)


def _draw(axis: Any, curves: Curves, setting: Setting, gbit_per_s: float) -> None:
    batch = BATCHES[-1]
    unit_s = setting.find_unit_s(batch)
    for candidate in list_candidates(setting, batch, gbit_per_s):
        mine = list(curves.get((setting.kind, candidate.curve), {}).values())
        if mine and setting.has_room(candidate.memory_bytes):
            times = [step * candidate.step_s / unit_s for step, _ in mine[0]]
            losses = [
                mean(losses) for losses in zip(*([loss for _, loss in curve] for curve in mine), strict=True)
            ]
            axis.plot(times, losses, marker=".", label=candidate.way)
    axis.set(
        xscale="log", title=f"{setting.name}, batch {batch}, {gbit_per_s} Gbit/s", ylabel="validation loss"
    )
    axis.set(xlim=(0.05, 20), xlabel="time, of as many uncompressed steps over free links")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    curves = list_curves(read_curves(options.results / "ways.csv"))
    rows = [
        row
        for setting in SETTINGS
        for batch in BATCHES
        for gbit_per_s in RATES_GBIT_PER_S
        for row in compare(curves, setting, batch, gbit_per_s)
    ]
    write_csv(options.results / "equal_time.csv", rows)
    plot(curves, options.results / "equal_time.png")
    for batch in BATCHES:
        print(f"\ntime to the loss, steps of {batch} sequences")
        print(format_table(list_times(row for row in rows if row["batch"] == batch)))


if __name__ == "__main__":
    main()
