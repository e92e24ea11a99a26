"""Values of neighbouring sites, mixed: m_i + step sum over neighbours of w_ij (m_j - m_i), compressed or not.

With a codec and `memory` every site keeps what its neighbours know of its values, and they do; what crosses
a link is the difference to that (arXiv 1902.00340). So errors shrink with the steps, where without it they
stay; with a codec that is too coarse they would grow, so that those are refused. Both ends decode the same
payload, and the mean over all sites stays what it was, whatever the codec.

Sites may be processes, or all lie in one: the same operations, the same bits.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from clapping_ds.bilevel.topology import Topology
from clapping_ds.codecs import AnyCodec, Context, Eden, Raw
from clapping_ds.codecs.base import pad_nbytes
from clapping_ds.link import verification
from clapping_ds.link.collective import Transfer, make_collective
from clapping_ds.link.groups import Control, find_carrier, get_world_size, rank
from clapping_ds.link.seeds import draw_word
from clapping_ds.link.verification import Header, VerificationError

RAW = Raw()
MEMORY_STEPS = {
    "none": 1.0, "int8": 1.0, "int4": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "eden4": 1.0, "eden3": 0.5,
    "eden2": 0.25, "eden1": 0.25,
}  # fmt: skip
"""By codec: how far values may go towards their neighbours' where differences are sent. Of others errors
grew in some problem."""
Streams = Mapping[str, torch.Tensor]
"""What a site has mixed, by name: values of the same name at all sites, of the same shape."""


class Compression(NamedTuple):
    """How values cross the links."""

    codec: AnyCodec = RAW
    """Small values travel as they are."""
    memory: bool = True
    """Whether differences are sent."""
    step: float | None = None
    """How far values go towards their neighbours' in a round; None: as the codec bears it."""
    seed: int = 0
    """Of what the codec draws at random; the same at all sites."""

    def check(self) -> None:
        """Raises ValueError of what cannot be."""
        names = ", ".join(MEMORY_STEPS)
        if self.codec.new_state(64, torch.device("cpu")) is not None:
            raise ValueError(f"codec {self.codec.name}, which learns from messages; accepted: {names}")
        name: str = self.codec.name
        if isinstance(self.codec, Eden) and self.codec.scale == "unbiased" and name == "eden1":
            name = "eden1 scale=unbiased"
        if self.memory and name not in MEMORY_STEPS:
            raise ValueError(
                f"codec {name} with memory, whose errors grow where differences are sent; accepted: {names}, "
                "or no memory"
            )
        if self.step is not None and not 0 < self.step <= 1:
            raise ValueError(f"step = {self.step} of gossip; accepted: above 0, to 1")

    def choose_step(self) -> float:
        if self.step is not None:
            return self.step
        return MEMORY_STEPS[self.codec.name] if self.memory else 1.0


class Site:
    """What one site encodes, decodes, and keeps. number: of the site in the topology."""

    def __init__(self, topology: Topology, number: int, compression: Compression) -> None:
        # Configuration
        self.number = number
        self.near = topology.neighbours(number)
        self.compression = compression
        self.codec = compression.codec
        step = compression.choose_step()
        self.weights = {other: step * topology.weight(number, other) for other in self.near}
        self.keeps = compression.memory and self.codec != RAW
        # State
        self.known: dict[tuple[str, int], torch.Tensor] = {}
        """By name and site: what is known of its values at both ends. Tensors are replaced, never written."""
        self.num_rounds = 0
        self.bytes_sent = 0

    def encode(self, streams: Streams, note: Any = None) -> torch.Tensor:
        """uint8: the same for all neighbours. note: what must be the same at both ends, besides."""
        self.num_rounds += 1
        sizes = [self._codec_of(m).nbytes(m.shape, m.dtype) for m in streams.values()]
        num_bytes = verification.NBYTES + sum(map(pad_nbytes, sizes))
        payload = torch.zeros(num_bytes, dtype=torch.uint8, device=next(iter(streams.values())).device)
        for name, section in self._cut(streams, payload).items():
            value = streams[name]
            codec = self._codec_of(value)
            known = self.known.get((name, self.number)) if self.keeps else None
            difference = value if known is None else value - known
            if codec is not RAW:
                difference = difference.float()
            codec.encode_(difference.contiguous(), section, self._context(self.number, name, streams))
        header = self._header(self.number, streams, note)
        header.with_payload(payload[verification.NBYTES :]).write_(payload[: verification.NBYTES])
        self.bytes_sent += payload.numel() * len(self.near)
        return payload

    def mix(
        self, streams: Streams, payloads: Mapping[int, torch.Tensor], note: Any = None
    ) -> dict[str, torch.Tensor]:
        """payloads: by site, this one's included. Raises ArithmeticError where values are not finite."""
        seen = {
            site: self._decode(streams, site, payload, note) for site, payload in sorted(payloads.items())
        }
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

    def _decode(
        self, streams: Streams, site: int, payload: torch.Tensor, note: Any
    ) -> dict[str, torch.Tensor]:
        header = self._header(site, streams, note).with_payload(payload[verification.NBYTES :])
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
        seed = draw_word(self.compression.seed, self.num_rounds, site, list(streams).index(name))
        return Context(seed=seed)

    def _header(self, site: int, streams: Streams, note: Any) -> Header:
        """What a site's message begins with."""
        facts = [self.codec, note, [(name, tuple(m.shape), m.dtype) for name, m in streams.items()]]
        return Header.of(self.num_rounds, site, facts, [])

    def describe(self) -> dict[str, Any]:
        """What a run and the checkpoint that it loads must have alike."""
        compression = self.compression._replace(codec=self.codec.model_dump())  # type: ignore[arg-type]
        return {"site": self.number, "weights": dict(self.weights), **compression._asdict()}

    def state_dict(self) -> dict[str, Any]:
        return {"known": dict(self.known), "num_rounds": self.num_rounds, "bytes_sent": self.bytes_sent}

    def load_state_dict(self, saved: Mapping[str, Any], device: torch.device | None = None) -> None:
        """device: where values are; None: where the saved ones are."""
        self.known = {place: values.to(device or values.device) for place, values in saved["known"].items()}
        self.num_rounds, self.bytes_sent = saved["num_rounds"], saved["bytes_sent"]


class Mixing(Protocol):
    """Messages on their way."""

    def wait(self) -> list[dict[str, torch.Tensor]]:
        """By site of this process: what its values became."""


class Gossip(Protocol):
    """Between the sites of this process and their neighbours."""

    @property
    def sites(self) -> Sequence[Site]: ...

    @property
    def device(self) -> torch.device:
        """Where values are."""

    def check(self, check: Callable[[], None]) -> None:
        """Calls it. Raises ValueError on every rank if it does on one."""

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """Raises ValueError on every rank if they differ in a fact."""

    def gather(self, item: Any) -> list[Any]:
        """What every process passed, in their order."""

    def start(self, streams: Sequence[Streams], note: Any = None) -> Mixing:
        """Sends what the sites of this process have. All sites start the same streams in the same order.

        note   what must be the same at all sites, besides
        """

    def roll_back(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Sites are as they were when a step began, which failed."""


class Arrived:
    """What sites of one process tell each other."""

    def __init__(self, sites: Sequence[Site], streams: Sequence[Streams], note: Any) -> None:
        self._sites = sites
        self._streams = streams
        self._note = note
        self._payloads = [site.encode(mine, note) for site, mine in zip(sites, streams, strict=True)]

    def wait(self) -> list[dict[str, torch.Tensor]]:
        return [
            site.mix(mine, {n: self._payloads[n] for n in (site.number, *site.near)}, self._note)
            for site, mine in zip(self._sites, self._streams, strict=True)
        ]


class LocalGossip:
    """All sites in this process: a simulation with the same bits. Arguments as `RankGossip` has them."""

    def __init__(
        self,
        topology: Topology,
        codec: AnyCodec = RAW,
        memory: bool = True,
        step: float | None = None,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        compression = Compression(codec, memory, step, seed)
        compression.check()
        self.device = device or torch.device("cpu")
        self.sites = [Site(topology, number, compression) for number in range(topology.num_sites)]

    def check(self, check: Callable[[], None]) -> None:
        check()

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        pass

    def gather(self, item: Any) -> list[Any]:
        return [item]

    def start(self, streams: Sequence[Streams], note: Any = None) -> Mixing:
        return Arrived(self.sites, streams, note)

    def roll_back(self, saved: Sequence[Mapping[str, Any]]) -> None:
        for site, state in zip(self.sites, saved, strict=True):
            site.load_state_dict(state)


class Travelling:
    """What this rank's site and its neighbours tell each other. places: of sites in the process group."""

    def __init__(
        self, site: Site, streams: Streams, note: Any, transfer: Transfer, places: Sequence[int]
    ) -> None:
        self._site = site
        self._streams = streams
        self._note = note
        self._transfer = transfer
        self._places = places

    def wait(self) -> list[dict[str, torch.Tensor]]:
        told = self._transfer.wait()
        payloads = {n: told[self._places[n]] for n in (self._site.number, *self._site.near)}
        return [self._site.mix(self._streams, payloads, self._note)]


class RankGossip:
    """Sites on ranks of torch.distributed. Making one is a collective of all ranks, as are `check`,
    `check_equal` and `gather`.

    codec       `none`, or what values are compressed with; small ones travel as they are
    memory      whether differences are sent
    step        how far values go towards their neighbours' in a round, above 0, to 1; None: as the codec
                bears it
    seed        of what the codec draws at random
    ranks       global ranks of the sites, in their order; None: every rank is one. Others have no site
    device      where values are; None: the CPU
    timeout_s   how long a neighbour's message is waited for
    Raises ValueError on every rank, with the same text, where ranks differ in what they were given, or of a
    codec whose errors would grow; ConnectionError where a rank is gone or silent, here and later.
    """

    def __init__(
        self,
        topology: Topology,
        codec: AnyCodec = RAW,
        memory: bool = True,
        step: float | None = None,
        seed: int = 0,
        ranks: Sequence[int] | None = None,
        device: torch.device | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        # Configuration
        self.device = device or torch.device("cpu")
        self.ranks = list(range(get_world_size()) if ranks is None else ranks)
        self.control = Control(timeout_s)
        compression = Compression(codec, memory, step, seed)
        self.control.check_equal({
            "mixing matrix": topology.weights.tolist(), "codec": codec, "memory": memory, "step": step,
            "seed": seed, "ranks": self.ranks, "kind of device": self.device.type,
        })  # fmt: skip
        self.control.check(compression.check)
        self.control.check(lambda: self._check(topology.num_sites))
        others = [[each] for each in range(get_world_size()) if each not in self.ranks]
        self.collective = make_collective([self.ranks, *others], self.device, timeout_s, "gossip")
        self.places = [self.collective.ranks.index(each) for each in self.ranks if rank() in self.ranks]
        """Of sites, in the process group, whose order is that of ranks."""
        self.sites = [
            Site(topology, number, compression) for number, each in enumerate(self.ranks) if each == rank()
        ]
        # State
        self.is_broken = False
        """Whether a step failed here after messages of it had left."""

    def _check(self, num_sites: int) -> None:
        everyone = set(range(get_world_size()))
        if (
            num_sites != len(self.ranks)
            or len(set(self.ranks)) != num_sites
            or not set(self.ranks) <= everyone
        ):
            raise ValueError(
                f"a topology of {num_sites} sites on the ranks {self.ranks} of {len(everyone)}; accepted: "
                "one rank per site"
            )
        if self.device.type == "cpu" and find_carrier(None, torch.device("meta")).type != "cpu":
            raise ValueError("values on the CPU where ranks talk by NCCL; accepted: device, a GPU")

    def check(self, check: Callable[[], None]) -> None:
        self.control.check(check)

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        self.control.check_equal(facts)

    def gather(self, item: Any) -> list[Any]:
        return self.control.gather(item)

    def start(self, streams: Sequence[Streams], note: Any = None) -> Mixing:
        if self.is_broken:
            raise ConnectionError(
                "gossip: a step failed here, and neighbours are out of step; state_dict has what was before"
            )
        (mine,), (site,) = streams, self.sites
        payload = site.encode(mine, note)
        reached = {self.places[number] for number in (site.number, *site.near)}
        empty = payload[:0]
        parts = [payload if place in reached else empty for place in range(self.collective.size)]
        sizes = [part.numel() for part in parts]  # all sites send the same streams
        return Travelling(site, mine, note, self.collective.swap(parts, sizes), self.places)

    def roll_back(self, saved: Sequence[Mapping[str, Any]]) -> None:
        for site, state in zip(self.sites, saved, strict=True):
            self.is_broken |= site.num_rounds != state["num_rounds"]
            site.load_state_dict(state)
