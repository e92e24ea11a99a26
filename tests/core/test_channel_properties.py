"""The two ends of a channel, whatever is done, in whatever order: both hold the same finite bits, messages
have the announced sizes, their bytes are the formula's, and a checkpoint goes on as the run would have."""

import io
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from hypothesis import given
from hypothesis import strategies as st

from clapping_ds import report
from clapping_ds.codecs import Raw
from clapping_ds.codecs.base import pad_nbytes
from clapping_ds.link.message import Spec
from clapping_ds.stage.sampling import Coin
from tests import models
from tests.core.random_blocks import blocks, reproducible
from tests.core.test_channel import Ends, value_of

MAX_SLOTS = 4
SHAPES = [(2, 8, 16), (5, 77), (16, 96), (64,), (7,), (), (0, 4)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]

specs = st.lists(st.builds(Spec, st.sampled_from(SHAPES).map(torch.Size), st.sampled_from(DTYPES)),
                 min_size=1, max_size=3)  # fmt: skip
patterns = st.lists(st.booleans(), min_size=MAX_SLOTS, max_size=MAX_SLOTS)
poisons = st.tuples(
    st.integers(0, MAX_SLOTS - 1), st.integers(0, 5000),
    st.sampled_from([float("inf"), float("-inf"), float("nan")]),
)  # fmt: skip
train = st.tuples(st.just("train"), patterns, st.integers(0, 3), st.integers(0, 3), st.booleans(), st.none())
operations = st.one_of(
    train,
    train,
    st.tuples(st.just("train"), patterns, st.integers(0, 3), st.just(0), st.just(False), poisons),
    st.tuples(st.just("report")),
    st.tuples(st.just("save")),
    st.tuples(st.just("load"), st.booleans()),
    st.tuples(st.just("reshape"), st.integers(0, MAX_SLOTS - 1), specs),
    st.tuples(st.just("num_slots"), st.integers(1, MAX_SLOTS)),
    st.tuples(st.just("scale"), st.sampled_from([0.5, 2.0, 2.0**-12, 2.0**12, 3.0, 1e-3])),
)


@dataclass
class Known:
    """What a test knows of a channel besides what its ends do."""

    step: int = 0
    num_slots: int = 2
    scale: float = 1.0
    specs: list[list[Spec]] = field(
        default_factory=lambda: [[Spec(torch.Size((2, 8, 16)), torch.float32)]] * MAX_SLOTS
    )
    entry: int = 0
    pool: dict[int, dict[tuple[int, int], Spec | None]] = field(default_factory=dict)
    """By entry, then by slot and tensor, what was last compressed; None where a tensor travelled raw."""
    num_bytes: int = 0

    @property
    def sent(self):
        return self.pool.setdefault(self.entry, {})

    @sent.setter
    def sent(self, sent):
        self.pool[self.entry] = sent


class ChannelRun:
    """Operations on the two ends of a channel, each followed by the invariants."""

    def __init__(self, block):
        self.block = block
        self.ends = Ends(**block)
        self.known = Known()
        self.saved = None
        self.since = []
        """Operations since the last checkpoint, and what they gave."""

    @property
    def both(self):
        return self.ends.sender, self.ends.receiver

    def apply(self, operation):
        name, *arguments = operation
        found = getattr(self, name)(*arguments)
        if name not in ("save", "load"):
            self.since.append((operation, found))
        self.check()
        return found

    def check(self):
        sender, receiver = self.both
        assert models.channel_memories([sender]) == models.channel_memories([receiver])
        for held in sender.all_held():
            assert held.memory is None or held.memory.isfinite().all()
        assert sender.traffic.payload_bytes == receiver.traffic.payload_bytes == self.known.num_bytes
        assert sender.memory_nbytes - own_nbytes(sender) == receiver.memory_nbytes - own_nbytes(receiver)
        assert not self.ends.sender.wire.payloads
        assert not self.ends.sender.wire.expected

    # Operations

    def train(self, fresh, ahead, sent_ahead, measures_error, poison):
        """One step. ahead, sent_ahead: messages announced, and sent, before the one that is received."""
        known, config = self.known, self.ends.config
        num_slots = known.num_slots
        fresh = [is_fresh or config.sampling.p_new == 1 for is_fresh in fresh]
        known.entry = Coin(0.5, "step", 0, config.sampling.pool).pick(known.step)
        for end in self.both:
            end.begin_step(known.step, num_slots, measures_error, known.entry)
        known.sent = {place: spec for place, spec in known.sent.items() if place[0] < num_slots}
        sent = [self.values(slot) for slot in range(num_slots)]
        if poison is not None:
            self.poison(sent, *poison)
        num_announced = num_sent = 0
        plans, received = [], []
        for slot in range(num_slots):
            while num_announced < min(slot + 1 + ahead, num_slots):
                self.ends.receiver.expect(num_announced, fresh[num_announced], known.specs[num_announced])
                num_announced += 1
            while num_sent < min(slot + 1 + sent_ahead, num_slots):
                plans.append(self.planned(num_sent, fresh[num_sent]))
                self.ends.sender.send(num_sent, fresh[num_sent], sent[num_sent])
                num_sent += 1
            received.append(self.ends.receiver.receive())
            self.check_received(slot, plans[slot], sent[slot], received[slot])
        for end in self.both:
            end.end_step()
        known.step += 1
        return [bits(value) for values in received for value in values], state_bits(self.both)

    def report(self):
        """Reading changes nothing."""
        before = state_bits(self.both)
        for end in self.both:
            report.make_row(end)
            end.state_dict()
        assert state_bits(self.both) == before

    def save(self):
        self.saved = [written(end.state_dict()) for end in self.both], deepcopy(self.known)
        self.since = []

    def load(self, into_new):
        """What was done since the checkpoint, done again by what was loaded, gives what it gave."""
        if self.saved is None:
            return
        states, known = self.saved
        if into_new:
            self.ends = Ends(**self.block)
        self.known = deepcopy(known)
        for end, state in zip(self.both, states, strict=True):
            end.load_state_dict(torch.load(io.BytesIO(state)))
        since, self.since = self.since, []
        for operation, found in since:
            assert self.apply(operation) == found, f"after a load, {operation} gave something else"

    def reshape(self, slot, specs):
        self.known.specs[slot] = specs

    def num_slots(self, num_slots):
        self.known.num_slots = num_slots

    def scale(self, factor):
        if 2.0**-40 < self.known.scale * factor < 2.0**40:
            self.known.scale *= factor
            for end in self.both:
                end.rescale(factor)
        return state_bits(self.both)

    # What is sent, and what is known of it

    def values(self, slot):
        """Some of a slot's values change from step to step, and most of them little."""
        values = []
        for index, (shape, dtype) in enumerate(self.known.specs[slot]):
            seed = 1000 * slot + 10 * index
            change = value_of(seed + 100_000 * (self.known.step + 1), shape)
            value = (value_of(seed, shape) + 0.1 * change) * self.known.scale
            values.append(value.clamp(-(2**60), 2**60).to(dtype))
        return values

    @staticmethod
    def poison(sent, slot, position, poison):
        for value in sent[slot % len(sent)]:
            if value.is_floating_point() and value.numel():
                value.view(-1)[position % value.numel()] = poison

    def compresses(self, spec):
        is_float = spec.dtype in (torch.float32, torch.float16, torch.bfloat16)
        return is_float and spec.shape.numel() >= max(1, self.block["activations"]["min_numel"])

    def codec(self, slot, index, fresh, spec):
        """Of a tensor that is compressed: the key's for a fresh slot and for a tensor that is not as it
        was, unless nothing is remembered of it."""
        plan = self.ends.config.plan("activations")
        is_known = self.known.sent.get((slot, index)) == spec or not plan.holds_memory
        codec = plan.key if fresh or not is_known else plan.delta
        return codec if codec.nbytes(*spec) <= pad_nbytes(spec.nbytes) else Raw()

    def planned(self, slot, fresh):
        """The codecs of a message that is about to be sent; None for what travels raw."""
        known, specs = self.known, self.known.specs[slot]
        plan = []
        for index, spec in enumerate(specs):
            plan.append(self.codec(slot, index, fresh, spec) if self.compresses(spec) else None)
            known.sent[slot, index] = None if plan[-1] is None else spec
        known.sent = {(s, i): spec for (s, i), spec in known.sent.items() if s != slot or i < len(specs)}
        header = 48 if self.block["verify"] else 0
        sections = (
            pad_nbytes(spec.nbytes) if codec is None else codec.nbytes(*spec)
            for spec, codec in zip(specs, plan, strict=True)
        )
        known.num_bytes += header + sum(sections)
        return plan

    def check_received(self, slot, plan, sent, received):
        held = self.ends.receiver.held[slot]
        for index, (codec, value, got) in enumerate(zip(plan, sent, received, strict=True)):
            assert Spec.of(value) == Spec.of(got)
            if codec is None or codec.name == "none":
                assert bits(value) == bits(got)
                continue
            finite = got.isfinite()
            assert not (finite & ~value.isfinite()).any(), "what was not finite became finite"
            assert finite.all() or not value.isfinite().all(), "what was finite did not arrive so"
            if held[index].memory is not None:
                assert torch.equal(got[finite], held[index].memory.to(got.dtype)[finite])


def own_nbytes(end):
    """Of what codecs hold at this end alone."""
    found, states = 0, [learned.state for learned in end.learned.values() if learned.state is not None]
    while states:
        state = states.pop()
        found += sum(tensor.nbytes for tensor in (*state.own.values(), *state.host.values()))
        states += [member for member in state.members if member is not None]
    return found


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def written(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def state_bits(ends):
    return [(models.channel_memories([end]), end.state_dict()["traffic"]) for end in ends]


@given(blocks([0, 64, 512]), st.lists(operations, min_size=4, max_size=14))
@reproducible(250)
def test_any_sequence_on_a_channel(block, sequence):
    run = ChannelRun(block)
    for operation in sequence:
        run.apply(operation)
    run.apply(("load", True))
