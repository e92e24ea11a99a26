"""The two ends of a channel, joined by a queue: equal memories, exact bytes, every case of the design."""

from collections import deque
from copy import deepcopy
from itertools import pairwise

import pytest
import torch

from clapping_ds import ClappingConfig
from clapping_ds.codecs import CODECS, Transform
from clapping_ds.config import DIRECTIONS
from clapping_ds.link.channel import Channel
from clapping_ds.link.message import Spec
from clapping_ds.stage.sampling import Coin
from clapping_ds.streams import SideStream

SHAPE = (3, 40, 64)


class QueueWire:
    def __init__(self):
        self.device = torch.device("cpu")
        self.side = SideStream(self.device)
        self.payloads = deque()
        self.expected = deque()

    def working(self, after_compute=False):
        return self.side.active()

    def new_payload(self, num_bytes):
        return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)

    def send(self, payload):
        self.payloads.append(payload.clone())

    def expect(self, num_bytes):
        self.expected.append(num_bytes)

    def receive(self):
        payload = self.payloads.popleft()
        assert payload.numel() == self.expected.popleft()
        return payload

    def done_with(self, payload):
        payload.fill_(255)

    def drain(self):
        pass


def same_state(state, other):
    tensors = zip(state.list_shared(), other.list_shared(), strict=True)
    return state.num_messages == other.num_messages and all(torch.equal(*pair) for pair in tensors)


class Ends:
    def __init__(self, **block):
        self.config = ClappingConfig.from_ds_config({"clapping": block})
        wire = QueueWire()
        plan, seed, verifies = self.config.plan("activations"), self.config.seed, self.config.verify
        self.sender, self.receiver = (Channel(plan, 0, "activations", wire, seed, verifies) for _ in range(2))

    def pass_on(self, slot, fresh, *values):
        self.sender.send(slot, fresh, values)
        self.receiver.expect(slot, fresh, [Spec.of(value) for value in values])
        received = self.receiver.receive()
        self.assert_equal()
        return received if len(values) > 1 else received[0]

    def error_of(self, value):
        """Relative, of a first message."""
        return ((self.pass_on(0, True, value) - value).norm() / value.norm()).item()

    def begin_step(self, step, num_slots):
        for end in (self.sender, self.receiver):
            end.begin_step(step, num_slots)

    def assert_equal(self):
        assert self.sender.held.keys() == self.receiver.held.keys()
        for slot, tensors in self.sender.held.items():
            others = self.receiver.held[slot]
            assert tensors.keys() == others.keys()
            for index, held in tensors.items():
                assert held.spec == others[index].spec
                assert held.memory is others[index].memory is None or torch.equal(
                    held.memory, others[index].memory
                )
        assert self.sender.learned.keys() == self.receiver.learned.keys()
        for place, learned in self.sender.learned.items():
            other = self.receiver.learned[place].state
            assert learned.state is other is None or same_state(learned.state, other)


def value_of(seed, shape=SHAPE, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("base", ["reset", "carry"])
@pytest.mark.parametrize("delta", CODECS)
@pytest.mark.parametrize("key", [None, "none", "int8"])
@pytest.mark.parametrize(
    ("dtype", "memory"),
    [
        (torch.float32, "same"),
        (torch.bfloat16, "same"),
        (torch.float16, "float32"),
        (torch.float32, "bfloat16"),
    ],
)
def test_memories_stay_equal(delta, key, base, dtype, memory):
    direction = {"delta": delta} if key is None else {"delta": delta, "key": key}
    if (key or delta) != "none":  # what is sent as it is has no base
        direction["base"] = base
    strategy = "fc" if key is None else "key_delta"
    ends = Ends(strategy=strategy, **dict.fromkeys(DIRECTIONS, direction), memory={"dtype": memory})
    coin = Coin(0.5, "slot", seed=1)
    for step in range(6):
        ends.begin_step(step, 2)
        for slot, fresh in enumerate(coin.toss(step, 2)):
            received = ends.pass_on(slot, fresh, value_of(10 * step + slot, dtype=dtype))
            memory = ends.receiver.held[slot][0].memory
            sent_as_is = (key if fresh else delta) == "none"
            if memory is not None and not sent_as_is:
                assert torch.equal(received, memory.to(dtype))


def test_none_hands_over_the_value_itself():
    ends = Ends(strategy="fu", activations={"delta": "none"}, memory={"dtype": "bfloat16"})
    for slot in range(2):
        value = value_of(slot)
        assert torch.equal(ends.pass_on(slot, slot == 0, value), value)
    assert ends.sender.memory_nbytes == 0


def test_reused_slots_converge_on_a_constant_value():
    """|x - D(x)| <= max|x| / 3 for int2, so the error falls threefold with every reuse."""
    ends = Ends(strategy="fc", activations={"delta": {"name": "int2", "scale": "maximum"}})
    value = value_of(0)
    errors = []
    for step in range(6):
        errors.append(float((ends.pass_on(0, step == 0, value) - value).abs().max()))
    assert all(after <= before * (1 / 3 + 0.01) for before, after in pairwise(errors))


@pytest.mark.parametrize("strategy", ["fu", "fc", "direct"])
@pytest.mark.parametrize("refresh", ["step", "slot", "cycle"])
def test_bytes_equal_the_formula(strategy, refresh):
    """Payload bytes = fresh messages * key bytes + reused messages * delta bytes, to the byte."""
    lazy = {} if strategy == "direct" else {"lazy": {"p_new": 0.5, "refresh": refresh}}
    member = "codec" if strategy == "direct" else "delta"
    ends = Ends(strategy=strategy, activations={member: "int2"}, **lazy)
    coin = Coin(ends.config.sampling.p_new, ends.config.sampling.refresh, ends.config.seed)
    tosses = [fresh for step in range(20) for fresh in enumerate(coin.toss(step, 4))]
    for slot, fresh in tosses:
        ends.pass_on(slot, fresh, value_of(slot))
    num_fresh = sum(fresh for _, fresh in tosses)
    num_values = 3 * 40 * 64
    int2_bytes = num_values * 2 // 8 + num_values // 128 * 2 + 8  # 8: padding of 2040 to 16
    key_bytes = num_values * 4 if strategy == "fu" else int2_bytes
    expected = num_fresh * key_bytes + (len(tosses) - num_fresh) * int2_bytes
    assert ends.sender.traffic.payload_bytes == ends.receiver.traffic.payload_bytes == expected
    assert ends.sender.traffic.raw_bytes == len(tosses) * num_values * 4


def test_memory_is_slots_times_tensor_whatever_the_steps():
    ends = Ends(strategy="fu", activations={"delta": "int4"}, memory={"dtype": "bfloat16"})
    for step in range(30):
        for slot in range(4):
            ends.pass_on(slot, step % 2 == 0, value_of(step))
    assert ends.sender.memory_nbytes == ends.receiver.memory_nbytes == 4 * (3 * 40 * 64) * 2


def test_direct_keeps_no_memory():
    ends = Ends(strategy="direct", activations={"codec": "int4"})
    ends.pass_on(0, True, value_of(0))
    assert ends.sender.memory_nbytes == 0


@pytest.mark.parametrize("other", [value_of(1, (3, 30, 64)), value_of(1, dtype=torch.bfloat16)])
def test_a_new_shape_or_dtype_is_fresh(other):
    ends = Ends(strategy="fu", activations={"delta": "sign"})
    ends.pass_on(0, True, value_of(0))
    assert torch.equal(ends.pass_on(0, False, other), other)
    assert not torch.equal(ends.pass_on(0, False, other * 2), other * 2)


def test_surplus_slots_are_freed():
    ends = Ends(strategy="fu")
    for slot in range(4):
        ends.pass_on(slot, True, value_of(slot))
    ends.sender.begin_step(1, 2)
    assert ends.sender.memory_nbytes == 2 * 3 * 40 * 64 * 4


def test_only_large_floating_tensors_of_a_tuple_are_compressed():
    ends = Ends(strategy="fc", activations={"delta": "int2"})
    mask, ids = torch.rand(3, 4096) > 0.5, torch.arange(5000)
    small, double, empty = value_of(1, (64,)), value_of(2, (5000,), torch.float64), torch.empty(0, 7)
    hidden = value_of(0).transpose(0, 1)
    received = ends.pass_on(0, True, hidden, mask, ids, small, double, empty)
    assert not torch.equal(received[0], hidden)
    for sent, got in zip((mask, ids, small, double, empty), received[1:], strict=True):
        assert torch.equal(sent, got)
        assert sent.dtype == got.dtype
    assert list(ends.sender.held[0]) == [0]


@pytest.mark.parametrize("delta", CODECS)
@pytest.mark.parametrize("poison", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_arrives_so_and_stays_out_of_the_memory(delta, poison):
    base = {} if delta == "none" else {"base": "carry"}
    ends = Ends(strategy="fc", activations={"delta": delta, **base}, memory={"dtype": "float32"})
    clean = value_of(0)
    for fresh in (True, False):
        ends.pass_on(0, True, clean)
        held = ends.sender.held[0][0].memory
        before = None if held is None else held.clone()
        broken = clean.clone()
        broken[1, 2, 3] = poison
        received = ends.pass_on(0, fresh, broken)
        assert not received[1, 2, 3].isfinite()
        assert received[0, 0].isfinite().all()
        if before is not None:
            assert held.isfinite().all()
            assert held[1, 2, 3] == before[1, 2, 3]


def test_memory_on_the_cpu():
    ends = Ends(strategy="fc", memory={"device": "cpu"})
    ends.pass_on(0, True, value_of(0))
    assert ends.sender.held[0][0].memory.device.type == "cpu"


# Loss scale


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_memories_follow_the_loss_scale(dtype):
    """A power of two is exact: the difference to a value that is as much larger is as much larger."""
    ends = Ends(strategy="fc", activations={"delta": "int4"}, memory={"dtype": dtype})
    ends.begin_step(0, 1)
    first = ends.pass_on(0, True, value_of(0))
    for end in (ends.sender, ends.receiver):
        end.rescale(8.0)
        end.rescale(0.5)
    ends.begin_step(1, 1)
    ends.assert_equal()
    assert torch.equal(ends.sender.held[0][0].memory.float(), first * 4)


def test_each_entry_of_a_pool_follows_the_loss_scale_when_it_is_used():
    ends = Ends(strategy="fc", activations={"delta": "int4"}, lazy={"pool": 2})
    first = {}
    for step in range(2):
        for end in (ends.sender, ends.receiver):
            end.begin_step(step, 1, entry=step)
        first[step] = ends.pass_on(0, True, value_of(step))
        for end in (ends.sender, ends.receiver):
            end.rescale(2.0)
    state = [end.state_dict() for end in (ends.sender, ends.receiver)]
    for reloads in (False, True):
        for entry, factor in ((1, 2.0), (0, 4.0)):
            for end, saved in zip((ends.sender, ends.receiver), state, strict=True):
                if reloads:
                    end.load_state_dict(deepcopy(saved))
                end.begin_step(2 + entry, 1, entry=entry)
                assert torch.equal(end.held[0][0].memory, first[entry] * factor)


def test_a_memory_that_is_rescaled_stays_finite():
    ends = Ends(strategy="fc", activations={"delta": "int4"}, memory={"dtype": "float16"})
    ends.begin_step(0, 1)
    ends.pass_on(0, True, value_of(0) * 1000)
    ends.sender.rescale(2.0**10)
    ends.sender.begin_step(1, 1)
    assert ends.sender.held[0][0].memory.isfinite().all()


# Odd tensors


def test_empty_tensors_and_views_travel():
    ends = Ends(strategy="fc", activations={"delta": "int2", "min_numel": 0})
    for step, fresh in enumerate((True, False)):
        ends.begin_step(step, 1)
        turned = value_of(step, (64, 80)).t()
        values = (torch.empty(0, 64), turned, torch.empty(4, 0).long())
        empty, received, also_empty = ends.pass_on(0, fresh, *values)
        assert (empty.shape, also_empty.shape) == ((0, 64), (4, 0))
        assert received.shape == (80, 64)
        assert torch.nn.functional.cosine_similarity(received.flatten(), turned.flatten(), dim=0) > 0.5


# What codecs learn


def test_what_a_codec_learns_belongs_to_the_tensor_and_not_to_the_slot():
    codecs = {"key": "lowrank", "delta": {"name": "lowrank", "rank": 2}}
    ends = Ends(strategy="key_delta", **dict.fromkeys(DIRECTIONS, codecs))
    for slot in range(3):
        ends.pass_on(slot, True, value_of(slot))
        ends.pass_on(slot, False, value_of(slot))
    learned = ends.sender.learned
    assert learned.keys() == {(0, "key"), (0, "delta")}
    assert [len(learned[0, kind].state.shared["right_RD"]) for kind in ("key", "delta")] == [4, 2]


def test_what_a_codec_learned_outlives_a_new_batch_size_but_not_a_new_width():
    ends = Ends(strategy="fc", activations={"delta": "lowrank"})
    ends.pass_on(0, True, value_of(0))
    state = ends.sender.learned[0, "key"].state
    ends.pass_on(0, True, value_of(1, (90, 64)))
    assert ends.sender.learned[0, "key"].state is state
    ends.pass_on(0, True, value_of(1, (190, 32)))
    assert ends.sender.learned[0, "key"].state is not state


def test_what_a_codec_learned_is_in_checkpoints():
    ends = Ends(strategy="fc", activations={"delta": "lowrank"})
    ends.pass_on(0, True, value_of(0))
    other = Ends(strategy="fc", activations={"delta": "lowrank"})
    other.sender.load_state_dict(ends.sender.state_dict())
    assert same_state(other.sender.learned[0, "key"].state, ends.sender.learned[0, "key"].state)
    assert other.sender.memory_nbytes == ends.sender.memory_nbytes


START = {"name": "transform", "bits": 0.5, "basis": "eigen", "refresh": 2}


def test_a_start_has_more_bits_and_its_basis_stays():
    ends = Ends(activations={"codec": START, "start": {"steps": 5, "bits": 6}})
    sizes, errors = [], []
    rows = value_of(1, (190, 16)) @ value_of(2, (16, 64))
    for step in range(10, 20):
        ends.begin_step(step, 1)
        before = ends.sender.traffic.payload_bytes
        received = ends.pass_on(0, True, rows)
        sizes.append(ends.sender.traffic.payload_bytes - before)
        errors.append(((received - rows).norm() / rows.norm()).item())
    few, many = (Transform(**START | {"bits": bits}).nbytes(rows.shape, rows.dtype) for bits in (0.5, 6))
    assert sizes == [many] * 5 + [few] * 5
    assert errors[5] < Ends(activations={"codec": START}).error_of(rows) / 2  # a basis is there
    ends.sender.forget()
    ends.receiver.forget()
    for step in range(20, 26):  # from the fifth on a basis is in use again
        ends.begin_step(step, 1)
        ends.pass_on(0, True, rows)
    assert ends.sender.traffic.payload_bytes == sum(sizes) + 5 * many + few


def test_a_start_lasts_until_what_is_learned_is_in_use():
    """From message 6 on, of one a step; of a new width it begins again."""
    ends = Ends(activations={"codec": {**START, "refresh": 3}, "start": {"steps": 1, "bits": 6}})
    bits = []
    for step in range(14):
        ends.begin_step(step, 1)
        value = value_of(step, (190, 64) if step < 7 else (190, 96))
        before = ends.sender.traffic.payload_bytes
        ends.pass_on(0, True, value)
        bits.append(8 * (ends.sender.traffic.payload_bytes - before) / value.numel())
    assert [each > 5 for each in bits] == [True] * 6 + [False] * 2 + [True] * 5 + [False]


def test_a_start_that_would_be_larger_than_raw_is_none():
    """A slice of half the message's bytes with codes of half of them. The codec learns all the same."""
    ends = Ends(activations={"codec": START, "start": {"steps": 9, "bits": 8}})
    value = value_of(0, (128, 256), torch.bfloat16)
    ends.begin_step(0, 1)
    ends.pass_on(0, True, value)
    assert ends.sender.traffic.payload_bytes == Transform(**START).nbytes(value.shape, value.dtype)
    assert ends.sender.learned[0, "key"].state.num_messages == 1


def test_what_is_learned_outlives_memories_that_are_forgotten():
    """Megatron-Core's batches may change their size, and held ones do not fit then."""
    ends = Ends(strategy="fc", activations={"delta": START})
    for step in range(4):
        ends.begin_step(step, 1)
        ends.pass_on(0, True, value_of(step))
    states = [end.learned[0, "key"].state for end in (ends.sender, ends.receiver)]
    for end in (ends.sender, ends.receiver):
        end.forget_held()
    assert ends.sender.held == {}
    ends.begin_step(4, 1)
    ends.pass_on(0, True, value_of(4, (90, 64)))
    assert [end.learned[0, "key"].state for end in (ends.sender, ends.receiver)] == states


def test_a_start_goes_on_after_a_checkpoint():
    block = {"activations": {"codec": START, "start": {"steps": 5}}}
    ends, others = Ends(**block), Ends(**block)
    for step in range(2):
        ends.begin_step(step, 1)
        ends.pass_on(0, True, value_of(step))
    others.sender.load_state_dict(ends.sender.state_dict())
    others.receiver.load_state_dict(ends.receiver.state_dict())
    for step in range(2, 7):
        for each in (ends, others):
            each.begin_step(step, 1)
        assert torch.equal(*(each.pass_on(0, True, value_of(step)) for each in (ends, others)))
    assert ends.sender.traffic == others.sender.traffic


def test_what_would_be_larger_than_raw_is_sent_raw():
    """Sixteen bytes of codes and padding for a value of four; a key that is raw is a base for deltas."""
    ends = Ends(strategy="fc", activations={"delta": "transform", "min_numel": 0})
    narrow, wide = value_of(0, (5000, 1)), value_of(0)
    assert torch.equal(ends.pass_on(0, True, narrow), narrow)
    assert not torch.equal(ends.pass_on(0, True, wide), wide)
    assert ends.sender.traffic.payload_bytes < 5000 * 4 + wide.nbytes


def test_what_is_sent_raw_has_no_codec_state():
    """A basis of 16,384 channels would take half a gigabyte at each end."""
    codec = {"name": "transform", "basis": "eigen", "refresh": 2}
    ends = Ends(activations={"codec": codec})
    flat = value_of(0, (1 << 14,))
    assert torch.equal(ends.pass_on(0, True, flat), flat)
    assert ends.sender.learned == {}
