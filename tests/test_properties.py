"""Whatever is done, in whatever order: both ends hold the same finite bits, messages have the announced
sizes, their bytes are the formula's, and what goes on from a checkpoint is what would have gone on."""

import io
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest.mock import patch

import torch
from deepspeed.accelerator import get_accelerator
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from clapping_ds import telemetry
from clapping_ds.codecs import CODECS, Eden, Float8, LowRank, Quantizer, RandK, TopK
from clapping_ds.message import Spec
from clapping_ds.sampling import Coin
from tests import models
from tests.cluster import free_groups
from tests.test_channel import Ends, value_of

NUM_CHANNEL_EXAMPLES, NUM_ENGINE_EXAMPLES = 250, 8
REPRODUCIBLE = settings(derandomize=True, database=None, deadline=None)

# Blocks

OPTIONS = {
    Quantizer: {"group_size": [16, 64, 128], "stochastic": [False, True], "rotate": [False, True]},
    Eden: {"group_size": [16, 64, 128], "scale": ["least_squares", "unbiased"]},
    Float8: {"group_size": [16, 64, 128]},
    TopK: {"ratio": [0.01, 0.05, 0.5], "block": [64], "values": ["bfloat16", "int8"]},
    RandK: {"ratio": [0.1, 1], "block": [64]},
    LowRank: {"rank": [1, 2, 16]},
}


@st.composite
def codecs(draw):
    name = draw(st.sampled_from(list(CODECS)))
    options = {} if name == "sign" else OPTIONS.get(CODECS[name], {})
    return {"name": name, **{key: draw(st.sampled_from(values)) for key, values in options.items()}}


@st.composite
def blocks(draw, min_numels, **others):
    """With a p_new of 1 only where no slot may be reused."""
    strategy = draw(st.sampled_from(["fu", "fc", "fc", "direct"]))
    directions = {}
    for name in ("activations", "gradients"):
        key = st.none() if strategy == "direct" else st.none() | codecs()
        direction = {"key": draw(key), "delta": draw(codecs())}
        largest_block = max(codec.get("block", 0) for codec in direction.values() if codec is not None)
        directions[name] = {
            **direction,
            "base": draw(st.sampled_from([None, "reset", "carry"])),
            "min_numel": max(largest_block, draw(st.sampled_from(min_numels))),
        }
    sampling = {} if strategy == "direct" else {"p_new": draw(st.sampled_from([0.5, 0.5, 0.5, 1]))}
    return {
        "strategy": strategy,
        **directions,
        **sampling,
        "memory": {"dtype": draw(st.sampled_from(["same", "float32", "float16", "bfloat16"]))},
        "verify": draw(st.booleans()),
        **{key: draw(st.sampled_from(values)) for key, values in others.items()},
    }


def padded(num_bytes):
    return -(-num_bytes // 16) * 16


# The two ends of a channel

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
    sent: dict[tuple[int, int], Spec | None] = field(default_factory=dict)
    """By slot and tensor, what was last compressed; None where a tensor travelled raw."""
    num_bytes: int = 0


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
        for held in (held for tensors in sender.held.values() for held in tensors.values()):
            for tensor in (held.memory, held.key_state, held.delta_state):
                assert tensor is None or tensor.isfinite().all()
        assert sender.traffic.payload_bytes == receiver.traffic.payload_bytes == self.known.num_bytes
        assert sender.memory_nbytes == receiver.memory_nbytes
        assert not self.ends.sender.wire.payloads
        assert not self.ends.sender.wire.expected

    # Operations

    def train(self, fresh, ahead, sent_ahead, measures_error, poison):
        """One step. ahead, sent_ahead: messages announced, and sent, before the one that is received."""
        known, config = self.known, self.ends.config
        num_slots = known.num_slots
        fresh = [is_fresh or config.p_new == 1 for is_fresh in fresh]
        for end in self.both:
            end.begin_step(known.step, num_slots, measures_error)
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
            telemetry.row(end)
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
        config = self.ends.config
        delta = config.delta_codec("activations")
        is_known = self.known.sent.get((slot, index)) == spec or not config.holds_memory("activations")
        return config.key_codec("activations") if fresh or delta is None or not is_known else delta

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
            padded(spec.nbytes) if codec is None else codec.nbytes(*spec)
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


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def written(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def state_bits(ends):
    return [(models.channel_memories([end]), asdict(end.traffic)) for end in ends]


@given(blocks([0, 64, 512]), st.lists(operations, min_size=4, max_size=14))
@settings(REPRODUCIBLE, max_examples=NUM_CHANNEL_EXAMPLES)
def test_any_sequence_on_a_channel(block, sequence):
    run = ChannelRun(block)
    for operation in sequence:
        run.apply(operation)
    run.apply(("load", True))


# A two-rank engine


class Data:
    """Batch number `position` in the length that is asked for at that moment. left: until it ends."""

    def __init__(self):
        self.position, self.length, self.left = 0, models.LENGTH, None

    def __iter__(self):
        return self

    def __next__(self):
        if self.left is not None:
            if self.left == 0:
                raise StopIteration
            self.left -= 1
        self.position += 1
        return next(models.batches(self.position - 1, self.length))


class Found(NamedTuple):
    """What both ranks must have alike after an operation, and what a resumed run must repeat."""

    operation: tuple
    loss: str
    loss_scale: float
    memories: dict[tuple[str, str], str]
    are_finite: bool
    num_bytes: int
    expected_bytes: int


class EngineRun:
    """Operations on one rank's engine. What they gave is judged by the parent, so that no rank waits for
    one that has stopped."""

    def __init__(self, block, is_fp16, folder):
        fp16 = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "min_loss_scale": 1}
        self.block, self.is_fp16, self.folder = block, is_fp16, folder
        self.ds = {"fp16": fp16} if is_fp16 else {}
        self.engine = None
        self.data = Data()
        self.expected_bytes = 0
        self.number, self.evaluated_length = 4, None
        self.saved, self.since = None, []
        self.found, self.repeated = [], []
        self.start()

    def start(self):
        self.engine = None
        free_groups()
        self.engine = models.make_engine(self.block, ds=self.ds, module_options={"num_blocks": 2})
        self.evaluated_length = None
        self.num_slots(self.number)

    def apply(self, operation):
        name, *arguments = operation
        loss = getattr(self, name)(*arguments)
        memories = models.memories(self.engine)
        channels = self.engine._stage.channels.values()
        held = [held for channel in channels for slot in channel.held.values() for held in slot.values()]
        tensors = [tensor for one in held for tensor in one[1:] if tensor is not None]
        found = Found(
            operation,
            repr(loss),
            self.engine._loss_scale(),
            {end: sha256(repr(held).encode()).hexdigest() for end, held in memories.items()},
            all(bool(tensor.isfinite().all()) for tensor in tensors),
            self.engine.clapping_traffic().payload_bytes,
            self.expected_bytes,
        )
        self.found.append(found)
        if name not in ("save", "load"):
            self.since.append(found)
        return found

    # Operations

    def train(self):
        before = len(self.engine._stage.fresh)
        step = self.engine._stage.step
        try:
            loss = float(self.engine.train_batch(data_iter=self.data))
        except StopIteration as error:
            return str(error)
        config = self.engine.clapping
        tosses = Coin(config.p_new, config.refresh, config.seed).fresh(step, self.number)
        for slot, is_fresh in enumerate(tosses):
            self.expected_bytes += self.num_bytes(slot, is_fresh or slot >= before)
        return loss

    def num_bytes(self, slot, fresh):
        """Of one message in each direction."""
        config, total = self.engine.clapping, 0
        length = self.engine._stage.sampler._held[slot][0].shape[1]
        spec = Spec(
            torch.Size((models.BATCH, length, models.WIDTH)), torch.float16 if self.is_fp16 else torch.float32
        )
        for name in ("activations", "gradients"):
            key, delta = config.key_codec(name), config.delta_codec(name)
            codec = key if fresh or delta is None else delta
            is_compressed = spec.shape.numel() >= self.block[name]["min_numel"]
            total += codec.nbytes(*spec) if is_compressed else padded(spec.nbytes)
        return total + (2 * 48 if self.block["verify"] else 0)

    def overflow(self):
        """A step of which the activations are not finite: fp16 skips it."""
        if not self.is_fp16:
            return self.train()
        weight = next(self.engine.module.parameters()).data
        before = weight.clone()
        if self.engine.is_first_stage():
            weight[5] = float("inf")
        loss = self.train()
        weight.copy_(before)
        return loss

    def data_ends(self, *left):
        """On each rank after so many more batches. A step that lacks some is not trained, and loses none."""
        self.data.left = left[self.engine.global_rank]
        loss = self.train()
        self.data.left = None
        return loss

    def evaluate(self, num_slots):
        if self.evaluated_length != self.data.length:
            self.engine.reset_activation_shape()
        self.evaluated_length = self.data.length
        return float(self.engine.eval_batch(models.batches(9, self.data.length), num_micro_batches=num_slots))

    def num_slots(self, number):
        self.number = number
        self.engine.set_train_batch_size(number * models.BATCH)

    def length(self, length):
        self.data.length = length

    def scale(self, power):
        if self.is_fp16:
            self.engine.optimizer.loss_scale = 2.0**power

    def save(self):
        """Once a step was trained with what is held."""
        last_number = len(self.engine._stage.fresh)
        if last_number:
            self.engine.save_checkpoint(self.folder)
            self.saved = last_number, self.number, self.data.length, self.expected_bytes
            self.since = []

    def load(self, into_new, with_same_number):
        """With the number of micro-batches of the checkpoint, what was done since gives what it gave; with
        another, nothing is held."""
        if self.saved is None:
            self.save()
        if self.saved is None:
            return
        if into_new:
            self.start()
        last_number, number, self.data.length, self.expected_bytes = self.saved
        self.num_slots(last_number if with_same_number else last_number + 1)
        self.engine.load_checkpoint(self.folder)
        self.num_slots(number)
        if not with_same_number:
            self.expected_bytes = self.engine.clapping_traffic().payload_bytes
            self.data.position, self.saved, self.since = 0, None, []
            return
        self.data.position = self.engine.clapping_num_drawn
        since, self.since = self.since, []
        self.repeated += [(before, self.apply(before.operation)) for before in since]


def run_engine(block, is_fp16, sequence, folder):
    with patch.object(type(get_accelerator()), "is_fp16_supported", lambda _: True):
        run = EngineRun(block, is_fp16, folder)
        for operation in (("train",), *sequence, ("load", True, True)):
            run.apply(operation)
    return run.found, run.repeated


engine_operations = st.one_of(
    st.just(("train",)),
    st.just(("train",)),
    st.just(("overflow",)),
    st.tuples(st.just("data_ends"), st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.just("evaluate"), st.integers(1, 3)),
    st.tuples(st.just("num_slots"), st.integers(1, 6)),
    st.tuples(st.just("length"), st.sampled_from([32, 64])),
    st.tuples(st.just("scale"), st.integers(0, 14)),
    st.just(("save",)),
    st.tuples(st.just("load"), st.booleans(), st.sampled_from([True, True, False])),
)


@given(
    blocks([1024, 6000], refresh=["step", "slot", "cycle"], in_flight=[0, 1, "auto"], overlap=[True]),
    st.booleans(),
    st.lists(engine_operations, min_size=10, max_size=10),
)
@settings(REPRODUCIBLE, max_examples=NUM_ENGINE_EXAMPLES, phases=[Phase.generate])
def test_any_sequence_on_an_engine(two_ranks, block, is_fp16, sequence):
    with TemporaryDirectory() as folder:
        (one, repeated), (other, also_repeated) = two_ranks.run(run_engine, block, is_fp16, sequence, folder)
    assert one == other
    for found in one:
        assert found.are_finite, found.operation
        assert found.num_bytes == found.expected_bytes, found.operation
    for before, again in repeated + also_repeated:
        assert before == again, f"after a load, {before.operation} gave something else"
