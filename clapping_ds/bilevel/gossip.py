"""Values of neighbouring sites, mixed: m_i + sum over neighbours of w_ij (m_j - m_i), compressed or not.

With a codec and `memory` every site keeps what its neighbours know of its values, and they do; what crosses
a link is the difference to that. So errors shrink with the steps, where without it they stay. Both ends
decode the same payload, and the mean over all sites stays what it was, whatever the codec.

Sites may be processes, or all lie in one: the same operations, the same bits.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from clapping_ds.bilevel.topology import Topology
from clapping_ds.codecs import AnyCodec, Context, Raw
from clapping_ds.codecs.base import pad_nbytes
from clapping_ds.link import verification
from clapping_ds.link.collective import Transfer, make_collective
from clapping_ds.link.groups import Control, get_world_size, rank
from clapping_ds.link.seeds import draw_word
from clapping_ds.link.verification import Header, VerificationError

RAW = Raw()
Streams = Mapping[str, torch.Tensor]
"""What a site has mixed, by name: values of the same name at all sites, of the same shape."""


class Site:
    """What one site encodes, decodes, and keeps.

    number   of the site in the topology
    seed     of what codecs draw at random; the same at all sites
    """

    def __init__(self, topology: Topology, number: int, codec: AnyCodec, memory: bool, seed: int) -> None:
        # Configuration
        self.number = number
        self.near = topology.neighbours(number)
        self.weights = {other: topology.weight(number, other) for other in self.near}
        self.codec = codec
        self.keeps = memory and codec != RAW
        self.seed = seed
        # State
        self.known: dict[tuple[str, int], torch.Tensor] = {}
        """By name and site: what is known of its values at both ends."""
        self.num_rounds = 0
        self.bytes_sent = 0

    def nbytes(self, streams: Streams) -> int:
        return verification.NBYTES + sum(
            pad_nbytes(self._codec_of(m).nbytes(m.shape, m.dtype)) for m in streams.values()
        )

    def encode(self, streams: Streams) -> torch.Tensor:
        """uint8: the same for all neighbours."""
        self.num_rounds += 1
        payload = torch.zeros(
            self.nbytes(streams), dtype=torch.uint8, device=next(iter(streams.values())).device
        )
        for name, section in self._cut(streams, payload).items():
            value = streams[name]
            codec = self._codec_of(value)
            known = self.known.get((name, self.number)) if self.keeps else None
            difference = value if known is None else value - known
            if codec is not RAW:
                difference = difference.float()
            codec.encode_(difference.contiguous(), section, self._context(self.number, name, streams))
        header = self._header(streams)
        header.with_payload(payload[verification.NBYTES :]).write_(payload[: verification.NBYTES])
        self.bytes_sent += payload.numel() * len(self.near)
        return payload

    def mix(self, streams: Streams, payloads: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        """payloads: by site, this one's included. Raises ArithmeticError where values are not finite."""
        seen = {site: self._decode(streams, site, payload) for site, payload in sorted(payloads.items())}
        for site, told in seen.items():
            for name, value in told.items():
                if not value.isfinite().all():
                    raise ArithmeticError(
                        f"gossip, round {self.num_rounds}: what site {site} has of {name} is not finite"
                    )
        mixed = {}
        for name, value in streams.items():
            total = value.clone()
            for other in self.near:
                total += self.weights[other] * (seen[other][name] - seen[self.number][name])
            mixed[name] = total
        return mixed

    def _decode(self, streams: Streams, site: int, payload: torch.Tensor) -> dict[str, torch.Tensor]:
        header = self._header(streams).with_payload(payload[verification.NBYTES :])
        try:
            header.check(Header.read(payload[: verification.NBYTES]))
        except VerificationError as error:
            raise VerificationError(
                f"site {self.number}, round {self.num_rounds}, from site {site}: {error}"
            ) from error
        found = {}
        for name, section in self._cut(streams, payload).items():
            value = streams[name]
            codec = self._codec_of(value)
            out = torch.empty_like(value, dtype=value.dtype if codec is RAW else torch.float32)
            codec.decode_(section, out, self._context(site, name, streams))
            told = out.to(value.dtype)
            if self.keeps:
                known = self.known.get((name, site))
                told = told if known is None else known + told
                self.known[name, site] = told
            found[name] = told
        return found

    def _codec_of(self, value: torch.Tensor) -> AnyCodec:
        """`none` where that is smaller, or blocks are larger than the value."""
        try:
            num_bytes = self.codec.nbytes(value.shape, torch.float32)
        except ValueError:
            return RAW
        return self.codec if num_bytes < RAW.nbytes(value.shape, torch.float32) else RAW

    def _cut(self, streams: Streams, payload: torch.Tensor) -> dict[str, torch.Tensor]:
        sections, start = {}, verification.NBYTES
        for name, value in streams.items():
            size = self._codec_of(value).nbytes(value.shape, value.dtype)
            sections[name] = payload[start : start + size]
            start += pad_nbytes(size)
        return sections

    def _context(self, site: int, name: str, streams: Streams) -> Context:
        return Context(seed=draw_word(self.seed, self.num_rounds, site, list(streams).index(name)))

    def _header(self, streams: Streams) -> Header:
        facts = [self.codec, [(name, tuple(m.shape), m.dtype) for name, m in streams.items()]]
        return Header.of(self.num_rounds, 0, facts, [])

    def state_dict(self) -> dict[str, Any]:
        return {"known": dict(self.known), "num_rounds": self.num_rounds, "bytes_sent": self.bytes_sent}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.known = {place: values.clone() for place, values in saved["known"].items()}
        self.num_rounds, self.bytes_sent = saved["num_rounds"], saved["bytes_sent"]


class Mixing(Protocol):
    """Messages on their way."""

    def wait(self) -> list[dict[str, torch.Tensor]]:
        """By site of this process: what its values became."""


class Gossip(Protocol):
    """Between the sites of this process and their neighbours."""

    @property
    def sites(self) -> Sequence[Site]: ...

    def check(self, check: Callable[[], None]) -> None:
        """Calls it. Raises ValueError on every rank if it does on one."""

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """Raises ValueError on every rank if they differ in a fact."""

    def gather(self, item: Any) -> list[Any]:
        """What every process passed, in their order."""

    def start(self, streams: Sequence[Streams]) -> Mixing:
        """Sends what the sites of this process have. All sites start the same streams in the same order."""


class Arrived:
    """What sites of one process tell each other."""

    def __init__(self, sites: Sequence[Site], streams: Sequence[Streams]) -> None:
        self._streams = streams
        self._sites = sites
        self._payloads = [site.encode(of_site) for site, of_site in zip(sites, streams, strict=True)]

    def wait(self) -> list[dict[str, torch.Tensor]]:
        return [
            site.mix(of_site, {n: self._payloads[n] for n in (site.number, *site.near)})
            for site, of_site in zip(self._sites, self._streams, strict=True)
        ]


class LocalGossip:
    """All sites in this process: a simulation with the same bits.

    codec    `none`, or what values are compressed with; small ones travel as they are
    memory   whether differences are sent
    """

    def __init__(self, topology: Topology, codec: AnyCodec = RAW, memory: bool = True, seed: int = 0) -> None:
        self.sites = [Site(topology, number, codec, memory, seed) for number in range(topology.num_sites)]

    def check(self, check: Callable[[], None]) -> None:
        check()

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        pass

    def gather(self, item: Any) -> list[Any]:
        return [item]

    def start(self, streams: Sequence[Streams]) -> Mixing:
        return Arrived(self.sites, streams)


class Travelling:
    """What this rank's site and its neighbours tell each other."""

    def __init__(self, site: Site, streams: Streams, transfer: Transfer) -> None:
        self._site = site
        self._streams = streams
        self._transfer = transfer

    def wait(self) -> list[dict[str, torch.Tensor]]:
        told = self._transfer.wait()
        payloads = {number: told[number] for number in (self._site.number, *self._site.near)}
        return [self._site.mix(self._streams, payloads)]


class RankGossip:
    """Sites on ranks of torch.distributed. Making one is a collective of all ranks, as are `check`,
    `check_equal` and `gather`.

    ranks       global ranks of the sites, in their order; None: every rank is one. Others have no site
    device      where values are
    timeout_s   how long a neighbour's message is waited for
    Raises ValueError on every rank, with the same text, where ranks differ in what they were given;
    ConnectionError where a rank is gone or silent, here and later.
    """

    def __init__(
        self,
        topology: Topology,
        codec: AnyCodec = RAW,
        memory: bool = True,
        seed: int = 0,
        ranks: Sequence[int] | None = None,
        device: torch.device | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        everyone = range(get_world_size())
        self.ranks = list(everyone if ranks is None else ranks)
        # Configuration
        self.control = Control(timeout_s)
        self.control.check_equal({
            "mixing matrix": topology.weights.tolist(), "codec": codec, "memory": memory, "seed": seed,
            "sites": topology.num_sites, "ranks": self.ranks,
        })  # fmt: skip
        if topology.num_sites != len(self.ranks) or not set(self.ranks) <= set(everyone):
            raise ValueError(
                f"a topology of {topology.num_sites} sites on the ranks {self.ranks} of {len(everyone)}; "
                "accepted: one rank per site"
            )
        others = [[each] for each in everyone if each not in self.ranks]
        self.collective = make_collective(
            [self.ranks, *others], device or torch.device("cpu"), timeout_s, "gossip"
        )
        self.sites = [
            Site(topology, number, codec, memory, seed)
            for number, each in enumerate(self.ranks)
            if each == rank()
        ]

    def check(self, check: Callable[[], None]) -> None:
        self.control.check(check)

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        self.control.check_equal(facts)

    def gather(self, item: Any) -> list[Any]:
        return self.control.gather(item)

    def start(self, streams: Sequence[Streams]) -> Mixing:
        (mine,), (site,) = streams, self.sites
        payload = site.encode(mine)
        empty = payload[:0]
        reached = {site.number, *site.near}
        parts = [payload if place in reached else empty for place in range(self.collective.size)]
        sizes = [part.numel() for part in parts]  # all sites send the same streams
        return Travelling(site, mine, self.collective.swap(parts, sizes))
