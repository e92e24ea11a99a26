"""Changes of weights, where the optimizer is split over replicas: each updates its part and tells the others.

The memory of error feedback costs nothing here: it is the weights themselves, which all replicas hold alike.
The value is the owner's master copy in fp32:

    w <- w + C(master - w)        on every replica, bit for bit

so that what a message loses is in the next one's difference. Parameters that other stages have too, that are
small, or of one dimension travel as they are. A section with a change that is not finite becomes NaN on all
replicas, so that the loss shows it.
"""

from collections.abc import Callable, Sequence

import torch

from clapping_ds.codecs import Context, Raw
from clapping_ds.config import DataParallelConfig
from clapping_ds.gradients.equalized import GradientCodec
from clapping_ds.gradients.exchange import RAW, Leg
from clapping_ds.gradients.layout import Bucket, Cut, Parameter, Piece, Section, make_buckets, read, store
from clapping_ds.link.collective import Collective, Transfer
from clapping_ds.link.message import Spec
from clapping_ds.link.seeds import draw_word

SEED = 0x77656967  # "weig"
Masters = Callable[[Piece], torch.Tensor]
"""Of a piece that this replica owns, the fp32 master copy, flat."""


class WeightExchange:
    """Of one rank's weights with those of the other replicas.

    parameters   of this rank, in an order that all replicas have
    cut          how the optimizer splits them over replicas
    """

    def __init__(
        self,
        plan: DataParallelConfig,
        parameters: Sequence[Parameter],
        collective: Collective,
        seed: int,
        cut: Cut,
        compiles: bool = False,
    ) -> None:
        assert plan.weights is not None
        # Configuration
        self.collective = collective
        self.seed = draw_word(seed, SEED)
        self.cut = cut
        self.compiles = compiles
        parameters = [each._replace(is_tied=each.is_tied or each.has_copy) for each in parameters]
        numbers = range(len(parameters))
        self.buckets = make_buckets(parameters, numbers, collective.size, cut, plan.min_numel, False)
        # State
        self.leg = Leg("weights", plan.weights, "none", plan.momentum)

    def share_(self, weights: Sequence[torch.Tensor], masters: Masters, step: int) -> None:
        """Brings the weights of all replicas up to date.

        weights   by the number of the parameter: contiguous fp32, fp16 or bf16, the same on every replica, as
                  the last call left them
        """
        flat = [weight.detach().view(-1) for weight in weights]
        sent = [self._send(bucket, flat, masters, step) for bucket in self.buckets]
        for bucket, transfer in zip(self.buckets, sent, strict=True):
            for owner, payload in enumerate(transfer.wait()):
                if owner != self.collective.place:
                    self._take(bucket, owner, payload, flat, step)

    def _send(self, bucket: Bucket, flat: Sequence[torch.Tensor], masters: Masters, step: int) -> Transfer:
        place = self.collective.place
        sizes = [self._nbytes(bucket, owner, flat) for owner in range(self.collective.size)]
        payload = torch.empty(sizes[place], dtype=torch.uint8, device=self.collective.device)
        for codec, section, part in self._sections(bucket, place, flat, payload):
            memory = read(section, flat)
            value = torch.cat([masters(piece) for piece in section.pieces])
            value = value.to(memory.dtype) if codec is RAW else value
            is_finite = (value.float() - memory.float()).isfinite().all()
            codec.encode_(value, part, self._context(section, place, memory, step))
            _store(codec, section, memory, is_finite, flat)
        specs = [
            Spec(section.shape, flat[section.pieces[0].number].dtype)
            for _, section in self._list_sections(bucket, place)
        ]
        for _ in range(self.collective.size - 1):
            self.leg.traffic.count(True, sizes[place], specs)
        return self.collective.gather(payload, sizes)

    def _take(
        self, bucket: Bucket, owner: int, payload: torch.Tensor, flat: Sequence[torch.Tensor], step: int
    ) -> None:
        for codec, section, part in self._sections(bucket, owner, flat, payload):
            memory = read(section, flat)
            out = torch.empty_like(memory, dtype=memory.dtype if codec is RAW else torch.float32)
            codec.decode_(part, out, self._context(section, owner, memory, step))
            _store(codec, section, memory, out.isfinite().all(), flat)

    def _context(self, section: Section, owner: int, memory: torch.Tensor, step: int) -> Context:
        first = section.pieces[0]
        seed = draw_word(self.seed, step, owner, first.number, first.start)
        state = self.leg.state(section, None, self.collective.device)
        return Context(memory, carry=True, seed=seed, state=state, compiles=self.compiles)

    def _list_sections(self, bucket: Bucket, owner: int) -> list[tuple[GradientCodec, Section]]:
        """Of an owner: with the codec, then as they are, by parameter."""
        coded = [(self.leg.choose(section)[0], section) for section in bucket.sections[owner]]
        raw: list[tuple[GradientCodec, Section]] = [
            (RAW, Section((Piece(number, start, stop),), torch.Size((stop - start,))))
            for number in (*bucket.raw, *bucket.tied)
            for of, start, stop in self.cut(number)
            if of == owner and start < stop
        ]
        return coded + raw

    def _nbytes_of(self, codec: GradientCodec, section: Section, flat: Sequence[torch.Tensor]) -> int:
        dtype = flat[section.pieces[0].number].dtype if isinstance(codec, Raw) else torch.float32
        return codec.nbytes(section.shape, dtype)

    def _nbytes(self, bucket: Bucket, owner: int, flat: Sequence[torch.Tensor]) -> int:
        return sum(self._nbytes_of(*each, flat) for each in self._list_sections(bucket, owner))

    def _sections(
        self, bucket: Bucket, owner: int, flat: Sequence[torch.Tensor], payload: torch.Tensor
    ) -> list[tuple[GradientCodec, Section, torch.Tensor]]:
        """With the part of the payload that is each one's."""
        found = self._list_sections(bucket, owner)
        parts = payload.split([self._nbytes_of(*each, flat) for each in found])
        return [(codec, section, part) for (codec, section), part in zip(found, parts, strict=True)]


def _store(
    codec: GradientCodec,
    section: Section,
    memory: torch.Tensor,
    is_finite: torch.Tensor,
    flat: Sequence[torch.Tensor],
) -> None:
    """is_finite: bool scalar, whether all changes are; codecs leave the memory of others as it was."""
    values = memory if codec is RAW else torch.where(is_finite, memory, torch.nan)
    store(section.pieces, values, flat)
