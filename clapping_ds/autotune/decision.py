"""Which codec each link gets, and how deep the pipeline runs: measured, decided, printed, written, read.

Every rank is given the measurements of all ranks and decides for the whole pipeline, so that no rank
decides differently from its peer.

The step that a candidate is judged by: M micro-batches pass the slower of a stage and the wire, one after
another, and the first one passes both,

    step_s = (M - 1) * max(compute_s + codec_s, transfer_s) + compute_s + codec_s + transfer_s

and the lightest candidate is taken that no heavier one beats by `min_gain`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, Field

from clapping_ds.autotune.depth import count_warmup, find_hiding_depth
from clapping_ds.codecs import AnyCodec, Raw
from clapping_ds.codecs.base import STRICT
from clapping_ds.codecs.sequence import label
from clapping_ds.config import ClappingConfig, CodecConfig, LazyConfig
from clapping_ds.report import format_table


class Speed(NamedTuple):
    """One direction of one link."""

    bytes_per_s: float
    latency_s: float


class Candidate(NamedTuple):
    """What one message of a direction would cost with one codec."""

    codec: AnyCodec
    key_bytes: int
    delta_bytes: int
    codec_s: float
    """To encode a message at one end and decode one at the other."""
    is_of_ladder: bool = True
    """False: the configuration's own, of deltas alone."""


class Direction(NamedTuple):
    """What the sending stage measured of one direction of one link."""

    link: str
    direction: str
    raw_bytes: int
    speed: Speed
    candidates: list[Candidate]
    """Lightest first."""


class Measured(NamedTuple):
    """What one rank measured."""

    stage_id: int
    compute_s: float
    """Forward and backward of one micro-batch."""
    stored_bytes: int
    """Kept of one micro-batch between its forward and its backward."""
    free_bytes: int | None
    """Memory that the device has left; None: not known."""
    sent: list[Direction]


class Choice(BaseModel):
    """What was decided for one direction of one link."""

    model_config = STRICT

    link: str
    direction: str
    codec: CodecConfig
    mbit_per_s: float
    latency_ms: float
    raw_ms: float
    """Of a message on the wire without compression, and with it."""
    compressed_ms: float


class LazySampling(BaseModel):
    """What was decided about lazy sampling."""

    model_config = STRICT

    pays: bool
    """False: every sample is new."""
    step_ms: float
    """Of a step, without what comes after its messages: with lazy sampling, and with all samples new."""
    all_new_step_ms: float


class Decision(BaseModel):
    """For the whole pipeline; the same on every rank."""

    model_config = STRICT

    num_stages: Annotated[int, Field(ge=1)]
    in_flight: Annotated[int, Field(ge=0)]
    stage_ms: float
    """Forward and backward of one micro-batch on the slowest stage."""
    choices: list[Choice]
    lazy: LazySampling | None = None
    """None: nothing was to be decided."""
    compresses_replicas: bool | None = None
    """Whether replicas compress the gradients that they exchange. None: that was not tried."""

    def codec(self, link: str, direction: str) -> AnyCodec | None:
        """Of one direction of one link; None if none was chosen."""
        chosen = (choice for choice in self.choices if (choice.link, choice.direction) == (link, direction))
        choice = next(chosen, None)
        return None if choice is None else choice.codec

    def describe(self) -> str:
        """The table that is printed."""
        rows = [
            {
                "link": choice.link,
                "direction": choice.direction,
                "Mbit/s": choice.mbit_per_s,
                "latency ms": choice.latency_ms,
                "raw ms": choice.raw_ms,
                "stage ms": self.stage_ms,
                "codec": label(choice.codec),
                "on the wire ms": choice.compressed_ms,
            }
            for choice in self.choices
        ]
        return format_table(rows)

    def advice(self) -> list[str]:
        """Lines: whether lazy sampling pays, and that no link needs compression, where that is so."""
        lines = []
        if self.lazy is not None:
            told = "pays" if self.lazy.pays else "does not pay, and is off from now on"
            with_it, without = f"{self.lazy.step_ms:.4g} ms", f"{self.lazy.all_new_step_ms:.4g} ms"
            lines.append(f"Lazy sampling {told}: a step takes {with_it}, with all samples new {without}.")
        if all(isinstance(choice.codec, Raw) for choice in self.choices):
            lines.append("No link needs compression.")
        return lines

    def write(self, path: str) -> None:
        Path(path).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, path: str, num_stages: int) -> "Decision":
        """Raises ValueError naming the file if it is none of ours or of another number of stages."""
        try:
            decision = cls.model_validate_json(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"clapping.links.read = {path!r}: {error}; accepted: a file written by links.write"
            ) from None
        if decision.num_stages != num_stages:
            raise ValueError(
                f"clapping.links.read = {path!r}: written for {decision.num_stages} stages; accepted: a "
                f"file written for {num_stages} stages"
            )
        return decision


def check_writable(path: str) -> None:
    """Raises ValueError if a decision could not be written there when it is made."""
    file = Path(path)
    existed = file.exists()
    try:
        file.open("a").close()
    except OSError as error:
        raise ValueError(
            f"clapping.links.write = {path!r}: {error.strerror}; accepted: a file that can be written"
        ) from None
    if not existed:
        file.unlink()


def decide(
    measured: Sequence[Measured],
    config: ClappingConfig,
    num_micro_batches: int,
    sampling: LazyConfig | None = None,
) -> Decision:
    """The decision for a pipeline, from what the ranks of all its replicas measured.

    sampling   that is in force, where codecs and it are settled; None: they are to be decided
    """
    compute_s = max(rank.compute_s for rank in measured)
    num_stages = 1 + max(rank.stage_id for rank in measured)
    directions = _merge_replicas(direction for rank in measured for direction in rank.sent)
    is_open, lazy = sampling is None and config.links is not None, None
    sampling = config.sampling if sampling is None else sampling
    chosen, step_s = _choose_all(directions, config, sampling, compute_s, num_micro_batches)
    if is_open and sampling.p_new < 1 and config.strategy != "aqsgd":
        all_new = LazyConfig(p_new=1.0)
        as_direct = [_as_direct(direction) for direction in directions]
        others, other_s = _choose_all(as_direct, config, all_new, compute_s, num_micro_batches)
        assert config.links is not None
        pays = step_s <= (1 - config.links.lazy_gain) * other_s
        lazy = LazySampling(pays=pays, step_ms=step_s * 1e3, all_new_step_ms=other_s * 1e3)
        if not pays:
            directions, chosen, sampling = as_direct, others, all_new
    in_flight = config.in_flight
    if in_flight == "auto":
        in_flight = 0
        if config.overlap:
            depth = _depth(directions, chosen, sampling, compute_s, num_stages)
            in_flight = _limit_depth(min(depth, num_micro_batches), measured, num_stages, num_micro_batches)
    pairs = zip(directions, chosen, strict=True)
    choices = [_choice(direction, candidate, sampling) for direction, candidate in pairs]
    return Decision(
        num_stages=num_stages, in_flight=in_flight, stage_ms=compute_s * 1e3, choices=choices, lazy=lazy
    )


def describe_memory(decision: Decision, measured: Sequence[Measured], num_micro_batches: int) -> str:
    """What the depth costs, in words."""
    first = max((rank for rank in measured if rank.stage_id == 0), key=lambda rank: rank.stored_bytes)
    stock = count_warmup(num_micro_batches, decision.num_stages, 0, 0)
    ours = count_warmup(num_micro_batches, decision.num_stages, 0, decision.in_flight)
    more_mib = (ours - stock) * first.stored_bytes / 2**20
    return (
        f"in_flight = {decision.in_flight}: stage 0 stores up to {ours} micro-batches instead of {stock}, "
        f"{more_mib:.1f} MiB more"
    )


def first_stage(link: str) -> int:
    """Of the two that a link such as "3-4" joins."""
    return int(link.split("-")[0])


def _merge_replicas(directions: Iterable[Direction]) -> list[Direction]:
    """One entry per link and direction: of its replicas, the slowest link and the slowest codecs."""
    merged: dict[tuple[str, str], Direction] = {}
    for new in directions:
        old = merged.get((new.link, new.direction), new)
        speed = Speed(
            min(old.speed.bytes_per_s, new.speed.bytes_per_s), max(old.speed.latency_s, new.speed.latency_s)
        )
        candidates = [
            one._replace(codec_s=max(one.codec_s, other.codec_s))
            for one, other in zip(old.candidates, new.candidates, strict=True)
        ]
        merged[new.link, new.direction] = old._replace(speed=speed, candidates=candidates)
    return sorted(merged.values(), key=lambda each: (first_stage(each.link), each.direction))


def _as_direct(direction: Direction) -> Direction:
    """The same where each message is of the candidate's codec, one of the ladder."""
    of_ladder = [candidate for candidate in direction.candidates if candidate.is_of_ladder]
    candidates = [candidate._replace(key_bytes=candidate.delta_bytes) for candidate in of_ladder]
    return direction._replace(candidates=candidates)


def _choose_all(
    directions: Sequence[Direction],
    config: ClappingConfig,
    sampling: LazyConfig,
    compute_s: float,
    num_micro_batches: int,
) -> tuple[list[Candidate], float]:
    """For each direction the lightest candidate that no heavier one beats by more than `min_gain`; and the
    step that they lead to."""
    chosen, longest_s = [], 0.0
    for direction in directions:
        steps_s = [
            _step_s(candidate, direction.speed, sampling, compute_s, num_micro_batches)
            for candidate in direction.candidates
        ]
        min_gain = 0.0 if config.links is None else config.links.min_gain
        good_enough_s = min(steps_s) / (1 - min_gain)
        pairs = zip(direction.candidates, steps_s, strict=True)
        candidate, step_s = next(pair for pair in pairs if pair[1] <= good_enough_s)
        chosen.append(candidate)
        longest_s = max(longest_s, step_s)
    return chosen, longest_s


def _step_s(
    candidate: Candidate, speed: Speed, sampling: LazyConfig, compute_s: float, num_micro_batches: int
) -> float:
    """Mean time of a step with this candidate on one link and direction. With one coin per step, steps
    of keys and steps of deltas alternate; else every step has its share of both."""

    def with_messages_of(num_bytes: float) -> float:
        stage_s, transfer_s = compute_s + candidate.codec_s, num_bytes / speed.bytes_per_s
        return (num_micro_batches - 1) * max(stage_s, transfer_s) + stage_s + transfer_s

    if sampling.refresh == "step":
        of_keys, of_deltas = (with_messages_of(n) for n in (candidate.key_bytes, candidate.delta_bytes))
        return sampling.p_new * of_keys + (1 - sampling.p_new) * of_deltas
    return with_messages_of(average_bytes(candidate, sampling))


def average_bytes(candidate: Candidate, sampling: LazyConfig) -> float:
    """Of a message, fresh or not."""
    return sampling.p_new * candidate.key_bytes + (1 - sampling.p_new) * candidate.delta_bytes


def _find_largest_bytes(candidate: Candidate, sampling: LazyConfig) -> int:
    return candidate.key_bytes if sampling.p_new == 1 else max(candidate.key_bytes, candidate.delta_bytes)


def _depth(
    directions: Sequence[Direction],
    chosen: Sequence[Candidate],
    sampling: LazyConfig,
    compute_s: float,
    num_stages: int,
) -> int:
    """The `in_flight` that hides all links. Throughput is a matter of the mean message, delay of the
    largest: a key may come at any time."""
    period_s, delays_s = compute_s, [0.0] * (num_stages - 1)
    for direction, candidate in zip(directions, chosen, strict=True):
        period_s = max(period_s, average_bytes(candidate, sampling) / direction.speed.bytes_per_s)
        largest_s = _find_largest_bytes(candidate, sampling) / direction.speed.bytes_per_s
        delays_s[first_stage(direction.link)] += largest_s + direction.speed.latency_s + candidate.codec_s
    return find_hiding_depth(compute_s, period_s, delays_s, tolerance=0.05)


def _limit_depth(
    in_flight: int, measured: Sequence[Measured], num_stages: int, num_micro_batches: int
) -> int:
    """The largest depth up to `in_flight` whose additional activations fit into half of what is free."""

    def fits(depth: int, rank: Measured) -> bool:
        stock, ours = (count_warmup(num_micro_batches, num_stages, rank.stage_id, d) for d in (0, depth))
        return rank.free_bytes is None or (ours - stock) * rank.stored_bytes <= rank.free_bytes / 2

    return max(depth for depth in range(in_flight + 1) if all(fits(depth, rank) for rank in measured))


def _choice(direction: Direction, candidate: Candidate, sampling: LazyConfig) -> Choice:
    bytes_per_ms = direction.speed.bytes_per_s / 1e3
    return Choice(
        link=direction.link,
        direction=direction.direction,
        codec=candidate.codec,
        mbit_per_s=direction.speed.bytes_per_s * 8 / 1e6,
        latency_ms=direction.speed.latency_s * 1e3,
        raw_ms=direction.raw_bytes / bytes_per_ms,
        compressed_ms=average_bytes(candidate, sampling) / bytes_per_ms,
    )
