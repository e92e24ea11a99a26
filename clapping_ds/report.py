"""What was compressed, what it cost and what it saved, as tables and as events of a monitor."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any, Protocol

import torch

from clapping_ds.codecs import bits_per_value
from clapping_ds.codecs.sequence import label
from clapping_ds.config import LazyConfig, Plan
from clapping_ds.link.traffic import Traffic


class Measured(Protocol):
    """A channel, or one way of replicas' gradients."""

    link: str
    direction: str
    traffic: Traffic

    @property
    def memory_nbytes(self) -> int: ...


def make_row(channel: Measured, traffic: Traffic | None = None) -> dict[str, Any]:
    """One channel's figures, for `format_table` and for the monitor. traffic: of these counters, in place of
    those since the start."""
    traffic = channel.traffic if traffic is None else traffic
    return {
        "link": channel.link,
        "direction": channel.direction,
        "messages": traffic.num_messages,
        "fresh_share": traffic.fresh_share,
        "payload_bytes": traffic.payload_bytes,
        "raw_bytes": traffic.raw_bytes,
        "ratio": traffic.ratio,
        "bits_per_value": traffic.bits_per_value,
        "relative_error": traffic.relative_error,
        "memory_bytes": channel.memory_nbytes,
    }


class Recent:
    """What channels did since it was asked last."""

    def __init__(self) -> None:
        self._before: dict[tuple[str, str], Traffic] = {}

    def restart(self, channels: Iterable[Measured]) -> None:
        """From here on, as after counters were loaded."""
        self._before = {self._name(channel): channel.traffic.since(Traffic()) for channel in channels}

    def list_rows(self, channels: Iterable[Measured]) -> list[dict[str, Any]]:
        """As `make_row`, of each that sent something."""
        rows, known = [], list(channels)
        for channel in known:
            traffic = channel.traffic.since(self._before.get(self._name(channel), Traffic()))
            if traffic.num_messages:
                rows.append(make_row(channel, traffic))
        self.restart(known)
        return rows

    @staticmethod
    def _name(channel: Measured) -> tuple[str, str]:
        return channel.link, channel.direction


EVENTS = ("ratio", "bits_per_value", "relative_error", "fresh_share", "memory_bytes", "held_back")


def make_events(rows: Iterable[Mapping[str, Any]], samples: int) -> list[tuple[str, float, int]]:
    """Rows of `make_row` as events of DeepSpeed's monitor: (name, value, samples). The value is the mean over
    rows of the same link and direction, which replicas have."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name in EVENTS:
            if row.get(name) is not None:
                found[f"Train/Clapping/{row['link']}/{row['direction']}/{name}"].append(row[name])
    return [(name, mean(values), samples) for name, values in found.items()]


def describe_cost(plans: Mapping[str, Plan], dtype: torch.dtype) -> str:
    """What the user's configuration will cost: mean bits per value and the saving, by direction.

    dtype   of the tensors that the stages send
    """
    raw_bits = dtype.itemsize * 8
    has_start = any(plan.start is not None for plan in plans.values())
    rows = []
    for direction, plan in plans.items():
        mean = plan.mean_bits_per_value(dtype)
        delta = f"{label(plan.delta)} {bits_per_value(plan.delta, dtype):.2f} bit"
        start = "-"
        if plan.start is not None:
            start = f"{plan.start_steps} steps {bits_per_value(plan.start, dtype):.2f} bit"
        rows.append({
            "direction": direction,
            **({"start": start} if has_start else {}),
            "key": f"{label(plan.key)} {bits_per_value(plan.key, dtype):.2f} bit",
            "delta": delta if plan.p_new < 1 else "-",
            "p_new": plan.p_new,
            "mean bits": mean,
            f"saving against {raw_bits} bit": f"{raw_bits / mean:.2f}x",
        })  # fmt: skip
    return format_table(rows)


def describe_sampling(sampling: LazyConfig) -> str:
    """How often samples are replayed, in words."""
    held, first = "1 mini-batch is held", "step 0 is"
    if sampling.pool > 1:
        held = f"{sampling.pool} mini-batches are held, each used once in a round"
        first = f"the first {sampling.pool} steps are"
    uses = "and no other is drawn later"
    if sampling.p_new:
        uses = f"a sample is used {1 / sampling.p_new:.3g} times on average"
    return f"lazy sampling: {held}; {first} all fresh; {uses}"


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with equal keys as an aligned text table."""
    header = list(rows[0])
    cells = [[_format_cell(row[name]) for name in header] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [header, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _format_cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def say(text: str) -> None:
    """Prints for the user: hosts' loggers hide what is below a warning."""
    print("clapping:", text, sep="\n" if "\n" in text else " ", flush=True)
