"""What was compressed, what it cost and what it saved: counters per channel, and tables of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from clapping_ds.codecs import bits_per_value
from clapping_ds.config import ClappingConfig
from clapping_ds.message import Spec

if TYPE_CHECKING:
    from clapping_ds.channel import Channel

DIRECTIONS = ("activations", "gradients")


@dataclass
class Traffic:
    """Counters of one channel end since the start. Both ends of a channel count the same."""

    num_messages: int = 0
    num_fresh: int = 0
    num_values: int = 0
    payload_bytes: int = 0
    raw_bytes: int = 0
    error_square: float = 0.0
    value_square: float = 0.0

    def count(self, fresh: bool, payload_bytes: int, specs: Sequence[Spec]) -> None:
        self.num_messages += 1
        self.num_fresh += fresh
        self.num_values += sum(spec.shape.numel() for spec in specs)
        self.payload_bytes += payload_bytes
        self.raw_bytes += sum(spec.nbytes for spec in specs)

    def count_error(self, value: torch.Tensor, reconstruction: torch.Tensor) -> None:
        """Adds to the relative error. Messages that are not finite do not count."""
        error = (value.float() - reconstruction.float()).square().sum()
        square = value.float().square().sum()
        if torch.isfinite(error) and torch.isfinite(square):
            self.error_square += error.item()
            self.value_square += square.item()

    @property
    def fresh_share(self) -> float:
        return self.num_fresh / max(1, self.num_messages)

    @property
    def ratio(self) -> float:
        """Raw bytes per byte on the wire."""
        return self.raw_bytes / max(1, self.payload_bytes)

    @property
    def bits_per_value(self) -> float:
        return self.payload_bytes * 8 / max(1, self.num_values)

    @property
    def relative_error(self) -> float | None:
        """|| value - what the receiver gets || / || value || over the measured messages."""
        return (self.error_square / self.value_square) ** 0.5 if self.value_square else None


def total(traffics: Iterable[Traffic]) -> Traffic:
    """The sum of several channels' counters."""
    parts = list(traffics)
    return Traffic(**{f.name: sum(getattr(part, f.name) for part in parts) for f in fields(Traffic)})


def row(channel: "Channel") -> dict[str, Any]:
    """One channel's figures, for `table` and for the monitor."""
    traffic = channel.traffic
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


def events(channels: Iterable["Channel"], samples: int) -> list[tuple[str, float, int]]:
    """The figures as events of DeepSpeed's monitor: (name, value, samples)."""
    found = []
    for figures in map(row, channels):
        for name in ("ratio", "bits_per_value", "relative_error", "fresh_share", "memory_bytes"):
            if figures[name] is not None:
                tag = f"Train/Clapping/{figures['link']}/{figures['direction']}/{name}"
                found.append((tag, float(figures[name]), samples))
    return found


def expectation(config: ClappingConfig, dtype: torch.dtype) -> str:
    """What the user's configuration will cost: mean bits per value and the saving, by direction."""
    raw_bits = dtype.itemsize * 8
    rows = []
    for direction in DIRECTIONS:
        key, delta = config.key_codec(direction), config.delta_codec(direction)
        mean = config.mean_bits_per_value(direction, dtype)
        rows.append({
            "direction": direction,
            "key": f"{key.name} {bits_per_value(key, dtype):.2f} bit",
            "delta": "-" if delta is None else f"{delta.name} {bits_per_value(delta, dtype):.2f} bit",
            "p_new": config.p_new,
            "mean bits": mean,
            f"saving against {raw_bits} bit": f"{raw_bits / mean:.2f}x",
        })  # fmt: skip
    return table(rows)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with equal keys as an aligned text table."""
    header = list(rows[0])
    cells = [[_cell(row[name]) for name in header] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [header, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
