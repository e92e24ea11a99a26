"""The mean of all replicas' gradients, compressed on both ways.

Two replicas send each other all they have. Three or more share the work: each owns a part of the values, gets
that part from all others (`scatter`), takes the mean, and sends it to all (`gather`): 2 (N - 1) / N bits per
bit of code and value. Where the optimizer is split over replicas only the first half is needed.

Whatever a rank sends it also decodes itself, so that all replicas compute with the same bits. Each replica
draws its own random numbers, or errors would not average out.

An `Exchange` keeps what is held between steps. A `Round` is one exchange on its way: `Exchange.start` encodes
and sends, `advance` averages and sends on, `finish` writes the mean into the gradients.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from clapping_ds.codecs import COMPRESSIBLE_DTYPES, AnyCodec, Context, Eden, Quantizer, Raw, State
from clapping_ds.codecs.base import width_of
from clapping_ds.config import DataParallelConfig
from clapping_ds.gradients.equalized import Equalized, GradientCodec, cut_columns
from clapping_ds.gradients.feedback import NoFeedback, commit, make_feedback
from clapping_ds.gradients.layout import (
    Bucket,
    Cut,
    Parameter,
    Piece,
    Section,
    cut_rows,
    find_sides,
    flatten,
    make_buckets,
    put_back,
    read,
    store,
    works_on_matrices,
)
from clapping_ds.link import verification
from clapping_ds.link.collective import Collective, Transfer
from clapping_ds.link.message import Spec
from clapping_ds.link.seeds import draw_word
from clapping_ds.link.traffic import Traffic
from clapping_ds.link.verification import Header, VerificationError, checksum

RAW = Raw()
SCATTER, GATHER = "scatter", "gather"


class Leg:
    """One of the two ways, with what is held for it.

    widths   by the number of the parameter, of its rows, where columns are brought to one scale
    """

    def __init__(
        self,
        direction: str,
        codec: AnyCodec,
        feedback: str,
        momentum: float,
        widths: Sequence[int] | None = None,
    ) -> None:
        # Configuration
        self.link = "replicas"
        self.direction = direction
        self.codec = codec
        self.widths = widths
        self._codecs: dict[Section, GradientCodec] = {}
        # State
        self.feedback = make_feedback(feedback, momentum)
        self.without = NoFeedback()
        self.states: dict[tuple[Section, int | None], State | None] = {}
        """By section and sender (None: what this replica encodes), what codecs learn; None of those that
        learn nothing."""
        self.traffic = Traffic()
        self.gradient_square = 0.0
        """Of the last step whose error was measured."""

    def choose(self, section: Section) -> tuple[GradientCodec, NoFeedback]:
        """The codec of a section, and its feedback; `none` where that is smaller, or blocks are larger."""
        if section not in self._codecs:
            self._codecs[section] = self._make_codec(section)
        codec = self._codecs[section]
        return codec, self.without if codec is RAW else self.feedback

    def _make_codec(self, section: Section) -> GradientCodec:
        codec: GradientCodec = self.codec
        if self.widths is not None and isinstance(codec, Quantizer | Eden):
            columns = [
                cut_columns(piece.numel, piece.start, self.widths[piece.number]) for piece in section.pieces
            ]
            codec = Equalized(codec, tuple(columns))
        try:
            num_bytes = codec.nbytes(section.shape, torch.float32)
        except ValueError:
            return RAW
        return codec if num_bytes <= RAW.nbytes(section.shape, torch.float32) else RAW

    def nbytes(self, sections: Sequence[Section]) -> int:
        return sum(self.choose(each)[0].nbytes(each.shape, torch.float32) for each in sections)

    def state(self, section: Section, sender: int | None, device: torch.device) -> State | None:
        if (section, sender) not in self.states:
            codec, _ = self.choose(section)
            self.states[section, sender] = codec.new_state(width_of(section.shape), device)
        return self.states[section, sender]

    @property
    def held_back(self) -> float:
        """What waits to be sent, against the gradient of the last step whose error was measured."""
        return self.feedback.measure() / self.gradient_square**0.5 if self.gradient_square else 0.0

    @property
    def memory_nbytes(self) -> int:
        held = sum(held.nbytes for held in self.feedback.held.values())
        return held + sum(state.nbytes for state in self.states.values() if state is not None)

    def state_dict(self) -> dict[str, Any]:
        self.traffic.settle()
        learned = [
            (tuple(map(tuple, section.pieces)), tuple(section.shape), sender, state.state_dict())
            for (section, sender), state in self.states.items()
            if state is not None
        ]
        held = {name: dict(held.values) for name, held in self.feedback.held.items()}
        return {"held": held, "learned": learned, "traffic": asdict(self.traffic)}

    def load_state_dict(self, saved: Mapping[str, Any], device: torch.device) -> None:
        self.traffic = Traffic(**saved["traffic"])
        for name, held in self.feedback.held.items():
            held.discard()
            held.values = {
                place: values.to(device, copy=True) for place, values in saved["held"][name].items()
            }
        self.states = {}
        for pieces, shape, sender, known in saved["learned"]:
            section = Section(tuple(Piece(*piece) for piece in pieces), torch.Size(shape))
            state = self.state(section, sender, device)
            assert state is not None
            state.load_state_dict(known, device)


class Exchange:
    """Of one rank's gradients with those of the other replicas.

    parameters   of this rank, in an order that all replicas have
    seed         of what codecs draw at random: the same for all replicas of a stage
    joins        whether the parts of several parameters are coded as one vector; else what is sent of one
                 does not depend on which others are exchanged with it
    cut          how an optimizer that is split over replicas splits parameters; None: it is not split, and
                 every replica needs every mean
    """

    def __init__(
        self,
        plan: DataParallelConfig,
        parameters: Sequence[Parameter],
        collective: Collective,
        seed: int = 0,
        cut: Cut | None = None,
        joins: bool = True,
        verifies: bool = False,
        compiles: bool = False,
    ) -> None:
        # Configuration
        self.plan = plan
        self.parameters = parameters
        self.collective = collective
        self.seed = seed
        self.num_replicas = collective.size
        self.is_split = cut is not None
        self.is_direct = not self.is_split and collective.size == 2
        """Whether all is sent to all, at once."""
        self.num_owners = 1 if self.is_direct else collective.size
        self.cut = cut_rows(parameters, self.num_owners) if cut is None else cut
        self.joins = joins
        self.compiles = compiles
        self.header_nbytes = verification.NBYTES if verifies else 0
        back = plan.feedback(plan.gather)
        widths = [find_sides(parameter)[1] for parameter in parameters]
        self.legs = {
            name: Leg(name, codec, feedback, plan.momentum, widths if plan.equalizes(codec) else None)
            for name, codec, feedback in (
                (SCATTER, plan.scatter, plan.feedback(plan.scatter)),
                # The mean of running means is no gradient to take a running mean of.
                (GATHER, plan.gather, "ef21" if back == "ef21_sgdm" else back),
            )
        }
        self.raw = Leg("raw", RAW, "none", plan.momentum)
        """What is not compressed."""
        self._buckets: dict[tuple[int, ...], list[Bucket]] = {}
        # State
        self.step = 0
        self.measures_error = False
        self.scale = 1.0
        """Of gradients, against those of the start."""

    def begin_step(self, step: int, measures_error: bool = False) -> None:
        """Steps are numbered alike on all replicas."""
        self.step, self.measures_error = step, measures_error
        for leg in self.legs.values() if measures_error else ():
            leg.gradient_square = 0.0

    def start(self, gradients: Mapping[int, torch.Tensor]) -> "Round":
        """Sends what this replica has. gradients: by the parameter's number; fp32, fp16 or bf16. `finish`
        writes into them."""
        return Round(self, gradients)

    def end_step(self, accepted: bool = True) -> None:
        """accepted: whether the optimizer used the step's gradients; else it leaves no error behind."""
        commit([leg.feedback for leg in self.legs.values()], accepted)

    def rescale(self, scale: float) -> None:
        """Between two steps: the loss scale of the next one. What is held follows it."""
        if scale != self.scale:
            for leg in self.legs.values():
                for held in leg.feedback.held.values():
                    held.rescale(scale / self.scale)
        self.scale = scale

    def buckets(self, numbers: tuple[int, ...]) -> list[Bucket]:
        if numbers not in self._buckets:
            has_matrices = any(works_on_matrices(leg.codec) for leg in self.legs.values())
            self._buckets[numbers] = make_buckets(
                self.parameters,
                numbers,
                self.num_owners,
                self.cut,
                self.plan.min_numel,
                has_matrices,
                self.joins,
            )
        return self._buckets[numbers]

    def encode(
        self, leg: Leg, step: int, section: Section, values: torch.Tensor, payload: torch.Tensor
    ) -> None:
        """step: of the gradients. values: fp32, of the section's pieces."""
        codec, feedback = leg.choose(section)
        context = self._context(leg, step, section, self.collective.place, None)

        def write(value: torch.Tensor, memory: torch.Tensor | None, carry: bool) -> None:
            codec.encode_(value, payload, context._replace(memory=memory, carry=carry))

        value = feedback.encode(self._places(section), section.sizes, values.view(section.shape), write)
        if self.measures_error and codec is not RAW:
            leg.gradient_square += float(values.square().sum())
            seen = torch.empty_like(value)
            state = None if context.state is None else codec.new_state(width_of(section.shape), value.device)
            codec.decode_(payload, seen, context._replace(memory=None, carry=False, state=state))
            leg.traffic.count_error(value, seen)

    def decode(
        self, leg: Leg, step: int, section: Section, sender: int, payload: torch.Tensor
    ) -> torch.Tensor:
        """fp32, flat: what a sender's payload stands for."""
        codec, _ = leg.choose(section)
        seen = torch.empty(section.shape, device=payload.device)
        codec.decode_(payload, seen, self._context(leg, step, section, sender, sender))
        return seen.view(-1)

    def receive(self, leg: Leg, section: Section, mean: torch.Tensor) -> torch.Tensor:
        """fp32, flat: what the mean of decoded payloads stands for."""
        _, feedback = leg.choose(section)
        return feedback.receive(self._places(section), section.sizes, mean)

    def _context(self, leg: Leg, step: int, section: Section, place: int, sender: int | None) -> Context:
        first = section.pieces[0]
        return Context(
            seed=draw_word(self.seed, step, place, leg.direction == GATHER, first.number, first.start),
            state=leg.state(section, sender, self.collective.device),
            compiles=self.compiles,
        )

    def _places(self, section: Section) -> list[tuple[str, int, int]]:
        """Of pieces, by the names of parameters: hosts may send them in other messages from some step on."""
        return [(self.parameters[p.number].name, p.start, p.stop) for p in section.pieces]

    # Checkpoints

    def describe(self) -> dict[str, Any]:
        """What a run and the checkpoint that it loads must have alike."""
        plan = self.plan
        return {
            "scatter": plan.scatter.model_dump(),
            "gather": plan.gather.model_dump(),
            "feedback": [plan.feedback(plan.scatter), plan.feedback(plan.gather), plan.momentum],
            "equalize": [plan.equalizes(plan.scatter), plan.equalizes(plan.gather)],
            "weights": None if plan.weights is None else plan.weights.model_dump(),
            "min_numel": plan.min_numel,
            "replicas": (self.collective.place, self.collective.size, plan.node_size),
            "delay": plan.delay,
            "is_split": self.is_split,
            "parameters": [(each.name, tuple(each.shape)) for each in self.parameters],
            "cut": [self.cut(number) for number in range(len(self.parameters))] if self.is_split else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Between two steps: what this replica holds."""
        legs = {name: leg.state_dict() for name, leg in self.legs.items()}
        return {"written by": self.describe(), "scale": self.scale, "legs": legs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave, from a run that `describe` says the same of."""
        self.scale = state["scale"]
        for name, leg in self.legs.items():
            leg.load_state_dict(state["legs"][name], self.collective.device)

    def forget(self) -> None:
        """Forgets what is held."""
        for leg in self.legs.values():
            for held in leg.feedback.held.values():
                held.discard()
                held.values = {}
            leg.states = {}


def compare(collective: Collective, what: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises VerificationError where another replica has other bits. what: the tensors are."""
    mine = torch.tensor([checksum(tensor) for tensor in tensors.values()], device=collective.device)
    told = collective.gather(mine.view(torch.uint8), [mine.nbytes] * collective.size).wait()
    for rank, others in zip(collective.ranks, told, strict=True):
        equal = (others.view(torch.int64) == mine).tolist()
        differs = [name for name, is_equal in zip(tensors, equal, strict=True) if not is_equal]
        if differs:
            raise VerificationError(f"rank {rank} has another {what} of {', '.join(differs)}")


class Round:
    """One exchange on its way."""

    def __init__(self, exchange: Exchange, gradients: Mapping[int, torch.Tensor]) -> None:
        for number, gradient in gradients.items():
            if gradient.dtype not in COMPRESSIBLE_DTYPES:
                raise ValueError(
                    f"data_parallel with {exchange.parameters[number].name}, whose gradient is "
                    f"{gradient.dtype}; accepted: fp32, fp16 or bf16"
                )
        self.exchange = exchange
        self.step = exchange.step
        self.gradients = gradients
        self.flat = flatten(gradients)
        self.buckets = exchange.buckets(tuple(gradients))
        with self._at():
            self._sums = [self._sum(bucket) for bucket in self.buckets]
            self._scattered = [self._scatter(bucket) for bucket in self.buckets]
        self._gathered: list[Transfer | None] | None = None

    def advance(self) -> None:
        """Once the first way has been gone: takes means, and sends them on. Calling it again does nothing."""
        if self._gathered is None:
            with self._at():
                self._gathered = [
                    self._average(bucket, transfer)
                    for bucket, transfer in zip(self.buckets, self._scattered, strict=True)
                ]

    def finish(self) -> None:
        """Writes the means into the gradients; where the optimizer is split, this replica's part of them."""
        self.advance()
        assert self._gathered is not None
        with self._at():
            for bucket, transfer in zip(self.buckets, self._gathered, strict=True):
                if transfer is not None:
                    self._take_means(bucket, transfer)
            for bucket, sums in zip(self.buckets, self._sums, strict=True):
                self._take_sums(bucket, sums)
            if self.exchange.header_nbytes and not self.exchange.is_split:
                names = [self.exchange.parameters[number].name for number in self.flat]
                compare(self.exchange.collective, "mean", dict(zip(names, self.flat.values(), strict=True)))
        put_back(self.flat, self.gradients)

    # What travels raw

    def _sum(self, bucket: Bucket) -> list[tuple[tuple[int, ...], Transfer]]:
        collective, found = self.exchange.collective, []
        if bucket.raw:
            values = torch.cat([self.flat[number].float() for number in bucket.raw])
            found.append((bucket.raw, collective.sum(values)))
        found += [((number,), collective.sum(self.flat[number])) for number in bucket.tied]
        share = 2 * (collective.size - 1) / collective.size  # of a ring
        for part, _ in found:
            num_bytes = [self.flat[number].numel() * self.flat[number].element_size() for number in part]
            specs = [Spec.of(self.flat[number]) for number in part]
            self.exchange.raw.traffic.count(True, round(share * sum(num_bytes)), specs)
        return found

    def _take_sums(self, bucket: Bucket, sums: Sequence[tuple[tuple[int, ...], Transfer]]) -> None:
        for numbers, transfer in sums:
            mean = transfer.wait() / self.exchange.collective.size
            sizes = [self.flat[number].numel() for number in numbers]
            for number, values in zip(numbers, mean.split(sizes), strict=True):
                self.flat[number].copy_(values)

    # What is compressed

    def _scatter(self, bucket: Bucket) -> Transfer:
        exchange, leg = self.exchange, self.exchange.legs[SCATTER]
        sizes = [self._nbytes(leg, sections) for sections in bucket.sections]
        payload = torch.empty(sum(sizes), dtype=torch.uint8, device=exchange.collective.device)
        for sections, part in zip(bucket.sections, payload.split(sizes), strict=True):
            self._write(leg, sections, part, [read(section, self.flat).float() for section in sections])
        if exchange.is_direct:
            self._count(leg, sizes[0], bucket.sections[0])
            return exchange.collective.gather(payload, sizes * exchange.collective.size)
        for owner, sections in enumerate(bucket.sections):
            if owner != exchange.collective.place:
                self._count(leg, sizes[owner], sections)
        return exchange.collective.scatter(payload, sizes)

    def _average(self, bucket: Bucket, transfer: Transfer) -> Transfer | None:
        exchange, leg = self.exchange, self.exchange.legs[SCATTER]
        mine = bucket.sections[0 if exchange.is_direct else exchange.collective.place]
        payloads = transfer.wait()
        sums = [torch.zeros(section.shape.numel(), device=exchange.collective.device) for section in mine]
        for sender, payload in enumerate(payloads):
            for total, values in zip(sums, self._parse(leg, mine, payload, sender), strict=True):
                total += values
        means = [
            exchange.receive(leg, section, total / exchange.collective.size)
            for section, total in zip(mine, sums, strict=True)
        ]
        if exchange.is_direct or exchange.is_split:
            self._store(mine, means)
            return None
        return self._gather(bucket, mine, means)

    def _gather(self, bucket: Bucket, mine: Sequence[Section], means: list[torch.Tensor]) -> Transfer:
        exchange, leg = self.exchange, self.exchange.legs[GATHER]
        sizes = [self._nbytes(leg, sections) for sections in bucket.sections]
        size = sizes[exchange.collective.place]
        payload = torch.empty(size, dtype=torch.uint8, device=exchange.collective.device)
        self._write(leg, mine, payload, means)
        for _ in range(exchange.collective.size - 1):
            self._count(leg, size, mine)
        return exchange.collective.gather(payload, sizes)

    def _take_means(self, bucket: Bucket, transfer: Transfer) -> None:
        leg = self.exchange.legs[GATHER]
        for owner, (sections, payload) in enumerate(zip(bucket.sections, transfer.wait(), strict=True)):
            decoded = self._parse(leg, sections, payload, owner)
            means = [
                self.exchange.receive(leg, section, values)
                for section, values in zip(sections, decoded, strict=True)
            ]
            self._store(sections, means)

    def _store(self, sections: Sequence[Section], means: Sequence[torch.Tensor]) -> None:
        for section, mean in zip(sections, means, strict=True):
            store(section.pieces, mean, self.flat)

    # Payloads

    def _nbytes(self, leg: Leg, sections: Sequence[Section]) -> int:
        return self.exchange.header_nbytes + leg.nbytes(sections) if sections else 0

    def _split(self, leg: Leg, sections: Sequence[Section], payload: torch.Tensor) -> Sequence[torch.Tensor]:
        """The header, and the part of each section."""
        return payload.split([self.exchange.header_nbytes, *(leg.nbytes([each]) for each in sections)])

    def _write(
        self, leg: Leg, sections: Sequence[Section], payload: torch.Tensor, values: Sequence[torch.Tensor]
    ) -> None:
        if not sections:
            return
        header, *parts = self._split(leg, sections, payload)
        for section, part, of_section in zip(sections, parts, values, strict=True):
            self.exchange.encode(leg, self.step, section, of_section, part)
        if self.exchange.header_nbytes:
            self._header(leg, sections, payload).write_(header)

    def _parse(
        self, leg: Leg, sections: Sequence[Section], payload: torch.Tensor, sender: int
    ) -> list[torch.Tensor]:
        if not sections:
            return []
        header, *parts = self._split(leg, sections, payload)
        if self.exchange.header_nbytes:
            try:
                self._header(leg, sections, payload).check(Header.read(header))
            except VerificationError as error:
                sender_rank = self.exchange.collective.ranks[sender]
                raise VerificationError(f"{leg.direction} from rank {sender_rank}: {error}") from error
        return [
            self.exchange.decode(leg, self.step, section, sender, part)
            for section, part in zip(sections, parts, strict=True)
        ]

    def _header(self, leg: Leg, sections: Sequence[Section], payload: torch.Tensor) -> Header:
        codecs = [leg.choose(section)[0] for section in sections]
        content = payload[self.exchange.header_nbytes :]
        return Header.of(self.step, sections[0].pieces[0].number, codecs, []).with_payload(content)

    def _count(self, leg: Leg, num_bytes: int, sections: Sequence[Section]) -> None:
        """Of a payload that goes to one other replica."""
        if num_bytes:
            specs = [
                Spec(torch.Size((piece.numel,)), self.flat[piece.number].dtype)
                for section in sections
                for piece in section.pieces
            ]
            leg.traffic.count(True, num_bytes, specs)

    @contextmanager
    def _at(self) -> Iterator[None]:
        """Errors say in which step they happened."""
        try:
            yield
        except (ConnectionError, VerificationError) as error:
            raise type(error)(f"replicas, step {self.step}: {error}") from error
