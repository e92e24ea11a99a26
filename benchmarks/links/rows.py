"""What `benchmarks.links.pipeline` makes of its measurements: rows, their bound, the plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.files import new_figure, read_csv, save_figure
from benchmarks.training.compare import STOCK

Answers = Sequence[Mapping[str, Any]]
"""What the ranks of stage 0 and stage 1 said to one order."""


@dataclass(frozen=True)
class Compute:
    """Seconds that each stage computes on one micro-batch, without codecs."""

    forward_s_0: float
    backward_s_0: float
    forward_s_1: float
    backward_s_1: float

    @property
    def stage_0_s(self) -> float:
        return self.forward_s_0 + self.backward_s_0

    @property
    def stage_1_s(self) -> float:
        return self.forward_s_1 + self.backward_s_1

    @property
    def slowest_s(self) -> float:
        return max(self.stage_0_s, self.stage_1_s)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Compute":
        """In the steps of the row itself."""
        return cls(**{time.name: row[time.name] for time in fields(cls)})

    @classmethod
    def least(cls, rows: Sequence[Mapping[str, Any]]) -> "Compute":
        """Of each time the least: all runs compute the same, and what goes on beside it only slows it."""
        return cls(**{time.name: min(row[time.name] for row in rows) for time in fields(cls)})


@dataclass(frozen=True)
class Wire:
    """Seconds on the link: of a micro-batch's message on average, and of the smallest."""

    activations_s: float
    gradients_s: float
    least_s: float

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Wire":
        second = row["bandwidth_bytes_per_s"]
        step = row["micro_batches"] * second
        least = min(row["key_bytes"], row["delta_bytes"])
        return cls(row["activations_bytes"] / step, row["gradients_bytes"] / step, least / second)


def bound_s(compute: Compute, wire: Wire, micro_batches: int) -> float:
    """The step time that no schedule of two stages can beat.

    The largest of each resource's work (two stages, two directions of the link), together with the least
    that comes before its first and after its last micro-batch. Codecs, the optimizer's step and the link's
    latency are left out, as if they took no time.
    """
    to_stage_1_s = compute.forward_s_0 + wire.least_s
    from_stage_1_s = wire.least_s + compute.backward_s_0
    return max(
        micro_batches * compute.stage_0_s,
        to_stage_1_s + micro_batches * compute.stage_1_s + from_stage_1_s,
        compute.forward_s_0 + micro_batches * wire.activations_s + compute.stage_1_s + from_stage_1_s,
        to_stage_1_s + compute.stage_1_s + micro_batches * wire.gradients_s + compute.backward_s_0,
    )


def timing(rounds: Sequence[Answers]) -> dict[str, float]:
    """Medians over the measured steps of one run: of the step, of a micro-batch's passes, of the steps' means
    of these (a step takes as long as all its micro-batches, slow ones included) and of the steps' means of
    encode_s and decode_s, which differ from message to message. overhead_s is of the first stage, which is
    the last to finish."""
    steps_s = [max(answer["step_s"] for answer in answers) for answers in rounds]
    figures = {"step_s": median(steps_s), "step_min_s": min(steps_s), "step_max_s": max(steps_s)}
    for name in ("forward_s", "backward_s"):
        for stage in (0, 1):
            calls_s = [answers[stage][name] for answers in rounds]
            figures[f"{name}_{stage}"] = median(chain.from_iterable(calls_s))
            figures[f"mean_{name}_{stage}"] = median(map(_mean, calls_s))
    for name in ("encode_s", "decode_s"):
        figures[name] = median(_mean([*answers[0][name], *answers[1][name]]) for answers in rounds)
    return figures | {"overhead_s": median(answers[0]["overhead_s"] for answers in rounds)}


def _mean(calls_s: Sequence[float]) -> float:
    return sum(calls_s) / max(1, len(calls_s))


def traffic(
    before: Mapping[str, Any], after: Mapping[str, Any], raw_bytes: int, micro_batches: int
) -> dict[str, Any]:
    """What crossed the link in a measured step, from the engine's counters before and after all of them.

    raw_bytes   of one micro-batch in one direction: what stock DeepSpeed sends
    """
    if not after["report"]:
        step_bytes = raw_bytes * micro_batches
        same = {"key_bytes": raw_bytes, "delta_bytes": raw_bytes, "fresh_share": 1.0}
        return {"activations_bytes": step_bytes, "gradients_bytes": step_bytes, **same}
    figures = {name: after[name] for name in ("key_bytes", "delta_bytes")}
    num_messages = num_fresh = 0.0
    for old, new in zip(before["report"], after["report"], strict=True):
        messages = new["messages"] - old["messages"]
        payload_bytes = new["payload_bytes"] - old["payload_bytes"]
        figures[f"{new['direction']}_bytes"] = payload_bytes * micro_batches / messages
        num_messages += messages
        num_fresh += new["messages"] * new["fresh_share"] - old["messages"] * old["fresh_share"]
    return figures | {"fresh_share": num_fresh / num_messages}


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one rho with what follows from all of them: bound, efficiency, speed-up, equal losses.

    The bound takes the shortest stage times of any run at this rho. own_efficiency takes those of the same
    steps instead: it shows what waiting, codecs and overhead cost, without a machine whose speed changes
    from step to step, and without what the transport's threads slow the stage's own core.
    """
    compute = Compute.least(rows)
    (stock,) = (row for row in rows if row["run"] == STOCK)
    found = []
    for row in rows:
        bound = bound_s(compute, Wire.of(row), row["micro_batches"])
        own_bound = bound_s(Compute.of(row), Wire.of(row), row["micro_batches"])
        found.append({
            **row,
            "rho_measured": row["raw_bytes"] / row["bandwidth_bytes_per_s"] / compute.slowest_s,
            "bound_s": bound,
            "efficiency": bound / row["step_s"],
            "own_efficiency": own_bound / row["step_s"],
            "speed_up": stock["step_s"] / row["step_s"],
            "losses_equal_stock": row["train_losses"] == stock["train_losses"],
        })  # fmt: skip
    return found


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as the printed table has it."""
    return {
        "rho": "unshaped" if row["rho"] == 0 else row["rho"],
        "Mbit/s": row["bandwidth_bytes_per_s"] * 8 / 1e6,
        "run": row["run"],
        "in flight": row["in_flight"],
        "codec": row["codecs"],
        "kB a step": (row["activations_bytes"] + row["gradients_bytes"]) / 1e3,
        "step ms": row["step_s"] * 1e3,
        "min": row["step_min_s"] * 1e3,
        "max": row["step_max_s"] * 1e3,
        "bound ms": row["bound_s"] * 1e3,
        "efficiency": f"{row['efficiency']:.0%}",
        "own": f"{row['own_efficiency']:.0%}",
        "speed-up": f"{row['speed_up']:.2f}x",
        "losses equal stock": "yes" if row["losses_equal_stock"] else "no",
    }


def plot(source: Path, target: Path) -> None:
    """Draws what the CSV says: speed-up over stock, and share of the bound, against rho."""
    rows = read_csv(source)
    figure, axes = new_figure(1, 2, inches=(11, 4.2))
    for axis, name in zip(axes, ("speed_up", "efficiency"), strict=True):
        for run in dict.fromkeys(row["run"] for row in rows):
            mine = sorted((float(row["rho_measured"]), float(row[name])) for row in rows if row["run"] == run)
            axis.plot(*zip(*mine, strict=True), marker=".", label=run)
        axis.set_xscale("log")
        axis.set_xlabel("rho: raw bytes of a micro-batch / link speed / stage time")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("speed-up over stock DeepSpeed")
    axes[1].set_ylabel("bound / step time")
    axes[1].set_ylim(0, 1.05)
    axes[0].legend(fontsize=8)
    save_figure(figure, target)
